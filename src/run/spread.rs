//! Answers of a model to prompts, spread over the ranks: each rank takes a batch at a time. Which prompts are in a batch does not
//! depend on the number of ranks.

use super::generate::{Answer, Generation, Prompt};
use super::progress::Progress;
use crate::backend::Backend;
use crate::collective::all_ok;
use crate::exit::Result;
use crate::report::{GenerationSpeed, Sampling};
use crate::train::Replica;

/// Forward passes between two moments at which the ranks agree whether to stop: no rank waits for the others for long.
const PASSES: usize = 32;

/// What a rank needs to generate its part of the answers.
pub(super) struct Spread<'a, B: Backend> {
    pub replica: &'a Replica<B>,
    /// Tokens that end an answer.
    pub eos: &'a [u32],
    pub sampling: Sampling,
    pub progress: Progress<'a>,
    /// Of this rank.
    pub speed: GenerationSpeed,
}

impl<B: Backend> Spread<'_, B> {
    /// Generates the answers to the prompts in `batches`, which hold their places in `prompts`. After each interval (one batch a
    /// rank), `keep` gets the answers of all ranks with the places of their prompts, the same on all ranks, and whether there will
    /// be none after them. Returns whether some rank was asked to stop; then answers may be missing.
    ///
    /// # Errors
    /// Logits that are not finite; those of the collective and of `keep`.
    pub fn answers(
        &mut self,
        prompts: &[Prompt<'_>],
        batches: &[Vec<usize>],
        mut keep: impl FnMut(Vec<(usize, Answer)>, bool) -> Result<()>,
    ) -> Result<bool> {
        let (rank, size) = (self.replica.world.rank(), self.replica.world.world_size());
        let intervals = batches.chunks(size);
        let last = intervals.len().saturating_sub(1);
        for (i, interval) in intervals.enumerate() {
            let own = interval.get(rank).map_or(&[][..], Vec::as_slice);
            let (own, stop) = self.batch(prompts, own)?;
            let own = serde_json::to_vec(&own).expect("answers are data");
            let mut found: Vec<(usize, Answer)> = Vec::new();
            for other in self.replica.world.all_gather(&own)? {
                let answers: Vec<(usize, Answer)> =
                    serde_json::from_slice(&other).expect("the answers of another rank");
                found.extend(answers);
            }
            keep(found, stop || i == last)?;
            if stop {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The answers to a batch of this rank, which may be empty, while other ranks answer theirs; and whether some rank was asked to
    /// stop. Then answers that are not complete are left out.
    fn batch(&mut self, prompts: &[Prompt<'_>], places: &[usize]) -> Result<(Vec<(usize, Answer)>, bool)> {
        let Self { replica, eos, sampling, progress, speed } = self;
        let asked: Vec<_> = places.iter().map(|&place| prompts[place]).collect();
        let mut generation = Generation::new(replica.model(), &asked, eos, sampling);
        let stop = loop {
            let mut running = Ok(true);
            for _ in 0..PASSES {
                let done = |i: usize, ids: &[u32]| progress.step(asked[i].ids.len() + ids.len(), "");
                running = generation.advance(speed, done);
                if !matches!(running, Ok(true)) {
                    break;
                }
            }
            let running = all_ok(&*replica.world, running)?;
            let [running, stop] = replica.any([running, replica.stop.is_set()])?;
            if stop || !running {
                break stop;
            }
        };
        let answers = places.iter().zip(generation.into_answers()).filter_map(|(&place, said)| Some((place, said?)));
        Ok((answers.collect(), stop))
    }
}
