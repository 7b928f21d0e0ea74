//! Which records a micro-batch holds, and how they are packed: the seeded global order of each phase.
//!
//! A micro-batch is named by the indices of its records. Every rank computes the same global order; micro-batch `i` belongs
//! to rank `i mod world size`.

use std::path::Path;

use super::{Dataset, MicroBatch, Record, micro_batches, order};
use crate::exit::{self, Coded};

/// Orders the records of a data set and packs them.
#[derive(Debug, Clone, Copy)]
pub struct Sampler<'d> {
    /// The rows.
    pub data: &'d Dataset,
    /// Their file, which errors name.
    pub path: &'d Path,
    /// Examples of a micro-batch.
    pub batch_size: usize,
    /// Whether the order is seeded; else it is that of the file.
    pub shuffle: bool,
    /// The seed of the order.
    pub seed: u64,
}

/// The records of one micro-batch of the joint phase.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JointBatch {
    /// Records that contribute their safe reply.
    pub safe: Vec<usize>,
    /// Records that contribute their unsafe reply.
    pub unsafe_: Vec<usize>,
}

/// The data lack the safe side of a comparison.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MissingSide {
    /// Router alignment has no safe prompt.
    #[error(
        "router alignment compares safe with unsafe prompts, and the data hold no safe ones: add rows with the label safe, \
         or give --skip-router-training"
    )]
    SafePrompts,
    /// The joint phase has no safe reply.
    #[error(
        "the joint schedule needs safe examples beside unsafe ones, and the data hold none: add rows with the label safe, \
         or take --schedule alternate"
    )]
    SafeExamples,
    /// The routing method has no safe reply.
    #[error(
        "--method routing compares safe with unsafe prompts, and the data hold no safe ones: add rows with the label safe, \
         or take --method gradient"
    )]
    SafeReplies,
}

impl Coded for MissingSide {
    fn exit_code(&self) -> u8 {
        exit::CONFIG
    }
}

