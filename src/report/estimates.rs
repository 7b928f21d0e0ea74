//! Drawings of measures with their 95 % intervals: by variant, and against a quantity that variants differ in.

use std::fmt::Write;

use super::comparison::{Estimate, MeasureUnit};
use super::curve::{Axis, Look, tick_label};
use super::drawing;
use super::markup::escape;

/// The width of a drawing: two fit beside each other in a wide window, one in a narrow one.
const WIDTH: f64 = 452.0;
const LEFT: f64 = 44.0;
const RIGHT: f64 = WIDTH - 24.0;
const TOP: f64 = 40.0;
const ROW: f64 = 34.0;
const HEIGHT: f64 = 190.0;
/// Characters of a label that fit into the width, of a row and in the key.
const LABEL: usize = 58;
const KEY: usize = 50;

/// A number with the name of what it is measured of.
#[derive(Debug, Clone, PartialEq)]
pub struct Named {
    /// The name.
    pub label: String,
    /// The number.
    pub estimate: Estimate,
}

/// Points of one colour, connected in their order.
#[derive(Debug, Clone, PartialEq)]
pub struct Group {
    /// Its name in the legend.
    pub label: String,
    /// Position on the horizontal axis, and number.
    pub points: Vec<(f64, Named)>,
}

/// The horizontal axis.
#[derive(Debug, Clone, PartialEq)]
pub struct Positions {
    /// What it shows.
    pub label: String,
    /// Positions with their labels, ascending.
    pub ticks: Vec<(f64, String)>,
}

/// Draws one dot with a whisker for each row, on a common horizontal axis, which for shares is 0 to 100 %. `reference`: where a
/// dashed line is drawn. `None` without rows. `id` must be unique in the page.
///
/// # Panics
/// If `id` has other characters than ASCII letters, digits and hyphens.
pub fn dots_svg(id: &str, title: &str, unit: MeasureUnit, rows: &[Named], reference: Option<f64>) -> Option<String> {
    let axis = axis(unit, rows.iter().map(|row| &row.estimate))?;
    let x = |value: f64| LEFT + (RIGHT - LEFT) * axis.fraction(value).clamp(0.0, 1.0);
    let bottom = TOP + ROW * rows.len() as f64;
    let mut out = drawing::open(id, title, &description(unit, rows), [WIDTH, bottom + 28.0], 8.0);
    for tick in ticks(unit, &axis) {
        let at = x(tick);
        let _ = writeln!(
            out,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{bottom}\" class=\"grid\" stroke=\"#dddddd\"/>\n\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\" font-size=\"11\">{}</text>",
            bottom + 16.0,
            in_unit(unit, tick, false)
        );
    }
    if let Some(reference) = reference {
        let at = x(reference);
        let _ = writeln!(
            out,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{TOP}\" y2=\"{bottom}\" class=\"ink\" stroke=\"#000000\" stroke-dasharray=\"2 3\"/>"
        );
    }
    for (i, row) in rows.iter().enumerate() {
        let y = TOP + ROW * i as f64;
        let _ = writeln!(
            out,
            "<text class=\"halo\" stroke=\"#ffffff\" stroke-width=\"3\" paint-order=\"stroke\" x=\"8\" y=\"{:.1}\">{}</text>",
            y + 13.0,
            escape(&shortened(&row.label, LABEL))
        );
        let [low, high] = row.estimate.interval.unwrap_or([row.estimate.value; 2]).map(x);
        let middle = y + 23.0;
        let _ = writeln!(
            out,
            "<g class=\"bars\">\n<line x1=\"{low:.1}\" x2=\"{high:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\" stroke=\"{}\" \
             stroke-width=\"2\"/>\n<circle cx=\"{:.1}\" cy=\"{middle:.1}\" r=\"4\" fill=\"{}\"/>\n\
             <rect x=\"0\" y=\"{y:.1}\" width=\"{WIDTH}\" height=\"{ROW}\" fill-opacity=\"0\"><title>{}</title></rect>\n</g>",
            Look::of(0).colour,
            x(row.estimate.value),
            Look::of(0).colour,
            escape(&in_words(unit, row)),
        );
    }
    Some(out + "</svg>\n")
}

