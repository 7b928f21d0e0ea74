//! The causal check on one rank: own answers, the untouched model, the selection, the random sets, the verdict.

use std::collections::BTreeSet;
use std::path::Path;

use crate::backend::Backend;
use crate::config::RunConfig;
use crate::data::{Dataset, Example, MicroBatch, Record};
use crate::exit::{self, Failure, Result, Stopped};
use crate::experts::ExpertId;
use crate::files;
use crate::judge::{Bounds, Evidence, Matching, RandomSets, Rate, SideEffect, Spread, permutation_p, verdict};
use crate::report::{ABLATION_SCHEMA, AblationReport, CausalRowCounts, OWN_REPLIES, PromptSide, RandomSet, write_json};
use crate::run::progress::Progress;
use crate::run::replies::{AskOptions, own_replies};
use crate::run::session::Session;
use crate::train::{CausalRows, Outcome, Replica, RowLosses, Switch, loads, with_experts_off};
use crate::ui::Ui;

/// The phrase list by which an own answer counts as a refusal.
const REFUSALS: &str = "opening/1";

/// A check to run.
pub struct CausalCheck<'a> {
    /// Model and rows.
    pub session: &'a Session,
    /// The file of benign rows; without it, the benign rows of the data file count.
    pub benign: Option<(&'a Path, &'a Dataset)>,
    /// The selection.
    pub selected: &'a BTreeSet<ExpertId>,
    /// Number of random sets, N.
    pub random_sets: usize,
    /// How experts are switched off.
    pub switch: Switch,
    /// What random sets have in common with the selection.
    pub matching: Matching,
    /// Seed of the random sets.
    pub seed: u64,
    /// Examples in a micro-batch.
    pub batch_size: usize,
    /// Maximum length of an own answer.
    pub max_new_tokens: usize,
}

/// How a check ended.
pub enum Judged {
    /// With a verdict.
    Report(Box<AblationReport>),
    /// A signal stopped it.
    Stopped(Stopped),
}

/// The benign rows of a data file: safe chat rows with a reply.
pub fn benign_rows(data: &Dataset) -> impl Iterator<Item = &Record> {
    data.records.iter().filter(|r| r.unsafe_prompt.is_none() && r.unsafe_reply.is_none() && r.safe_reply.is_some())
}

/// Writes `ablation.json` and `ablation.html`.
pub fn write(report: &AblationReport, config: &RunConfig) -> Result<()> {
    write_json(config.output_dir.join("ablation.json"), report)?;
    Ok(files::write(config.output_dir.join("ablation.html"), report.page())?)
}