impl Sampler<'_> {
    /// Records that have an unsafe prompt with a reply, in file order.
    pub fn unsafe_replies(&self) -> Vec<usize> {
        self.records_with(|r| r.unsafe_reply.is_some())
    }

    /// The global order of one pass over the unsafe replies, cut into micro-batches. `epoch` counts from 0.
    pub fn unsafe_order(&self, epoch: usize) -> Vec<Vec<usize>> {
        micro_batches(&self.shuffled(self.unsafe_replies(), epoch), self.batch_size)
    }

    /// The global order of one pass over the unsafe prompts, cut into micro-batches.
    pub fn prompt_order(&self, epoch: usize) -> Vec<Vec<usize>> {
        micro_batches(&self.shuffled(self.unsafe_prompts(), epoch), self.batch_size)
    }

    /// Records that have an unsafe prompt, in file order.
    pub fn unsafe_prompts(&self) -> Vec<usize> {
        self.records_with(|r| r.unsafe_prompt.is_some())
    }

    /// The joint micro-batches of one pass over the unsafe replies. Safe replies are taken in turn, from the start again
    /// where they run out. A last micro-batch with fewer unsafe examples has proportionally fewer safe ones.
    ///
    /// # Errors
    /// [`MissingSide::SafeExamples`].
    pub fn joint_order(&self, epoch: usize, safe_ratio: f64) -> Result<Vec<JointBatch>, MissingSide> {
        let unsafe_ = self.shuffled(self.unsafe_replies(), epoch);
        let safe = self.shuffled(self.records_with(|r| r.safe_reply.is_some()), epoch);
        if safe.is_empty() {
            return Err(MissingSide::SafeExamples);
        }
        let safe_per_batch = self.safe_per_joint_batch(safe_ratio);
        let unsafe_per_batch = self.batch_size - safe_per_batch;
        let mut safe = safe.into_iter().cycle();
        let batches = unsafe_.chunks(unsafe_per_batch).map(|unsafe_| {
            let wanted = (unsafe_.len() * safe_per_batch).div_ceil(unsafe_per_batch);
            JointBatch { safe: safe.by_ref().take(wanted).collect(), unsafe_: unsafe_.to_vec() }
        });
        Ok(batches.collect())
    }

    /// Safe examples in a joint micro-batch: `batch_size · safe_ratio`, rounded, with at least one example of each side.
    fn safe_per_joint_batch(&self, safe_ratio: f64) -> usize {
        let batch = self.batch_size;
        ((batch as f64 * safe_ratio).round() as usize).clamp(1, batch.max(2) - 1)
    }

    /// Packs the unsafe replies of these records.
    pub fn pack_unsafe(&self, records: &[usize]) -> MicroBatch {
        MicroBatch::of_examples(records.iter().filter_map(|&i| self.data.records[i].unsafe_reply.as_ref()))
    }

    /// Packs the safe replies of these records.
    pub fn pack_safe(&self, records: &[usize]) -> MicroBatch {
        MicroBatch::of_examples(records.iter().filter_map(|&i| self.data.records[i].safe_reply.as_ref()))
    }

    /// Packs the safe replies first, then the unsafe ones.
    pub fn pack_joint(&self, batch: &JointBatch) -> MicroBatch {
        let records = &self.data.records;
        let safe = batch.safe.iter().filter_map(|&i| records[i].safe_reply.as_ref());
        let unsafe_ = batch.unsafe_.iter().filter_map(|&i| records[i].unsafe_reply.as_ref());
        MicroBatch::of_examples(safe.chain(unsafe_))
    }

    /// Packs the unsafe prompts of these records, and the safe prompts of their partners: (safe, unsafe). Without records
    /// both are empty.
    pub fn pack_prompts(&self, partners: &[usize], own: &[usize]) -> (MicroBatch, MicroBatch) {
        let records = &self.data.records;
        let safe = MicroBatch::of_prompts(own.iter().filter_map(|&i| records[partners[i]].safe_prompt.as_deref()));
        let unsafe_ = MicroBatch::of_prompts(own.iter().filter_map(|&i| records[i].unsafe_prompt.as_deref()));
        (safe, unsafe_)
    }

    /// For each record the one whose safe prompt its unsafe prompt is compared with; see `safe_partners`.
    ///
    /// # Errors
    /// [`MissingSide::SafePrompts`].
    pub fn prompt_partners(&self) -> Result<Vec<usize>, MissingSide> {
        self.safe_partners(|r| r.safe_prompt.is_some()).ok_or(MissingSide::SafePrompts)
    }

    /// For each record the one whose safe reply its unsafe reply is compared with; see `safe_partners`.
    ///
    /// # Errors
    /// [`MissingSide::SafeReplies`].
    pub fn reply_partners(&self) -> Result<Vec<usize>, MissingSide> {
        self.safe_partners(|r| r.safe_reply.is_some()).ok_or(MissingSide::SafeReplies)
    }

    /// For each record the one whose safe side is compared with its unsafe side: the record itself if it has both sides,
    /// else the records that are safe only, in turn; without any of those, all records with a safe side, in turn. `None` if
    /// no record has a safe side.
    fn safe_partners(&self, has_safe: impl Fn(&Record) -> bool) -> Option<Vec<usize>> {
        let records = &self.data.records;
        let safe = self.records_with(&has_safe);
        let safe_only: Vec<_> = safe.iter().copied().filter(|&i| records[i].unsafe_prompt.is_none()).collect();
        let mut next = if safe_only.is_empty() { &safe } else { &safe_only }.iter().copied().cycle();
        (0..records.len()).map(|i| if has_safe(&records[i]) { Some(i) } else { next.next() }).collect()
    }

    /// `rows at lines 3, 7 of rows.jsonl`, for errors: the first 16 lines of these records.
    pub fn describe_rows(&self, records: &[usize]) -> String {
        let lines: Vec<_> = records.iter().take(16).map(|&i| self.data.records[i].line.to_string()).collect();
        format!("rows at lines {} of {}", lines.join(", "), self.path.display())
    }

    fn records_with(&self, wanted: impl Fn(&Record) -> bool) -> Vec<usize> {
        (0..self.data.records.len()).filter(|&i| wanted(&self.data.records[i])).collect()
    }

    fn shuffled(&self, records: Vec<usize>, epoch: usize) -> Vec<usize> {
        order(records.len(), self.shuffle, self.seed, epoch as u64).into_iter().map(|i| records[i]).collect()
    }
}
