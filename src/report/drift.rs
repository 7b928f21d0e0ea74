//! Tables of how far trained models have moved from the original one on the retain rows.

use super::metadata::RetentionLog;
use super::table::Table;

/// By run and round, and by layer after the last round. `runs`: the names of runs with retain rows.
pub fn drift_tables(runs: &[(String, RetentionLog)]) -> Vec<Table> {
    let percent = |share: f64| format!("{:.2} %", 100.0 * share);
    let mut table = Table::new(
        "Distance from the original model on the retain rows, before the first round and after each",
        [
            "run",
            "after round",
            "rows",
            "KL",
            "same most probable token",
            "cross-entropy",
            "KL of the routing",
            "same experts",
        ],
    );
    let mut tables = Vec::new();
    for (name, log) in runs {
        for (round, drift) in log.drift.iter().enumerate() {
            table.row([
                name.clone(),
                if round == 0 { "-".into() } else { round.to_string() },
                log.rows.to_string(),
                format!("{:.6}", drift.kl),
                percent(drift.top1_agreement),
                format!("{:.4}", drift.ce_loss),
                format!("{:.6}", drift.routing_kl),
                percent(drift.expert_overlap),
            ]);
        }
        let Some(last) = log.drift.last().filter(|_| log.drift.len() > 1) else { continue };
        let caption = format!("{name}: routing of the retain rows after the last round, against the original model");
        let mut by_layer = Table::new(caption, ["layer", "KL of the routing", "same experts"]);
        for layer in &last.layers {
            by_layer.row([layer.layer.to_string(), format!("{:.6}", layer.routing_kl), percent(layer.expert_overlap)]);
        }
        tables.push(by_layer);
    }
    tables.insert(0, table);
    tables.retain(|table| !table.rows.is_empty());
    tables
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::train::{Drift, LayerDrift};

    #[test]
    fn a_row_a_round_and_a_table_by_layer() {
        let drift = |kl: f64| Drift {
            kl,
            top1_agreement: 1.0 - kl,
            ce_loss: 2.0,
            routing_kl: kl / 2.0,
            expert_overlap: 0.75,
            layers: vec![LayerDrift { layer: 3, routing_kl: kl / 2.0, expert_overlap: 0.75 }],
        };
        let log = |rounds: usize| RetentionLog {
            rows: 7,
            loss_tokens: 30,
            tokens: 90,
            drift: (0..=rounds).map(|round| drift(round as f64 / 8.0)).collect(),
        };
        let tables = drift_tables(&[("a".into(), log(2)), ("b".into(), log(0))]);
        assert_eq!(tables.len(), 2);
        let row = ["a", "2", "7", "0.250000", "75.00 %", "2.0000", "0.125000", "75.00 %"];
        assert_eq!((tables[0].rows.len(), &tables[0].rows[2][..]), (4, &row.map(String::from)[..]));
        assert_eq!(tables[1].rows, [["3", "0.125000", "75.00 %"]]);
        assert!(drift_tables(&[]).is_empty());
    }
}
