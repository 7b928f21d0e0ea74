//! Heat map in SVG: the scores of all experts, one row a layer, with the selected experts framed.

use std::collections::HashMap;
use std::fmt::Write;

use super::page::escape;
use crate::experts::{ExpertId, ExpertScores, STABLE};

type Rgb = [f64; 3];

/// Colours from 0 to the largest score.
const SEQUENTIAL: [Rgb; 3] = [[247.0, 250.0, 255.0], [96.0, 160.0, 210.0], [8.0, 45.0, 105.0]];
/// Colours from the most negative score over 0 to the most positive one.
const DIVERGING: [Rgb; 3] = [[10.0, 60.0, 130.0], [250.0, 250.0, 250.0], [150.0, 20.0, 30.0]];
/// Colour of the frames of selected experts; contrasts with all colours above.
const FRAME: &str = "#f08c00";

/// Attribute of the frames of experts that are selected in few resamples.
const DASHES: &str = " stroke-dasharray=\"3 2\"";

const LEFT: usize = 56;
const TOP: usize = 64;
const ROW: usize = 16;
/// An upper bound on the mean width of a character of the title, which is bold and 14 pixels high.
const TITLE_CHARACTER: usize = 9;

/// A colour scale: values from `low` to `high`, interpolated between three colours.
struct Scale {
    stops: [Rgb; 3],
    low: f64,
    high: f64,
}

impl Scale {
    /// From 0 to the largest value; symmetric about 0 if a value is negative (risk differences).
    fn of_values(values: &[f64]) -> Self {
        let finite = || values.iter().copied().filter(|v| v.is_finite());
        let largest = finite().fold(0.0, |m: f64, v| m.max(v.abs()));
        let high = if largest > 0.0 { largest } else { 1.0 };
        match finite().any(|v| v < 0.0) {
            true => Self { stops: DIVERGING, low: -high, high },
            false => Self { stops: SEQUENTIAL, low: 0.0, high },
        }
    }

    fn colour(&self, value: f64) -> String {
        if !value.is_finite() {
            return "#888888".to_owned();
        }
        let position = 2.0 * ((value - self.low) / (self.high - self.low)).clamp(0.0, 1.0);
        let (from, to) = if position < 1.0 { (self.stops[0], self.stops[1]) } else { (self.stops[1], self.stops[2]) };
        let channel =
            |i: usize| (from[i] + (to[i] - from[i]) * (position - f64::from(u8::from(position >= 1.0)))).round() as u8;
        format!("#{:02x}{:02x}{:02x}", channel(0), channel(1), channel(2))
    }
}