/// Draws groups of numbers with whiskers over positions. `None` without points. `id` must be unique in the page.
///
/// # Panics
/// If `id` has other characters than ASCII letters, digits and hyphens.
pub fn points_svg(id: &str, title: &str, unit: MeasureUnit, positions: &Positions, groups: &[Group]) -> Option<String> {
    let all = || groups.iter().flat_map(|group| &group.points);
    let y_axis = axis(unit, all().map(|(_, named)| &named.estimate))?;
    let x_axis = Axis::spanning(positions.ticks.iter().map(|(at, _)| *at).chain(all().map(|(at, _)| *at)))?;
    let bottom = TOP + HEIGHT;
    // A margin, so that whiskers do not lie on the axis.
    let x = |at: f64| LEFT + MOST_APART + 2.0 + (RIGHT - LEFT - 2.0 * MOST_APART - 4.0) * x_axis.fraction(at);
    let y = |value: f64| bottom - HEIGHT * y_axis.fraction(value).clamp(0.0, 1.0);
    let rows: Vec<Named> = all().map(|(_, named)| named.clone()).collect();
    let labels = tick_rows(&positions.ticks, x);
    let rows_of_labels = 1 + labels.iter().flatten().max().copied().unwrap_or(0);
    let below = bottom + TICK_ROW * (rows_of_labels - 1) as f64;
    let height = below + 46.0 + 18.0 * groups.len() as f64;
    let mut out = drawing::open(id, title, &description(unit, &rows), [WIDTH, height], 8.0);
    for tick in ticks(unit, &y_axis) {
        let at = y(tick);
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{at:.1}\" y2=\"{at:.1}\" class=\"grid\" stroke=\"#dddddd\"/>\n\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\" font-size=\"11\">{}</text>",
            LEFT - 4.0,
            at + 4.0,
            in_unit(unit, tick, false)
        );
    }
    for ((at, label), row) in positions.ticks.iter().zip(labels) {
        let at = x(*at);
        let _ = writeln!(
            out,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{bottom}\" y2=\"{}\" class=\"ink\" stroke=\"#000000\"/>",
            bottom + 4.0
        );
        if let Some(row) = row {
            let _ = writeln!(
                out,
                "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\" font-size=\"11\">{}</text>",
                bottom + 15.0 + TICK_ROW * row as f64,
                escape(label)
            );
        }
    }
    let _ = writeln!(
        out,
        "<text x=\"{RIGHT}\" y=\"{:.1}\" text-anchor=\"end\" font-size=\"11\">{}</text>",
        below + 31.0,
        escape(&positions.label)
    );
    for (i, group) in groups.iter().enumerate() {
        let look = Look::of(i);
        points(&mut out, &look, group, unit, |at| beside(groups, i, at, x), y);
        look.key_of_points(&mut out, &shortened(&group.label, KEY), below + 46.0 + 18.0 * i as f64);
    }
    Some(out + "</svg>\n")
}

/// The farthest of its position that a point lies, in pixels.
const MOST_APART: f64 = 14.0;

/// Where group `i` has its point at this position. Groups that share one lie beside each other, nearer than half of the way to the
/// next position: the order of points is that of the numbers.
fn beside(groups: &[Group], i: usize, at: f64, x: impl Fn(f64) -> f64) -> f64 {
    let has = |group: &Group| group.points.iter().any(|(other, _)| *other == at);
    let sharing: Vec<usize> = (0..groups.len()).filter(|&group| has(&groups[group])).collect();
    let others = groups.iter().flat_map(|group| &group.points).map(|(other, _)| (x(*other) - x(at)).abs());
    let next = others.filter(|gap| *gap > 0.0).fold(f64::INFINITY, f64::min);
    let steps = sharing.len().saturating_sub(1).max(1) as f64;
    let step = (2.0 * MOST_APART.min(0.45 * next) / steps).min(5.0);
    let place = sharing.iter().position(|&group| group == i).unwrap_or(0) as f64;
    x(at) + step * (place - sharing.len().saturating_sub(1) as f64 / 2.0)
}

/// The height of a row of tick labels, and how many there are at most.
const TICK_ROW: f64 = 13.0;
const TICK_ROWS: usize = 3;

/// The row in which each label runs into no other; `None` where it does in all: values show under the pointer.
fn tick_rows(ticks: &[(f64, String)], x: impl Fn(f64) -> f64) -> Vec<Option<usize>> {
    let mut free = [f64::NEG_INFINITY; TICK_ROWS];
    let row = |(at, label): &(f64, String)| {
        let half = 3.4 * label.chars().count() as f64;
        let row = free.iter().position(|free| x(*at) - half >= *free)?;
        free[row] = x(*at) + half + 6.0;
        Some(row)
    };
    ticks.iter().map(row).collect()
}

