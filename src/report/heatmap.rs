//! Heat map in SVG: the scores of all experts, one row a layer, with the selected experts framed.

use std::collections::HashMap;
use std::fmt::Write;

use super::drawing;
use super::scale::Scale;
use crate::experts::{ExpertId, ExpertScores, STABLE};
use crate::quote;

/// Colour of the frames of selected experts; contrasts with all colours above.
const FRAME: &str = "#f08c00";

/// Attribute of the frames of experts that are selected in few resamples.
const DASHES: &str = " stroke-dasharray=\"3 2\"";

const LEFT: usize = 56;
const TOP: usize = 64;
const ROW: usize = 16;
/// An upper bound on the mean width of a character of the title, which is bold and 14 pixels high.
const TITLE_CHARACTER: usize = 9;

/// What the cells of a heat map show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cells {
    /// Scores.
    Scores,
    /// Numbers of tokens.
    Tokens,
}

impl Cells {
    fn name(self) -> &'static str {
        match self {
            Self::Scores => "Scores",
            Self::Tokens => "Tokens",
        }
    }

    fn value(self, value: f64, digits: usize) -> String {
        match self {
            Self::Scores => format!("{value:.digits$e}"),
            Self::Tokens => format!("{value}"),
        }
    }
}

/// Draws a heat map as an SVG element. `id` must be unique in the page; `selected` is best first. Each cell has a
/// tooltip with its value, and the drawing has a text alternative. `inclusion`, the share of bootstrap resamples that select an
/// expert (`[L][E]`, empty without a bootstrap), is in the tooltips; the frames of experts below [`STABLE`] are dashed.
///
/// # Panics
/// If `id` has other characters than ASCII letters, digits and hyphens.
pub fn heatmap_svg(
    id: &str,
    title: &str,
    what: Cells,
    scores: &ExpertScores,
    selected: &[ExpertId],
    inclusion: &[Vec<f64>],
) -> String {
    let cell = if scores.num_experts <= 64 { 16 } else { 8 };
    let (width, height) = (LEFT + scores.num_experts * cell + 16, TOP + scores.layers.len() * ROW + 64);
    let width = width.max(if inclusion.is_empty() { 420 } else { 540 }); // the width of the legend
    let width = width.max(LEFT + TITLE_CHARACTER * quote::line(title).chars().count() + 16);
    let scale = Scale::of_values(&scores.values);
    let rank: HashMap<ExpertId, usize> = selected.iter().enumerate().map(|(i, id)| (*id, i + 1)).collect();

    let size = [width as f64, height as f64];
    let mut out = drawing::open(id, title, &description(what, scores, selected), size, LEFT as f64);
    let _ = writeln!(out, "<text x=\"{LEFT}\" y=\"38\">expert</text>\n<text x=\"4\" y=\"{}\">layer</text>", TOP - 8,);
    for expert in (0..scores.num_experts).step_by(64 / cell) {
        let x = LEFT + expert * cell + cell / 2;
        let _ = writeln!(out, "<text x=\"{x}\" y=\"{}\" text-anchor=\"middle\">{expert}</text>", TOP - 8);
    }
    let mut frames = String::new();
    let mut cells = String::new();
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
                cells,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{cell}\" height=\"{ROW}\" {}><title>layer {layer}, expert \
                 {expert}: {}{selected}{included}</title></rect>",
                scale.paint(*value),
                what.value(*value, 4),
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
    let _ = writeln!(out, "<g class=\"cells\">\n{cells}</g>");
    let _ =
        writeln!(out, "<g fill=\"none\" stroke=\"{FRAME}\" stroke-width=\"2\" pointer-events=\"none\">\n{frames}</g>");
    let dashed = !inclusion.is_empty();
    out += &legend(what, &scale, TOP + scores.layers.len() * ROW + 16, dashed);
    out + "</svg>\n"
}

