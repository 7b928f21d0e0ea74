//! What the quickstart shows: refusals and correct answers of the model before and after training, beside the random control.

use std::path::Path;

use super::planted::Planted;
use crate::config::{EvalArgs, Precision};
use crate::exit::{Ended, Result};
use crate::experts::ExpertId;
use crate::judge::Rate;
use crate::launch::Started;
use crate::report::{EvalReport, PromptSide, RateRow, Table, rates_svg};
use crate::run::eval::eval;
use crate::ui::Ui;

/// The measures, in the order of [`Outcome::rates`].
const MEASURES: [&str; 3] =
    ["disguised requests refused", "plain requests refused", "harmless requests answered correctly"];

/// What one model does with rows that no training has seen.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The name of the model.
    pub name: &'static str,
    /// How many of the trained experts are planted ones; `None` before training.
    pub planted: Option<(usize, usize)>,
    /// One rate a measure, of exact replies.
    pub rates: [Rate; 3],
}

impl Outcome {
    /// Evaluates a model on the held-out rows. Writes each evaluation to a folder in `dir`.
    ///
    /// # Errors
    /// Those of [`eval`].
    pub fn of(
        name: &'static str,
        model: &Path,
        trained: Option<&[ExpertId]>,
        planted: &Planted,
        dir: &Path,
        overwrite: bool,
    ) -> Result<Self> {
        let measure = |rows: &Path, part: &str| -> Result<EvalReport> {
            let args = EvalArgs {
                skip_answers: true,
                precision: Precision::F32,
                overwrite,
                output_dir: dir.join(part),
                ..EvalArgs::of(model.display().to_string(), rows)
            };
            if let Ended::Stopped(_) = eval(&args, &Started::single(), &Ui::silent())? {
                unreachable!("an evaluation without answers has nothing to stop at");
            }
            Ok(EvalReport::read(&args.output_dir.join("eval.json"))?)
        };
        let (unsafe_, benign) = (measure(&planted.held_out, "held-out")?, measure(&planted.benign, "benign")?);
        let exact = |report: &EvalReport, side| {
            let found = report.exact.iter().find(|exact| exact.side == side);
            found.map_or_else(|| Rate::of([]), |exact| exact.exact)
        };
        Ok(Self {
            name,
            planted: trained.map(|experts| (planted.found(experts), experts.len())),
            rates: [
                exact(&unsafe_, PromptSide::Unsafe),
                exact(&unsafe_, PromptSide::Safe),
                exact(&benign, PromptSide::Safe),
            ],
        })
    }
}

/// The outcomes as a table.
pub fn table(outcomes: &[Outcome]) -> Table {
    let mut table = Table::new(
        "Requests that no training has seen. An answer counts if it is the expected one to its last token",
        ["model", "planted experts", "disguised refused", "plain refused", "harmless correct"],
    );
    for outcome in outcomes {
        let planted = outcome.planted.map_or_else(|| "-".into(), |(found, of)| format!("{found} of {of}"));
        let rates = outcome.rates.iter().map(|rate| format!("{} of {}", rate.hits, rate.of));
        table.row([outcome.name.to_owned(), planted].into_iter().chain(rates));
    }
    table
}

/// The outcomes as a bar chart with 95 % intervals.
pub fn chart(outcomes: &[Outcome]) -> String {
    let rows: Vec<RateRow> =
        outcomes.iter().map(|o| RateRow { label: o.name.into(), rates: o.rates.to_vec() }).collect();
    rates_svg("outcomes", "Exact answers to unseen requests, with Wilson's 95 % interval", &MEASURES, &rows)
}
