//! Line charts in SVG: losses over steps of one or more runs.

use std::fmt::Write;

use super::drawing;
use super::markup::escape;

/// One line of a chart.
#[derive(Debug, Clone, PartialEq)]
pub struct Series {
    /// Its name in the legend.
    pub label: String,
    /// Points (x, y), x ascending. The line is interrupted where a point is not finite.
    pub points: Vec<(f64, f64)>,
}

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 64.0;
const TOP: f64 = 40.0;
/// Colours that colour-blind readers can tell apart on white (Okabe and Ito).
const COLOURS: [&str; 7] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", BLACK];
const BLACK: &str = "#000000";

/// Draws a line chart as an SVG element; `None` if no series has a finite point. `id` must be unique in the page.
///
/// # Panics
/// If `id` has other characters than ASCII letters, digits and hyphens.
pub fn curve_svg(id: &str, title: &str, x_label: &str, series: &[Series]) -> Option<String> {
    let finite = |s: &Series| -> Vec<(f64, f64)> {
        s.points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect()
    };
    let lines: Vec<(&Series, Vec<(f64, f64)>)> =
        series.iter().map(|s| (s, finite(s))).filter(|(_, points)| !points.is_empty()).collect();
    let points = || lines.iter().flat_map(|(_, points)| points);
    let x_axis = Axis::spanning(points().map(|p| p.0))?;
    let y_axis = Axis::spanning(points().map(|p| p.1))?;
    let (right, bottom) = (LEFT + WIDTH, TOP + HEIGHT);
    let pixel = |(x, y): (f64, f64)| (LEFT + WIDTH * x_axis.fraction(x), bottom - HEIGHT * y_axis.fraction(y));

    let height = bottom + 48.0 + 18.0 * lines.len() as f64;
    let mut out = drawing::open(id, title, &description(&lines), [right + 24.0, height], LEFT);
    for tick in y_axis.ticks() {
        let (_, y) = pixel((x_axis.low, tick));
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{right}\" y1=\"{y:.1}\" y2=\"{y:.1}\" class=\"grid\" stroke=\"#dddddd\"/>\n\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 6.0,
            y + 4.0,
            tick_label(tick)
        );
    }
    for tick in x_axis.ticks() {
        let (x, _) = pixel((tick, y_axis.low));
        let _ = writeln!(
            out,
            "<text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            bottom + 16.0,
            tick_label(tick)
        );
    }
    let _ = writeln!(out, "<text x=\"{right}\" y=\"{}\" text-anchor=\"end\">{}</text>", bottom + 32.0, escape(x_label));
    for (i, (series, _)) in lines.iter().enumerate() {
        let look = Look::of(i);
        look.line(&mut out, series, pixel);
        look.key(&mut out, &series.label, bottom + 48.0 + 18.0 * i as f64);
    }
    Some(out + "</svg>\n")
}

/// How a line looks.
pub(super) struct Look {
    pub colour: &'static str,
    /// The class of the colour that is not told apart from dark paper.
    pub class: &'static str,
    /// Colours repeat after the last one; dashes then distinguish the lines.
    pub dashes: String,
    /// How much of a point's mark is filled, which distinguishes points of one colour.
    filled: f64,
}

impl Look {
    /// That of the line `i`.
    pub fn of(i: usize) -> Self {
        let colour = COLOURS[i % COLOURS.len()];
        let dashes = if i < COLOURS.len() { String::new() } else { format!(" stroke-dasharray=\"{}\"", 2 + i) };
        let filled = [1.0, 0.0, 0.4][i / COLOURS.len() % 3];
        Self { colour, class: if colour == BLACK { "ink" } else { "" }, dashes, filled }
    }