/// Draws a heat map as an SVG element. `id` must be unique in the page; `selected` is best first. Each cell has a
/// tooltip with its score, and the drawing has a text alternative. `inclusion`, the share of bootstrap resamples that select an
/// expert (`[L][E]`, empty without a bootstrap), is in the tooltips; the frames of experts below [`STABLE`] are dashed.
///
/// # Panics
/// If `id` has other characters than ASCII letters, digits and hyphens.
pub fn heatmap_svg(
    id: &str,
    title: &str,
    scores: &ExpertScores,
    selected: &[ExpertId],
    inclusion: &[Vec<f64>],
) -> String {
    assert!(id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'), "{id:?} is not a valid id");
    let cell = if scores.num_experts <= 64 { 16 } else { 8 };
    let (width, height) = (LEFT + scores.num_experts * cell + 16, TOP + scores.layers.len() * ROW + 64);
    let width = width.max(if inclusion.is_empty() { 420 } else { 540 }); // the width of the legend
    let width = width.max(LEFT + TITLE_CHARACTER * title.chars().count() + 16);
    let scale = Scale::of_values(&scores.values);
    let rank: HashMap<ExpertId, usize> = selected.iter().enumerate().map(|(i, id)| (*id, i + 1)).collect();

    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" role=\"img\" aria-labelledby=\"{id}-title {id}-desc\" width=\"{width}\" \
         height=\"{height}\" viewBox=\"0 0 {width} {height}\" font-family=\"system-ui, sans-serif\" font-size=\"11\">\n\
         <title id=\"{id}-title\">{}</title>\n<desc id=\"{id}-desc\">{}</desc>\n\
         <text x=\"{LEFT}\" y=\"20\" font-size=\"14\" font-weight=\"bold\">{}</text>\n\
         <text x=\"{LEFT}\" y=\"38\">expert</text>\n<text x=\"4\" y=\"{}\">layer</text>\n",
        escape(title),
        escape(&description(scores, selected)),
        escape(title),
        TOP - 8,
    );
    for expert in (0..scores.num_experts).step_by(64 / cell) {
        let x = LEFT + expert * cell + cell / 2;
        let _ = writeln!(out, "<text x=\"{x}\" y=\"{}\" text-anchor=\"middle\">{expert}</text>", TOP - 8);
    }
    let mut frames = String::new();
    for (i, (layer, row)) in scores.layers.iter().zip(scores.rows()).enumerate() {
        let y = TOP + i * ROW;
        let _ = writeln!(out, "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{layer}</text>", LEFT - 6, y + 12);
        for (expert, value) in row.iter().enumerate() {
            let x = LEFT + expert * cell;
            let rank = rank.get(&ExpertId { layer: *layer, expert });
            let selected = rank.map_or_else(String::new, |r| format!(", selected, rank {r}"));
            let share = inclusion.get(i).and_then(|row| row.get(expert));
            let included = share.map_or_else(String::new, |p| format!(", in {p:.2} of resamples"));
            let _ = writeln!(
                out,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{cell}\" height=\"{ROW}\" fill=\"{}\"><title>layer {layer}, expert \
                 {expert}: {value:.4e}{selected}{included}</title></rect>",
                scale.colour(*value)
            );
            if rank.is_some() {
                let (x, y, w, h) = (x + 1, y + 1, cell - 2, ROW - 2);
                let dashes = if share.is_some_and(|p| *p < STABLE) { DASHES } else { "" };
                let _ = writeln!(frames, "<rect x=\"{x}\" y=\"{y}\" width=\"{w}\" height=\"{h}\"{dashes}/>");
            }
        }
    }
    // Frames are drawn last, so that neighbouring cells do not cover them, and ignore the pointer, so that cells keep
    // their tooltips.
    let _ =
        writeln!(out, "<g fill=\"none\" stroke=\"{FRAME}\" stroke-width=\"2\" pointer-events=\"none\">\n{frames}</g>");
    let dashed = !inclusion.is_empty();
    out += &legend(&scale, TOP + scores.layers.len() * ROW + 16, dashed);
    out + "</svg>\n"
}

/// The text alternative of the heat map.
fn description(scores: &ExpertScores, selected: &[ExpertId]) -> String {
    let (layers, experts) = (scores.layers.len(), scores.num_experts);
    let mut out =
        format!("Scores of {layers} layers (rows) with {experts} experts each (columns), {} selected.", selected.len());
    // Without scores (random selection) all values are 0.
    for (i, (id, value)) in scores.ranked().iter().filter(|(_, value)| *value != 0.0).take(3).enumerate() {
        let head = if i == 0 { " The highest:" } else { "," };
        let _ = write!(out, "{head} layer {} expert {} with {value:.3e}", id.layer, id.expert);
    }
    out
}

