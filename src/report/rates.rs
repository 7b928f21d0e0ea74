//! Bar charts of rates in SVG: several measures of several models side by side, each with its confidence interval.

use std::fmt::Write;

use super::drawing;
use super::markup::escape;
use crate::judge::Rate;

/// The rates of one model.
#[derive(Debug, Clone, PartialEq)]
pub struct RateRow {
    /// The name of the model.
    pub label: String,
    /// One entry a measure. A rate of no answers is not drawn.
    pub rates: Vec<Rate>,
}

const LABELS: f64 = 230.0;
const PANEL: f64 = 220.0;
const GAP: f64 = 40.0;
const TOP: f64 = 64.0;
const ROW: f64 = 26.0;

/// Draws one panel a measure, from 0 to 100 %, with one bar a model. `id` must be unique in the page.
///
/// # Panics
/// If `id` has other characters than ASCII letters, digits and hyphens, or if a row has not one entry a measure.
pub fn rates_svg(id: &str, title: &str, measures: &[&str], rows: &[RateRow]) -> String {
    let (width, bottom) = (LABELS + (PANEL + GAP) * measures.len() as f64, TOP + ROW * rows.len() as f64);
    let height = bottom + 28.0;
    let mut out = drawing::open(id, title, &description(measures, rows), [width, height], 8.0);
    for (i, row) in rows.iter().enumerate() {
        assert_eq!(row.rates.len(), measures.len(), "rates of {:?}", row.label);
        let y = TOP + ROW * (i as f64 + 0.5) + 4.0;
        let _ = writeln!(out, "<text x=\"8\" y=\"{y:.1}\">{}</text>", escape(&row.label));
    }
    for (j, measure) in measures.iter().enumerate() {
        let left = LABELS + (PANEL + GAP) * j as f64;
        let _ = writeln!(out, "<text x=\"{left}\" y=\"48\" font-weight=\"bold\">{}</text>", escape(measure));
        for percent in [0, 25, 50, 75, 100] {
            let x = left + PANEL * f64::from(percent) / 100.0;
            let _ = writeln!(
                out,
                "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{TOP}\" y2=\"{bottom}\" class=\"grid\" stroke=\"#dddddd\"/>\n\
                 <text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\" font-size=\"11\">{percent} %</text>",
                bottom + 16.0
            );
        }
        for (i, row) in rows.iter().enumerate() {
            if row.rates[j].rate.is_some() {
                let what = escape(&format!("{}, {}", row.label, in_words(measure, &row.rates[j])));
                bar(&mut out, left, TOP + ROW * i as f64, &what, &row.rates[j]);
            }
        }
    }
    out + "</svg>\n"
}

/// One bar with a whisker from end to end of the interval. `what` is escaped.
fn bar(out: &mut String, left: f64, top: f64, what: &str, rate: &Rate) {
    let x = |share: f64| left + PANEL * share.clamp(0.0, 1.0);
    let [low, high] = rate.interval.map(x);
    let middle = top + ROW / 2.0;
    let _ = writeln!(
        out,
        "<g class=\"bars\">\n\
         <rect x=\"{left:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"14\" fill=\"#56b4e9\"/>\n\
         <g stroke=\"#000000\">\n\
         <line class=\"ink\" x1=\"{low:.1}\" x2=\"{high:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\"/>\n\
         <line class=\"ink\" x1=\"{low:.1}\" x2=\"{low:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>\n\
         <line class=\"ink\" x1=\"{high:.1}\" x2=\"{high:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>\n</g>\n\
         <rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{PANEL:.1}\" height=\"{ROW:.1}\" fill-opacity=\"0\"><title>{what}</title></rect>\n\
         </g>",
        middle - 7.0,
        x(rate.rate.unwrap_or_default()) - left,
        middle - 4.0,
        middle + 4.0,
        middle - 4.0,
        middle + 4.0,
    );
}

/// `refused: 3 of 120 (0.9 to 7.1 %)`.
fn in_words(measure: &str, rate: &Rate) -> String {
    if rate.rate.is_none() {
        return format!("{measure}: not measured");
    }
    let [low, high] = rate.interval.map(|x| 100.0 * x);
    format!("{measure}: {} of {} ({low:.1} to {high:.1} %)", rate.hits, rate.of)
}

/// The text alternative: every rate with its interval.
fn description(measures: &[&str], rows: &[RateRow]) -> String {
    let of_row = |row: &RateRow| {
        let rates = measures.iter().zip(&row.rates).map(|(measure, rate)| in_words(measure, rate));
        format!("{}: {}", row.label, rates.collect::<Vec<_>>().join(", "))
    };
    rows.iter().map(of_row).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::super::markup::tests::assert_well_formed;
    use super::*;

    #[test]
    fn bars_and_text_alternative() {
        let rate = |hits: usize, of: usize| Rate::of((0..of).map(|i| i < hits));
        let rows = [
            RateRow { label: "before <&>".into(), rates: vec![rate(0, 120), rate(0, 0)] },
            RateRow { label: "after".into(), rates: vec![rate(60, 120), rate(120, 120)] },
        ];
        let svg = rates_svg("outcome", "Outcomes", &["refused", "correct"], &rows);
        assert_well_formed(&svg);
        assert_eq!(svg.matches("height=\"14\"").count(), 3, "no bar where nothing was measured");
        assert!(svg.contains("<title>after, refused: 60 of 120 (41.2 to 58.8 %)</title>"), "{svg}");
        assert!(svg.contains("width=\"110.0\" height=\"14\""), "half of the panel: {svg}");
        assert!(
            svg.contains("before &lt;&amp;&gt;: refused: 0 of 120 (0.0 to 3.1 %), correct: not measured; after"),
            "{svg}"
        );
    }
}