    /// The mark of a point; `title`: its value, or nothing in the legend.
    pub fn mark(&self, [x, y]: [f64; 2], title: &str) -> String {
        let Self { colour, class, filled, .. } = self;
        let (point, title) = match title {
            "" => ("", String::new()),
            title => ("point ", format!("<title>{}</title>", escape(title))),
        };
        format!(
            "<circle class=\"{point}{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\" fill-opacity=\"{filled}\" \
             stroke=\"{colour}\" stroke-width=\"1.5\">{title}</circle>\n"
        )
    }

    /// Draws a line, with marks at its points that show where the pointer is, and are named by step and value.
    fn line(&self, out: &mut String, series: &Series, pixel: impl Fn((f64, f64)) -> (f64, f64)) {
        let Self { colour, class, dashes, .. } = self;
        let parts = series.points.split(|(x, y)| !(x.is_finite() && y.is_finite()));
        let mut marks = String::new();
        let mut last = f64::NEG_INFINITY;
        for part in parts.filter(|part| !part.is_empty()) {
            let path: Vec<String> = part.iter().map(|p| pixel(*p)).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            if path.len() > 1 {
                let _ = writeln!(
                    out,
                    "<polyline class=\"{class}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.5\"{dashes} points=\"{}\"/>",
                    path.join(" ")
                );
            }
            for (i, point) in part.iter().enumerate() {
                let (x, y) = pixel(*point);
                // No pointer tells points of less than a pixel apart.
                if x - last < 1.0 && i + 1 < part.len() {
                    continue;
                }
                last = x;
                // A line of one point is invisible.
                let (radius, opacity) = if part.len() == 1 { (3, 1) } else { (4, 0) };
                let _ = writeln!(
                    marks,
                    "<circle class=\"point {class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" fill=\"{colour}\" \
                     fill-opacity=\"{opacity}\"><title>{}: {} at step {}</title></circle>",
                    escape(&series.label),
                    value(point.1),
                    point.0,
                );
            }
        }
        *out += &marks;
    }

    /// Draws the legend's entry of points, with their mark.
    pub fn key_of_points(&self, out: &mut String, label: &str, y: f64) {
        self.key(out, label, y);
        *out += &self.mark([LEFT + 12.0, y - 4.0], "");
    }

    /// Draws the line's entry of the legend.
    pub fn key(&self, out: &mut String, label: &str, y: f64) {
        let Self { colour, class, dashes, .. } = self;
        let _ = writeln!(
            out,
            "<line class=\"{class}\" x1=\"{LEFT}\" x2=\"{}\" y1=\"{}\" y2=\"{}\" stroke=\"{colour}\" stroke-width=\"3\"{dashes}/>\n\
             <text x=\"{}\" y=\"{y}\">{}</text>",
            LEFT + 24.0,
            y - 4.0,
            y - 4.0,
            LEFT + 32.0,
            escape(label)
        );
    }
}

/// Five digits, without an exponent where the number is of everyday size.
fn value(y: f64) -> String {
    if y == 0.0 || (1e-3..1e5).contains(&y.abs()) { format!("{y:.5}") } else { format!("{y:.4e}") }
}

/// The range of an axis.
pub(super) struct Axis {
    pub low: f64,
    pub high: f64,
}

impl Axis {
    /// From the smallest to the largest value; a single value gets a margin on both sides. `None` without values.
    pub fn spanning(values: impl Iterator<Item = f64>) -> Option<Self> {
        let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), x| (low.min(x), high.max(x)));
        (low <= high).then(|| {
            let margin = if high > low { 0.0 } else { f64::max(low.abs() * 0.1, 1e-6) };
            Self { low: low - margin, high: high + margin }
        })
    }

    /// The position of a value on the axis: 0 at the low end, 1 at the high end.
    pub fn fraction(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }

    /// Four to nine values within the range, multiples of 1, 2 or 5 times a power of ten.
    pub fn ticks(&self) -> Vec<f64> {
        let rough = (self.high - self.low) / 8.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|m| m * power).find(|s| *s >= rough).unwrap_or(10.0 * power);
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step).floor() as i64;
        (first..=last).map(|i| i as f64 * step).collect()
    }
}