/// One group: the line, then whiskers and dots.
fn points(
    out: &mut String,
    look: &Look,
    group: &Group,
    unit: MeasureUnit,
    x: impl Fn(f64) -> f64,
    y: impl Fn(f64) -> f64,
) {
    let Look { colour, class, dashes, .. } = look;
    if group.points.len() > 1 {
        let path = group.points.iter().map(|(at, named)| format!("{:.1},{:.1}", x(*at), y(named.estimate.value)));
        let _ = writeln!(
            out,
            "<polyline class=\"{class}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1\"{dashes} points=\"{}\"/>",
            path.collect::<Vec<_>>().join(" ")
        );
    }
    for (at, named) in &group.points {
        let [low, high] = named.estimate.interval.unwrap_or([named.estimate.value; 2]).map(&y);
        let at = x(*at);
        let _ = writeln!(
            out,
            "<line class=\"{class}\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{low:.1}\" y2=\"{high:.1}\" stroke=\"{colour}\" stroke-width=\"1.5\"/>"
        );
        *out += &look.mark([at, y(named.estimate.value)], &in_words(unit, named));
    }
}

/// The axis of the numbers: all shares, or from 0 to the largest end of an interval.
fn axis<'e>(unit: MeasureUnit, estimates: impl Iterator<Item = &'e Estimate>) -> Option<Axis> {
    let ends = estimates.flat_map(|e| e.interval.unwrap_or([e.value; 2])).filter(|x| x.is_finite());
    let ends: Vec<f64> = ends.collect();
    match unit {
        _ if ends.is_empty() => None,
        MeasureUnit::Share => Axis::spanning([0.0, 1.0].into_iter()),
        MeasureUnit::Nats => Axis::spanning(ends.into_iter().chain([0.0])),
    }
}

fn ticks(unit: MeasureUnit, axis: &Axis) -> Vec<f64> {
    match unit {
        MeasureUnit::Share => vec![0.0, 0.25, 0.5, 0.75, 1.0],
        MeasureUnit::Nats => {
            let ticks = axis.ticks();
            let step = ticks.len().div_ceil(5);
            ticks.into_iter().step_by(step).collect()
        }
    }
}

/// A number in its unit: `25 %`, `0.0125`.
fn in_unit(unit: MeasureUnit, value: f64, exact: bool) -> String {
    match (unit, exact) {
        (MeasureUnit::Share, false) => format!("{:.0} %", 100.0 * value),
        (MeasureUnit::Share, true) => format!("{:.1} %", 100.0 * value),
        // The margin has room for six characters.
        (MeasureUnit::Nats, false) if value != 0.0 && value.abs() < 1e-3 => format!("{value:.1e}").replace(".0e", "e"),
        (MeasureUnit::Nats, false) => tick_label(value),
        (MeasureUnit::Nats, true) if value != 0.0 && value.abs() < 1e-3 => format!("{value:.2e}"),
        (MeasureUnit::Nats, true) => format!("{value:.5}"),
    }
}

impl Estimate {
    /// `12.5 % [7.1, 20.9]`, `0.01250 [0.01101, 0.01399]`, `1.25e-6 [0.00000, 2.50e-6]`.
    pub fn describe(&self, unit: MeasureUnit) -> String {
        let end =
            |x: f64| if unit == MeasureUnit::Share { format!("{:.1}", 100.0 * x) } else { in_unit(unit, x, true) };
        let interval = self.interval.map_or_else(String::new, |ends| format!(" [{}, {}]", end(ends[0]), end(ends[1])));
        in_unit(unit, self.value, true) + &interval
    }
}

fn in_words(unit: MeasureUnit, row: &Named) -> String {
    format!("{}: {} of {}", row.label, row.estimate.describe(unit), row.estimate.of)
}

/// The text alternative: every number with its interval.
fn description(unit: MeasureUnit, rows: &[Named]) -> String {
    rows.iter().map(|row| in_words(unit, row)).collect::<Vec<_>>().join("; ")
}