impl CausalCheck<'_> {
    /// Runs the check; the same report on all ranks.
    pub fn run<B: Backend>(&self, replica: &mut Replica<B>, config: &RunConfig, ui: &Ui) -> Result<Judged> {
        let Some((mut rows, mut counts)) = self.rows(replica, config, ui)? else { return Ok(stopped()) };
        let none = BTreeSet::new();
        let before = Progress::new(ui, self.own_batches(&rows, replica, 1), "untouched model");
        replica.world.set_activity("measuring the untouched model");
        let mut untouched = self.measure(replica, &rows, &none, &before)?;
        let comply: Vec<bool> = untouched.margins().iter().map(|margin| *margin < 0.0).collect();
        counts.undecided = comply.iter().filter(|comply| !**comply).count();
        counts.comply = comply.len() - counts.undecided;
        rows.retain(&comply);
        untouched.retain(&comply);
        let loads = loads(replica, &rows, self.batch_size)?;
        let original = untouched.outcome(&untouched);

        let sets = RandomSets {
            selected: self.selected,
            loads: &loads,
            matching: self.matching,
            left: if self.switch == Switch::Off { replica.model().config.num_experts_per_tok } else { 0 },
            seed: self.seed,
        };
        let progress = Progress::new(ui, self.own_batches(&rows, replica, 1 + self.random_sets), "sets switched off");
        let off = self.measure(replica, &rows, self.selected, &progress)?;
        let selection = off.outcome(&untouched);
        let mut random = Vec::new();
        for index in 0..self.random_sets {
            let [stop] = replica.any([replica.stop.is_set()])?;
            if stop {
                return Ok(stopped());
            }
            replica.world.set_activity(&format!("measuring random set {} of {}", index + 1, self.random_sets));
            let set = sets.draw(index).map_err(|e| Failure::new(exit::CONFIG, format!("{e}: take --match layer")))?;
            let outcome = self.measure(replica, &rows, &set, &progress)?.outcome(&untouched);
            random.push(RandomSet { experts: set.into_iter().collect(), outcome });
        }
        let loads: Vec<f64> = self.selected.iter().map(|id| loads.get(*id).unwrap_or_default()).collect();
        Ok(Judged::Report(Box::new(self.report(config, counts, (original, selection), random, loads))))
    }

    fn report(
        &self,
        config: &RunConfig,
        rows: CausalRowCounts,
        (untouched, selection): (Outcome, Outcome),
        random: Vec<RandomSet>,
        loads: Vec<f64>,
    ) -> AblationReport {
        let gains: Vec<f64> = random.iter().map(|set| set.outcome.gain).collect();
        let switched: Vec<f64> = random.iter().filter_map(|set| set.outcome.prefer_refusal.rate).collect();
        let p = permutation_p(selection.gain, &gains);
        let shared = random.iter().flat_map(|set| &set.experts).filter(|id| self.selected.contains(id)).count();
        let random_prefer_refusal = Spread::of(&switched);
        let evidence = Evidence {
            rows: rows.comply,
            sets: random.len(),
            p,
            switched: selection.prefer_refusal.rate.unwrap_or_default(),
            switched_random: random_prefer_refusal.map_or(0.0, |spread| spread.mean),
            refusal_loss: [untouched.refusal_loss, selection.refusal_loss].map(Option::unwrap_or_default),
            benign: side_effect(&untouched, &selection, |o| (o.benign_loss, o.exact_benign)),
            safe: side_effect(&untouched, &selection, |o| (o.safe_loss, o.exact_safe)),
        };
        let (verdict, reasons) = verdict(&evidence);
        AblationReport {
            schema: ABLATION_SCHEMA.into(),
            model: config.model_name.clone(),
            dataset_path: config.dataset_path.clone(),
            benign_dataset_path: self.benign.map(|(path, _)| path.to_owned()),
            experts: self.selected.iter().copied().collect(),
            switch: self.switch,
            matching: self.matching,
            seed: self.seed,
            random_sets: random.len(),
            distinct_sets: random.iter().map(|set| &set.experts).collect::<BTreeSet<_>>().len(),
            overlap: shared as f64 / (random.len() * self.selected.len()).max(1) as f64,
            rows,
            verdict,
            reasons,
            bounds: Bounds::FIXED,
            p,
            untouched,
            selection,
            random_gain: Spread::of(&gains),
            random_prefer_refusal,
            loads,
            random,
        }
    }

    /// The rows of the check, with the model's own answers; rows whose own answer is empty or refuses are set aside.
    /// `None`: some rank was asked to stop.
    fn rows<B: Backend>(
        &self,
        replica: &Replica<B>,
        config: &RunConfig,
        ui: &Ui,
    ) -> Result<Option<(CausalRows, CausalRowCounts)>> {
        let data = &self.session.data;
        let ask = AskOptions {
            data,
            sides: &[PromptSide::Unsafe],
            max_new_tokens: self.max_new_tokens,
            batch_size: config.generation_batch_size,
            intervention: None,
            cache: Some(&config.output_dir.join(OWN_REPLIES)),
        };
        let Some(replies) = own_replies(self.session, replica, ask, ui)? else { return Ok(None) };
        let mut counts = CausalRowCounts::default();
        let mut rows = CausalRows::default();
        for reply in &replies {
            let record = &data.records[reply.record];
            let Some((prompt, refusal)) = prompt_and_refusal(record) else { continue };
            counts.unsafe_rows += 1;
            if reply.ids.is_empty() {
                counts.empty += 1;
            } else if reply.proxy.get(REFUSALS) == Some(&true) || begins_alike(&reply.ids, refusal) {
                counts.refuse += 1;
            } else {
                rows.refusals.push(refusal.clone());
                let loss = (0..prompt.len() + reply.ids.len()).map(|t| t >= prompt.len()).collect();
                rows.answers.push(Example { ids: [prompt, &reply.ids].concat(), loss });
            }
        }
        rows.benign =
            benign_rows(self.benign.map_or(data, |(_, benign)| benign)).filter_map(|r| r.safe_reply.clone()).collect();
        let pairs = data.records.iter().filter(|r| r.unsafe_reply.is_some());
        rows.safe = pairs.filter_map(|r| r.safe_reply.clone()).collect();
        (counts.benign, counts.safe) = (rows.benign.len(), rows.safe.len());
        Ok(Some((rows, counts)))
    }

    fn measure<B: Backend>(
        &self,
        replica: &mut Replica<B>,
        rows: &CausalRows,
        experts: &BTreeSet<ExpertId>,
        progress: &Progress<'_>,
    ) -> Result<RowLosses> {
        let step = |batch: &MicroBatch| progress.step(batch.ids.len(), "");
        with_experts_off(replica, rows, self.batch_size, (experts, self.switch), step)
    }

    /// Micro-batches of this rank in `times` measurements.
    fn own_batches<B: Backend>(&self, rows: &CausalRows, replica: &Replica<B>, times: usize) -> usize {
        times * rows.micro_batches(self.batch_size).div_ceil(replica.world.world_size())
    }
}

fn prompt_and_refusal(record: &Record) -> Option<(&[u32], &Example)> {
    let refusal = record.unsafe_reply.as_ref().filter(|reply| reply.loss.contains(&true))?;
    Some((record.unsafe_prompt.as_deref()?, refusal))
}

fn stopped() -> Judged {
    Judged::Stopped(Stopped::Lost("stopped by a signal: no verdict was reached".into()))
}

/// Whether the answer and the refusal begin with the same tokens, up to the end of the shorter one.
fn begins_alike(answer: &[u32], refusal: &Example) -> bool {
    let targets = refusal.ids.iter().zip(&refusal.loss).filter(|(_, loss)| **loss).map(|(id, _)| id);
    answer.iter().zip(targets).all(|(a, b)| a == b)
}

/// A side that should not change; `None` without rows.
fn side_effect(
    untouched: &Outcome,
    selection: &Outcome,
    side: impl Fn(&Outcome) -> (Option<f64>, Rate),
) -> Option<SideEffect> {
    let [(before, exact), (after, exact_after)] = [untouched, selection].map(side);
    Some(SideEffect {
        rows: exact.of,
        loss: [before?, after?],
        exact: [exact, exact_after].map(|rate| rate.rate.unwrap_or_default()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::refusals::LISTS;

    #[test]
    fn an_answer_that_begins_as_the_refusal_refuses() {
        assert!(LISTS.iter().any(|list| list.id() == REFUSALS));
        let refusal = Example { ids: vec![9, 9, 4, 5, 6], loss: vec![false, false, true, true, true] };
        let cases = [(&[4, 5, 6][..], true), (&[4, 5], true), (&[4, 5, 6, 7], true), (&[4, 6], false), (&[9], false)];
        for (answer, same) in cases {
            assert_eq!(begins_alike(answer, &refusal), same, "{answer:?}");
        }
    }
}