/// The text alternative of the heat map.
fn description(what: Cells, scores: &ExpertScores, selected: &[ExpertId]) -> String {
    let (layers, experts) = (scores.layers.len(), scores.num_experts);
    let mut out = format!(
        "{} of {layers} layers (rows) with {experts} experts each (columns), {} selected.",
        what.name(),
        selected.len()
    );
    // Without scores (random selection) all values are 0.
    for (i, (id, value)) in scores.ranked().iter().filter(|(_, value)| *value != 0.0).take(3).enumerate() {
        let head = if i == 0 { " The highest:" } else { "," };
        let _ = write!(out, "{head} layer {} expert {} with {}", id.layer, id.expert, what.value(*value, 3));
    }
    out
}

/// The legend: the colour scale, and the frames of selected experts.
fn legend(what: Cells, scale: &Scale, y: usize, dashed: bool) -> String {
    const STEPS: usize = 32;
    let mut out = String::new();
    for i in 0..STEPS {
        let value = scale.low + (scale.high - scale.low) * i as f64 / (STEPS - 1) as f64;
        let (x, paint) = (LEFT + i * 6, scale.paint(value));
        let _ = writeln!(out, "<rect x=\"{x}\" y=\"{y}\" width=\"6\" height=\"12\" {paint}/>");
    }
    let end = LEFT + STEPS * 6;
    let _ = writeln!(
        out,
        "<text x=\"{LEFT}\" y=\"{}\">{}</text>\n<text x=\"{end}\" y=\"{}\" text-anchor=\"end\">{}</text>\n\
         <rect x=\"{}\" y=\"{y}\" width=\"12\" height=\"12\" fill=\"none\" stroke=\"{FRAME}\" stroke-width=\"2\"/>\n\
         <text x=\"{}\" y=\"{}\">selected</text>",
        y + 26,
        what.value(scale.low, 3),
        y + 26,
        what.value(scale.high, 3),
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
    use super::super::markup::tests::assert_well_formed;
    use super::*;

    fn scores(values: Vec<f64>) -> ExpertScores {
        ExpertScores { layers: vec![1, 4], num_experts: 3, values }
    }

    #[test]
    fn every_expert_is_drawn_and_selected_experts_are_framed() {
        let scores = scores(vec![0.1, 0.5, 0.0, 1.0, 0.25, 0.75]);
        let svg = heatmap_svg(
            "round-1",
            "Round 1 <of> 3 & more",
            Cells::Scores,
            &scores,
            &[(4, 0).into(), (4, 2).into()],
            &[],
        );
        assert_well_formed(&svg);
        assert_eq!(svg.matches("<rect").count(), 6 + 2 + 32 + 1, "cells, frames, legend, its frame");
        assert!(svg.contains("layer 4, expert 2: 7.5000e-1, selected, rank 2"));
        let long = heatmap_svg("long", &"w".repeat(100), Cells::Scores, &scores, &[], &[]);
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
        let svg =
            heatmap_svg("round-1", "Round 1", Cells::Scores, &scores, &[(4, 0).into(), (4, 2).into()], &inclusion);
        assert_well_formed(&svg);
        assert!(svg.contains("layer 4, expert 2: 7.5000e-1, selected, rank 2, in 0.90 of resamples"), "{svg}");
        assert!(svg.contains("layer 1, expert 1: 5.0000e-1, in 0.10 of resamples"));
        assert_eq!(svg.matches("stroke-dasharray").count(), 1 + 1, "one expert, and the legend");
    }

    #[test]
    fn tokens_are_whole_numbers() {
        let tokens = scores(vec![12.0, 0.0, 3.0, 0.0, 123_456.0, 7.0]);
        let svg = heatmap_svg("load", "Load", Cells::Tokens, &tokens, &[(4, 1).into()], &[]);
        assert_well_formed(&svg);
        assert!(svg.contains("<title>layer 4, expert 1: 123456, selected, rank 1</title>"), "{svg}");
        assert!(svg.contains(">Tokens of 2 layers"), "{svg}");
        assert!(svg.contains(">0</text>") && svg.contains(">123456</text>"), "the legend: {svg}");
    }
}
