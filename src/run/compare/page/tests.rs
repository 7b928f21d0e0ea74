use super::*;
use crate::report::{COMPARE_SCHEMA, Contrast, PairedTest};

fn report(variants: Vec<VariantReport>, tests: Vec<PairedTest>) -> CompareReport {
    CompareReport {
        schema: COMPARE_SCHEMA.into(),
        model_name: String::new(),
        dataset_path: String::new(),
        plan: String::new(),
        original: BTreeMap::new(),
        variants,
        cut_off: Vec::new(),
        lower_bounds: Vec::new(),
        tests,
        selections: Vec::new(),
        overlaps: Vec::new(),
    }
}

fn content(report: &CompareReport) -> Content<'_> {
    let shown = Shown { base: BTreeMap::new(), notes: Vec::new() };
    Content { report, measures: &[], selections: &[], runs: &[], shown }
}

#[test]
fn every_significant_test_is_listed() {
    let listed = |significant: usize, all: usize| {
        let test = |i: usize| PairedTest {
            contrast: Contrast { factor: "method".into(), a: "a".into(), b: format!("b{i}") },
            measure: "m".into(),
            items: 9,
            alone: Some([0, 9]),
            difference: 1.0,
            interval: None,
            p: 1e-6,
            p_adjusted: if i < significant { 0.01 } else { 1.0 },
        };
        let report = report(Vec::new(), (0..all).map(test).collect());
        let content = content(&report);
        let count = format!("{significant} of {all} paired tests are significant at 0.05");
        assert!(content.num_significant().starts_with(&count));
        let table = content.tests();
        assert_eq!(table.caption.contains("the others are in compare.json"), table.rows.len() < all);
        table.rows.len()
    };
    assert_eq!([listed(100, 856), listed(9, 856), listed(0, 7), listed(70, 70)], [100, 60, 7, 70]);
}

/// The names of the groups over `expert-lr` of variants with these methods, rates and weights.
fn groups(variants: &[(&str, u32, u32)]) -> Vec<(String, usize)> {
    let variant = |(method, rate, weight): &(&str, u32, u32)| VariantReport {
        name: format!("{method} {rate} {weight}"),
        folder: String::new(),
        ablation: "combined".into(),
        method: Some((*method).to_owned()),
        settings: BTreeMap::from([("expert-lr".to_owned(), (*rate).into()), ("weight".into(), (*weight).into())]),
        result: None,
        measures: BTreeMap::new(),
        error: None,
    };
    let report = report(variants.iter().map(variant).collect(), Vec::new());
    content(&report).groups_of("expert-lr").into_iter().map(|(name, group)| (name, group.len())).collect()
}

#[test]
fn an_axis_is_logarithmic_from_a_factor_of_ten_on() {
    assert!(span_a_magnitude(&[3e-5, 1e-4, 3e-4]) && span_a_magnitude(&[0.01, 1.0]));
    assert!(!span_a_magnitude(&[1.0, 2.0, 9.0]) && !span_a_magnitude(&[0.0, 1.0]) && !span_a_magnitude(&[]));
}

#[test]
fn groups_are_named_by_what_tells_them_apart() {
    let one_at_a_time =
        [("gradient", 1, 1), ("gradient", 1, 2), ("gradient", 2, 1), ("random", 1, 1), ("random", 2, 1)];
    let named = |names: &[&str]| names.iter().map(|name| ((*name).to_owned(), 2)).collect::<Vec<_>>();
    assert_eq!(groups(&one_at_a_time), named(&["gradient combined", "random combined"]));
    let grid = [&one_at_a_time[..], &[("gradient", 2, 2)]].concat();
    assert_eq!(
        groups(&grid),
        named(&["gradient combined, weight=1", "gradient combined, weight=2", "random combined"])
    );
}