/// The legend: the colour scale, and the frames of selected experts.
fn legend(scale: &Scale, y: usize, dashed: bool) -> String {
    const STEPS: usize = 32;
    let mut out = String::new();
    for i in 0..STEPS {
        let value = scale.low + (scale.high - scale.low) * i as f64 / (STEPS - 1) as f64;
        let (x, colour) = (LEFT + i * 6, scale.colour(value));
        let _ = writeln!(out, "<rect x=\"{x}\" y=\"{y}\" width=\"6\" height=\"12\" fill=\"{colour}\"/>");
    }
    let end = LEFT + STEPS * 6;
    let _ = writeln!(
        out,
        "<text x=\"{LEFT}\" y=\"{}\">{:.3e}</text>\n<text x=\"{end}\" y=\"{}\" text-anchor=\"end\">{:.3e}</text>\n\
         <rect x=\"{}\" y=\"{y}\" width=\"12\" height=\"12\" fill=\"none\" stroke=\"{FRAME}\" stroke-width=\"2\"/>\n\
         <text x=\"{}\" y=\"{}\">selected</text>",
        y + 26,
        scale.low,
        y + 26,
        scale.high,
        end + 24,
        end + 42,
        y + 10,
    );
    if dashed {
        let _ = writeln!(
            out,
            "<rect x=\"{}\" y=\"{}\" width=\"12\" height=\"12\" fill=\"none\" stroke=\"{FRAME}\" stroke-width=\"2\"{DASHES}/>\n\
             <text x=\"{}\" y=\"{}\">selected in less than {STABLE} of resamples</text>",
            end + 24,
            y + 18,
            end + 42,
            y + 28,
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::page::tests::assert_well_formed;
    use super::*;

    fn scores(values: Vec<f64>) -> ExpertScores {
        ExpertScores { layers: vec![1, 4], num_experts: 3, values }
    }

    #[test]
    fn every_expert_is_drawn_and_selected_experts_are_framed() {
        let scores = scores(vec![0.1, 0.5, 0.0, 1.0, 0.25, 0.75]);
        let svg = heatmap_svg("round-1", "Round 1 <of> 3 & more", &scores, &[(4, 0).into(), (4, 2).into()], &[]);
        assert_well_formed(&svg);
        assert_eq!(svg.matches("<rect").count(), 6 + 2 + 32 + 1, "cells, frames, legend, its frame");
        assert!(svg.contains("layer 4, expert 2: 7.5000e-1, selected, rank 2"));
        let long = heatmap_svg("long", &"w".repeat(100), &scores, &[], &[]);
        assert!(long.contains("width=\"972\""), "the title has room");
        assert!(svg.contains("layer 1, expert 2: 0.0000e0<"));
        assert!(svg.contains(
            "3 experts each (columns), 2 selected. The highest: layer 4 expert 0 with 1.000e0, layer 4 expert 2"
        ));
        assert!(svg.contains("aria-labelledby=\"round-1-title round-1-desc\""));
    }

    #[test]
    fn unstable_selections_have_dashed_frames() {
        let scores = scores(vec![0.1, 0.5, 0.0, 1.0, 0.25, 0.75]);
        let inclusion = [vec![0.0, 0.1, 0.0], vec![1.0, 0.0, 0.895]];
        let svg = heatmap_svg("round-1", "Round 1", &scores, &[(4, 0).into(), (4, 2).into()], &inclusion);
        assert_well_formed(&svg);
        assert!(svg.contains("layer 4, expert 2: 7.5000e-1, selected, rank 2, in 0.90 of resamples"), "{svg}");
        assert!(svg.contains("layer 1, expert 1: 5.0000e-1, in 0.10 of resamples"));
        assert_eq!(svg.matches("stroke-dasharray").count(), 1 + 1, "one expert, and the legend");
    }

    #[test]
    fn colours_of_sequential_and_diverging_scales() {
        let sequential = Scale::of_values(&[0.0, 2.0, 1.0]);
        assert_eq!([0.0, 1.0, 2.0].map(|v| sequential.colour(v)), ["#f7faff", "#60a0d2", "#082d69"]);
        let diverging = Scale::of_values(&[-1.0, 4.0]);
        assert_eq!([-4.0, 0.0, 4.0].map(|v| diverging.colour(v)), ["#0a3c82", "#fafafa", "#96141e"]);
        assert_eq!(Scale::of_values(&[0.0, 0.0]).colour(0.0), "#f7faff", "all scores zero: no division by zero");
        assert_eq!(sequential.colour(f64::NAN), "#888888");
    }
}
