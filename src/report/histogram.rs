//! Histogram in SVG: a statistic over random sets, with the value of the selection marked.

use std::fmt::Write;

use super::drawing;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 200.0;
const LEFT: f64 = 40.0;
const TOP: f64 = 48.0;
const BINS: usize = 24;
const BAR: &str = "#0072b2";
const MARK: &str = "#d55e00";

/// Draws the values as bars and `marked` as a vertical line, as an SVG element; `None` without finite values. `id` must be
/// unique in the page.
///
/// # Panics
/// If `id` has other characters than ASCII letters, digits and hyphens.
pub fn histogram_svg(id: &str, title: &str, values: &[f64], marked: f64) -> Option<String> {
    let finite: Vec<f64> = values.iter().copied().filter(|v| v.is_finite()).collect();
    if finite.is_empty() || !marked.is_finite() {
        return None;
    }
    let all = || finite.iter().copied().chain([marked]);
    let (low, high) = (all().fold(f64::INFINITY, f64::min), all().fold(f64::NEG_INFINITY, f64::max));
    let margin = if high > low { 0.02 * (high - low) } else { 1.0 };
    let (low, high) = (low - margin, high + margin);
    let position = |x: f64| (x - low) / (high - low);
    let mut counts = [0usize; BINS];
    for value in &finite {
        counts[((position(*value) * BINS as f64) as usize).min(BINS - 1)] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(1).max(1);
    let (bottom, w) = (TOP + HEIGHT, WIDTH / BINS as f64);
    let as_large = finite.iter().filter(|v| **v >= marked).count();
    let description = format!(
        "Histogram of {} random sets from {:.4} to {:.4}; the selection has {marked:.4}, and {as_large} random sets reach it.",
        finite.len(),
        finite.iter().copied().fold(f64::INFINITY, f64::min),
        finite.iter().copied().fold(f64::NEG_INFINITY, f64::max),
    );
    let size = [LEFT + WIDTH + 24.0, bottom + 48.0];
    let mut out = drawing::open(id, title, &description, size, LEFT);
    out += "<g class=\"bars\">\n";
    for (i, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
        let height = HEIGHT * *count as f64 / most as f64;
        let from = low + (high - low) * i as f64 / BINS as f64;
        let to = low + (high - low) * (i + 1) as f64 / BINS as f64;
        let _ = writeln!(
            out,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"{BAR}\"><title>{count} random sets \
             from {from:.4} to {to:.4}</title></rect>",
            LEFT + w * i as f64,
            bottom - height,
            w - 1.0,
        );
    }
    out += "</g>\n";
    let x = LEFT + WIDTH * position(marked);
    let anchor = if position(marked) > 0.5 { "end" } else { "start" };
    let _ = writeln!(
        out,
        "<line x1=\"{LEFT}\" x2=\"{}\" y1=\"{bottom}\" y2=\"{bottom}\" stroke=\"#888888\"/>\n\
         <line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{}\" y2=\"{bottom}\" stroke=\"{MARK}\" stroke-width=\"2\"><title>selection: {marked:.4}</title></line>\n\
         <text x=\"{x:.1}\" y=\"{}\" text-anchor=\"{anchor}\" font-weight=\"bold\">selection {marked:.4}</text>\n\
         <text x=\"{}\" y=\"{}\" text-anchor=\"end\">{most}</text>",
        LEFT + WIDTH,
        TOP - 8.0,
        TOP - 12.0,
        LEFT - 6.0,
        TOP + 4.0,
    );
    for (x, anchor) in [(low, "start"), (0.5 * (low + high), "middle"), (high, "end")] {
        let at = LEFT + WIDTH * position(x);
        let _ = writeln!(out, "<text x=\"{at:.1}\" y=\"{}\" text-anchor=\"{anchor}\">{x:.4}</text>", bottom + 16.0);
    }
    Some(out + "</svg>\n")
}

#[cfg(test)]
mod tests {
    use super::super::markup::tests::assert_well_formed;
    use super::*;

    #[test]
    fn bars_hold_all_values_and_the_selection_is_marked() {
        let values: Vec<f64> = (0..50).map(|i| f64::from(i % 7) * 0.1).collect();
        let svg = histogram_svg("null", "T <of> random sets", &values, 2.5).unwrap();
        assert_well_formed(&svg);
        let counted: usize = svg
            .split("<title>")
            .filter_map(|part| part.split_once(" random sets from").and_then(|(n, _)| n.parse::<usize>().ok()))
            .sum();
        assert_eq!(counted, 50);
        assert!(svg.contains("selection 2.5000") && svg.contains("and 0 random sets reach it"), "{svg}");
        assert_well_formed(&histogram_svg("one", "equal", &[1.0], 1.0).unwrap());
        assert!(
            histogram_svg("none", "", &[f64::NAN], 1.0).is_none()
                && histogram_svg("none", "", &[1.0], f64::NAN).is_none()
        );
    }
}