/// A tick label: at most six decimals, without trailing zeros, so that rounding errors do not show.
pub(super) fn tick_label(value: f64) -> String {
    let text = format!("{value:.6}");
    let short = text.trim_end_matches('0').trim_end_matches('.');
    if short == "0" || short == "-0" {
        return if value == 0.0 { "0".into() } else { format!("{value:.1e}") };
    }
    short.to_owned()
}

/// The text alternative of the chart: first and last point of each line.
fn description(lines: &[(&Series, Vec<(f64, f64)>)]) -> String {
    let line = |(series, points): &(&Series, Vec<(f64, f64)>)| {
        let (first, last, label) = (points[0], points[points.len() - 1], &series.label);
        format!("{label}: from {:.4e} at {} to {:.4e} at {}.", first.1, first.0, last.1, last.0)
    };
    lines.iter().map(line).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::super::markup::tests::assert_well_formed;
    use super::*;

    fn series(label: &str, ys: &[f64]) -> Series {
        Series { label: label.into(), points: ys.iter().enumerate().map(|(i, y)| (i as f64 + 1.0, *y)).collect() }
    }

    #[test]
    fn every_series_is_drawn_within_the_axes() {
        let all = [series("a <b>", &[3.0, 2.0, f64::NAN, 1.0]), series("c", &[]), series("nowhere", &[f64::INFINITY])];
        let svg = curve_svg("ce", "Loss & more", "step", &all).unwrap();
        assert_well_formed(&svg);
        assert_eq!((svg.matches("<polyline").count(), svg.matches("fill-opacity=\"1\"").count()), (1, 1));
        assert!(svg.contains("<title>a &lt;b&gt;: 2.00000 at step 2</title>"), "{svg}");
        // x = 1, 2, 4 on an axis from 1 to 4; y = 3, 2, 1 on an axis from 1 to 3.
        assert!(svg.contains("points=\"64.0,40.0 304.0,190.0\"") && svg.contains("cx=\"784.0\" cy=\"340.0\""), "{svg}");
        assert!(svg.contains("a &lt;b&gt;: from 3.0000e0 at 1 to 1.0000e0 at 4."));
        assert!(!svg.contains("nowhere"));
        assert_eq!(curve_svg("ce", "Loss", "step", &all[2..]), None);
    }

    #[test]
    fn points_have_a_mark_each_if_a_pointer_can_tell_them_apart() {
        let marks = |points: usize| {
            let ys: Vec<f64> = (0..points).map(|i| (i as f64).sqrt()).collect();
            let svg = curve_svg("ce", "Loss", "step", &[series("a", &ys)]).unwrap();
            assert!(svg.contains(&format!("at step {points}</title>")), "the last one");
            svg.matches("<circle").count()
        };
        assert_eq!(marks(400), 400);
        assert!((600..=722).contains(&marks(100_000)), "{}", marks(100_000));
    }

    #[test]
    fn ticks_are_round_and_inside() {
        for (low, high) in [(0.0, 1.0), (1.37, 9.2), (-3.0, 250.0), (1e-5, 2e-5), (2.0, 2.0)] {
            let axis = Axis::spanning([low, high].into_iter()).unwrap();
            let ticks = axis.ticks();
            assert!((4..=9).contains(&ticks.len()), "{low}..{high}: {ticks:?}");
            // Tolerance: a tick is a multiple of the step up to rounding.
            assert!(
                ticks.iter().all(|t| (-1e-9..=1.0 + 1e-9).contains(&axis.fraction(*t))),
                "{low}..{high}: {ticks:?}"
            );
        }
        assert_eq!([0.1 + 0.2, 0.0, 2e-9, 1500.0].map(tick_label), ["0.3", "0", "2.0e-9", "1500"]);
    }
}
