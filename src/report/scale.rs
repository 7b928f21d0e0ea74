//! Colours of values, on white and on black.

use std::fmt::Write;

type Rgb = [f64; 3];

/// Colours from 0 to the largest value.
const SEQUENTIAL: [Rgb; 3] = [[247.0, 250.0, 255.0], [96.0, 160.0, 210.0], [8.0, 45.0, 105.0]];
/// Colours from the most negative value over 0 to the most positive one.
const DIVERGING: [Rgb; 3] = [[10.0, 60.0, 130.0], [250.0, 250.0, 250.0], [150.0, 20.0, 30.0]];
/// Both where the paper is dark: values near 0 are near its colour, too.
const DARK_SEQUENTIAL: [Rgb; 3] = [[29.0, 33.0, 40.0], [45.0, 105.0, 165.0], [190.0, 226.0, 255.0]];
const DARK_DIVERGING: [Rgb; 3] = [[120.0, 185.0, 255.0], [36.0, 38.0, 42.0], [255.0, 135.0, 125.0]];

/// Steps of the scales where the paper is dark; style sheets have a class for each.
const STEPS: usize = 32;

/// A colour scale: values from `low` to `high`, interpolated between three colours.
pub struct Scale {
    diverging: bool,
    /// The value of its first colour.
    pub low: f64,
    /// The value of its last colour.
    pub high: f64,
}

impl Scale {
    /// From 0 to the largest value; symmetric about 0 if a value is negative (risk differences).
    pub fn of_values(values: &[f64]) -> Self {
        let finite = || values.iter().copied().filter(|v| v.is_finite());
        let largest = finite().fold(0.0, |m: f64, v| m.max(v.abs()));
        let high = if largest > 0.0 { largest } else { 1.0 };
        let diverging = finite().any(|v| v < 0.0);
        Self { diverging, low: if diverging { -high } else { 0.0 }, high }
    }

    /// The attributes of a shape in the colour of a value.
    pub fn paint(&self, value: f64) -> String {
        if !value.is_finite() {
            return "fill=\"#888888\"".to_owned();
        }
        let position = ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
        let (kind, stops) = if self.diverging { ('d', DIVERGING) } else { ('q', SEQUENTIAL) };
        format!("class=\"{kind}{}\" fill=\"{}\"", (position * STEPS as f64).round(), mix(&stops, position))
    }
}

/// The style of the classes of [`Scale::paint`] where the paper is dark. Elsewhere their attributes hold.
pub fn dark_style() -> String {
    let mut out = String::from("@media screen and (prefers-color-scheme: dark) {\n");
    for (kind, stops) in [('q', DARK_SEQUENTIAL), ('d', DARK_DIVERGING)] {
        for step in 0..=STEPS {
            let _ = writeln!(out, ".{kind}{step} {{ fill: {}; }}", mix(&stops, step as f64 / STEPS as f64));
        }
    }
    out + "}\n"
}

/// The colour at a position from 0 to 1.
fn mix(stops: &[Rgb; 3], position: f64) -> String {
    let position = 2.0 * position;
    let (from, to) = if position < 1.0 { (stops[0], stops[1]) } else { (stops[1], stops[2]) };
    let part = position - f64::from(u8::from(position >= 1.0));
    let channel = |i: usize| (from[i] + (to[i] - from[i]) * part).round() as u8;
    format!("#{:02x}{:02x}{:02x}", channel(0), channel(1), channel(2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_of_sequential_and_diverging_scales() {
        let paints = |scale: &Scale, values: [f64; 3]| values.map(|v| scale.paint(v).replace('"', ""));
        let sequential = Scale::of_values(&[0.0, 2.0, 1.0]);
        let expected = ["class=q0 fill=#f7faff", "class=q16 fill=#60a0d2", "class=q32 fill=#082d69"];
        assert_eq!(paints(&sequential, [0.0, 1.0, 2.0]), expected);
        let diverging = Scale::of_values(&[-1.0, 4.0]);
        let expected = ["class=d0 fill=#0a3c82", "class=d16 fill=#fafafa", "class=d32 fill=#96141e"];
        assert_eq!(paints(&diverging, [-4.0, 0.0, 4.0]), expected);
        let zeros = Scale::of_values(&[0.0, 0.0]);
        assert_eq!(zeros.paint(0.0), "class=\"q0\" fill=\"#f7faff\"", "all scores zero: no division by zero");
        assert_eq!(sequential.paint(f64::NAN), "fill=\"#888888\"");
    }

    #[test]
    fn every_class_has_a_colour_on_dark_paper() {
        let (style, scale) = (dark_style(), Scale::of_values(&[-1.0, 1.0]));
        for value in [-1.0, -0.51, 0.0, 0.3, 1.0] {
            let paint = scale.paint(value);
            let class = paint.split('"').nth(1).unwrap();
            assert!(style.contains(&format!(".{class} {{ fill: #")), "{class}");
        }
        assert!(style.contains(".q0 { fill: #1d2128; }") && style.contains(".d32 { fill: #ff877d; }"), "{style}");
    }
}
