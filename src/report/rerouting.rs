//! Evaluations of a tuned model with the routing or the routers of the model before training: the share of the gain that is
//! re-routing.

use super::{EvalReport, PromptSide, Table};

/// Rates on unsafe prompts, by what counts: each phrase list, and exact replies.
fn rates(eval: &EvalReport) -> impl Iterator<Item = (String, f64)> + '_ {
    let unsafe_ = |side| side == PromptSide::Unsafe;
    let lists = eval.refusals.iter().filter(move |r| unsafe_(r.side)).map(|r| (r.list.clone(), r.rate));
    let exact = eval.exact.iter().filter(move |e| unsafe_(e.side));
    lists.chain(exact.filter_map(|e| Some(("exact replies".to_owned(), e.exact.rate?))))
}

/// For each evaluation with another model's routing, given together with those of the same model with its own routing and of
/// that other model, on the same data: the rates of refusals of the three, and the share of the gain that is lost,
/// (tuned - with the other routing) / (tuned - base). A table without rows, if no three evaluations belong together.
pub fn rerouting_table(evals: &[(String, EvalReport)]) -> Table {
    let mut table = Table::new(
        "Refusals of unsafe prompts with the routing of the model before training. The share of the gain that is lost was \
         re-routing, not learning",
        ["model, measure", "base", "tuned", "tuned, other routing", "share of the gain lost"],
    );
    for (name, other) in evals {
        let Some(routing) = &other.model.other_routing else { continue };
        let own = |sha: &str| {
            let mut own = evals.iter().map(|(_, eval)| eval);
            own.find(|eval| {
                eval.model.other_routing.is_none()
                    && eval.model.sha == sha
                    && (&eval.dataset_path, eval.rows) == (&other.dataset_path, other.rows)
                    && eval.sampling == other.sampling
            })
        };
        let (Some(base), Some(tuned)) = (own(&routing.sha), own(&other.model.sha)) else { continue };
        for (what, restored) in rates(other) {
            let of = |eval| rates(eval).find(|(list, _)| *list == what).map(|(_, rate)| rate);
            let (Some(base), Some(tuned)) = (of(base), of(tuned)) else { continue };
            let percent = |rate: f64| format!("{:.1} %", 100.0 * rate);
            let lost = if tuned > base { percent((tuned - restored) / (tuned - base)) } else { "no gain".into() };
            let name = format!("{name}, {}, {what}", routing.from.phrase());
            table.row([name, percent(base), percent(tuned), percent(restored), lost]);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use serde_json::json;

    use super::*;
    use crate::report::{OtherRouting, RoutingFrom};

    fn eval(sha: &str, rate: f64, other: Option<&str>) -> (String, EvalReport) {
        let rate =
            json!({"list": "gcg/1", "side": "unsafe", "refused": 0, "answers": 10, "rate": rate, "interval": [0, 1]});
        let mut report: EvalReport = serde_json::from_value(json!({
            "schema": "moewarden.eval/1", "model": {"path": "m", "sha": sha, "variant": "base"}, "dataset_path": "d", "rows": 10,
            "sampling": {"temperature": 0.0, "top_p": 1.0, "max_new_tokens": 8, "seed": 1},
            "ce_unsafe": {"mean": 1.0, "tokens": 9}, "ce_safe": {"mean": 1.0, "tokens": 9}, "refusals": [rate],
            "routing": {"divergence_by_layer": [], "risk_difference_top": []}, "seconds": 1.0,
        }))
        .unwrap();
        let from = RoutingFrom::Routers;
        report.model.other_routing = other.map(|sha| OtherRouting { from, path: PathBuf::from("b"), sha: sha.into() });
        ("e".into(), report)
    }

    #[test]
    fn the_share_of_the_gain_that_needs_the_trained_routers() {
        let evals = [eval("base", 0.2, None), eval("tuned", 0.8, None), eval("tuned", 0.35, Some("base"))];
        let row = ["e, restored routers, gcg/1", "20.0 %", "80.0 %", "35.0 %", "75.0 %"].map(str::to_owned).to_vec();
        assert_eq!(rerouting_table(&evals).rows, [row]);
        let no_gain = [eval("base", 0.8, None), eval("tuned", 0.8, None), eval("tuned", 0.35, Some("base"))];
        assert_eq!(rerouting_table(&no_gain).rows[0][4], "no gain");
        let mut other_rows = evals.clone();
        other_rows[0].1.rows = 9;
        assert!(rerouting_table(&other_rows).rows.is_empty(), "the base was evaluated on other rows");
        assert!(rerouting_table(&evals[1..]).rows.is_empty());
    }
}