fn shortened(label: &str, most: usize) -> String {
    if label.chars().count() <= most {
        return label.to_owned();
    }
    label.chars().take(most - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::super::markup::tests::assert_well_formed;
    use super::*;

    fn share(label: &str, value: f64) -> Named {
        let estimate = Estimate { value, of: 40, interval: Some([value / 2.0, (value + 1.0) / 2.0]) };
        Named { label: label.into(), estimate }
    }

    #[test]
    fn every_row_has_its_dot_and_whisker() {
        let rows = [share("before <&>", 0.0), share("after", 0.5)];
        let svg = dots_svg("refused", "Refused", MeasureUnit::Share, &rows, Some(0.0)).unwrap();
        assert_well_formed(&svg);
        // 44 to 428 pixels are 0 to 100 %.
        assert!(svg.contains("cx=\"236.0\"") && svg.contains("x1=\"140.0\" x2=\"332.0\""), "{svg}");
        assert!(svg.contains("<title>after: 50.0 % [25.0, 75.0] of 40</title>"), "{svg}");
        assert!(svg.contains("before &lt;&amp;&gt;: 0.0 % [0.0, 50.0] of 40; after"), "{svg}");
        assert_eq!(dots_svg("none", "", MeasureUnit::Share, &[], None), None);
    }

    #[test]
    fn small_means_keep_their_digits() {
        let describe = |value: f64, interval| Estimate { value, of: 9, interval }.describe(MeasureUnit::Nats);
        assert_eq!(describe(-1.25e-6, Some([-2.5e-6, 0.0])), "-1.25e-6 [-2.50e-6, 0.00000]");
        assert_eq!(describe(0.0125, None), "0.01250");
        assert_eq!(
            [3.0 * 1e-5, 2.5e-4, 0.002, 0.0].map(|x| in_unit(MeasureUnit::Nats, x, false)),
            ["3e-5", "2.5e-4", "0.002", "0"]
        );
    }

    #[test]
    fn groups_lie_over_their_positions() {
        let drift =
            |value: f64| Named { label: format!("drift {value}"), estimate: Estimate { value, of: 9, interval: None } };
        let positions = Positions {
            label: "expert-lr".into(),
            ticks: [(-5.0, "1e-5"), (-4.0, "1e-4"), (-3.995, "1.01e-4"), (-3.99, "1.02e-4"), (-3.98, "1.05e-4")]
                .map(|(at, label)| (at, label.to_owned()))
                .to_vec(),
        };
        let groups = [
            Group { label: "gradient".into(), points: vec![(-5.0, drift(0.1)), (-4.0, drift(0.4))] },
            Group { label: "x".repeat(80), points: vec![(-4.0, drift(0.2))] },
        ];
        let svg = points_svg("lr", "Drift", MeasureUnit::Nats, &positions, &groups).unwrap();
        assert_well_formed(&svg);
        assert_eq!((svg.matches("<polyline").count(), svg.matches("class=\"point ").count()), (1, 3));
        let shown: Vec<bool> = positions.ticks.iter().map(|(_, label)| svg.contains(&format!(">{label}<"))).collect();
        assert_eq!(shown, [true, true, true, true, false], "in three rows, and not in each other");
        assert_eq!(svg.matches("class=\"ink\" stroke=\"#000000\"/>").count(), 5, "every position has its mark");
        assert!(svg.contains("drift 0.4: 0.40000 of 9") && svg.contains('…'));
        assert_eq!(points_svg("none", "", MeasureUnit::Nats, &positions, &[]), None);
    }

    #[test]
    fn points_lie_in_the_order_of_their_numbers_and_apart() {
        let x = |at: f64| 100.0 * at;
        // 8 pixels from each other, as 7.61 % is from 8.46 %; each shared by all groups, and one alone.
        let at = [1.0, 1.08, 3.0];
        let group = |i: usize| Group {
            label: i.to_string(),
            points: at[..if i == 0 { 3 } else { 2 }].iter().map(|at| (*at, share("", 0.5))).collect(),
        };
        let groups: Vec<Group> = (0..11).map(group).collect();
        let places = |at: f64| (0..groups.len()).map(|i| beside(&groups, i, at, x)).collect::<Vec<_>>();
        let both = [places(1.0), places(1.08)].concat();
        assert!(both.windows(2).all(|pair| pair[1] - pair[0] > 0.5), "{both:?}");
        assert_eq!(beside(&groups, 0, 3.0, x), 300.0);
        assert!(both.iter().all(|place| (100.0 - MOST_APART..=108.0 + MOST_APART).contains(place)));
        // Points without a line are told apart, too: no two of twenty groups look alike.
        let looks: std::collections::BTreeSet<String> = (0..20).map(|i| Look::of(i).mark([0.0; 2], "")).collect();
        assert_eq!(looks.len(), 20);
    }
}
