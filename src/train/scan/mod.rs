//! The scoring pass: walks the micro-batches of the global order and adds up one score an expert.
//!
//! A scan is a state machine that its caller drives:
//!
//! ```text
//! while let Some(interval) = scan.next_interval(&replica) {
//!     for index in interval { scan.add(&replica, index)?; }      // this rank's micro-batches
//!     if scan.synchronize(&replica)? == Decision::Stop { save(scan.state()); return }
//! }
//! let found = scan.finish(&replica)?;
//! ```

mod gradient;
mod routing;
mod sums;
mod usage;

use gradient::GradientScorer;
use routing::RoutingScorer;
pub use routing::risk_differences;
use sums::PartialSums;
pub use sums::{NonFinite, ScoredBatch, Scores};
use usage::UsageScorer;

use super::recipe::{Identify, ScoreBy};
use super::replica::Replica;
use super::usage::UsageCounter;
use crate::backend::Backend;
use crate::data::{RoutingTraces, Sampler};
use crate::exit::{self, Failure, Result};
use crate::experts::{Bootstrap, FrequencyAccumulator, Rule, ScoreAccumulator, UsageAccumulator};
use crate::train::fault::Point;

/// Micro-batches of a rank between two points where ranks synchronize. They wait for each other there; over several micro-batches
/// their work evens out.
const MICRO_BATCHES_PER_INTERVAL: usize = 4;

/// A scoring pass under way on one rank.
pub struct Scan<'d, B: Backend> {
    sampler: Sampler<'d>,
    micro_batches: Vec<Vec<usize>>,
    /// Micro-batches of the global order that are done.
    next: usize,
    scorer: Scorer<'d, B>,
}

enum Scorer<'d, B: Backend> {
    Gradient(GradientScorer<B>),
    Routing(RoutingScorer<'d>),
    Usage(UsageScorer<'d>),
    /// A random selection needs no scores.
    None,
}

/// What the ranks agree on at the end of an interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Continue with the next interval.
    Continue,
    /// The stop flag of some rank is set.
    Stop,
}

impl<'d, B: Backend> Scan<'d, B> {
    /// A scan of these micro-batches from the first one on.
    ///
    /// # Errors
    /// Rows without a safe reply, where the method compares with safe replies.
    pub fn new(
        replica: &Replica<B>,
        identify: &Identify,
        sampler: Sampler<'d>,
        micro_batches: Vec<Vec<usize>>,
    ) -> Result<Self> {
        let experts = replica.moe_layers().layers.len() * replica.model().config.num_experts;
        let bootstrap = (identify.bootstrap > 0).then(|| Bootstrap::new(identify.seed, identify.bootstrap, experts));
        let scorer = match identify.by {
            ScoreBy::Gradient(score) | ScoreBy::Random { gradient: Some(score), .. } => {
                Scorer::Gradient(GradientScorer::new(replica, score, bootstrap))
            }
            ScoreBy::Routing { tokens, .. } => {
                Scorer::Routing(RoutingScorer::new(replica, sampler, tokens, bootstrap)?)
            }
            ScoreBy::Published { rule, tokens, .. } => Scorer::Usage(UsageScorer {
                counter: UsageCounter { tokens, weights: rule == Rule::EsftGate },
                partners: rule.needs_safe_side().then(|| sampler.reply_partners()).transpose()?,
                traces: None,
                sums: PartialSums::new(UsageAccumulator::default(), None),
            }),
            ScoreBy::Random { gradient: None, .. } | ScoreBy::Given => Scorer::None,
        };
        let next = if matches!(scorer, Scorer::None) { micro_batches.len() } else { 0 };
        Ok(Self { sampler, micro_batches, next, scorer })
    }

    /// Counts in these traces, whose records are those of the sampler, instead of running the model.
    #[must_use]
    pub fn with_traces(mut self, traces: Option<&'d RoutingTraces>) -> Self {
        match &mut self.scorer {
            Scorer::Routing(scorer) => scorer.traces = traces,
            Scorer::Usage(scorer) => scorer.traces = traces,
            Scorer::Gradient(_) | Scorer::None => {}
        }
        self
    }

    /// Resumes after the first `next` micro-batches. `sums`: what ranks had added up ([`Self::state`]): one entry if the world
    /// size is the same, several or none if it has changed.
    ///
    /// # Errors
    /// A state that cannot be read.
    pub fn restore(&mut self, next: usize, sums: &[Vec<u8>]) -> Result<()> {
        let len = self.micro_batches.len();
        if next > len {
            let message =
                format!("the checkpoint has {next} micro-batches of the identification done, but it has {len}");
            return Err(Failure::new(exit::DATA, message));
        }
        self.next = next;
        match &mut self.scorer {
            Scorer::Gradient(scorer) => scorer.sums.restore(sums, ScoreAccumulator::absorb),
            Scorer::Routing(scorer) => scorer.sums.restore(sums, FrequencyAccumulator::absorb),
            Scorer::Usage(scorer) => scorer.sums.restore(sums, UsageAccumulator::absorb),
            Scorer::None => Ok(()),
        }
    }

    /// Micro-batches of the global order that are done.
    pub fn done(&self) -> usize {
        self.next
    }

    /// Micro-batches of the global order that are left.
    pub fn left(&self) -> usize {
        self.micro_batches.len() - self.next
    }

    /// The lowest decoder layer that the backward visits; `None` without a backward.
    pub fn lowest_layer(&self) -> Option<usize> {
        match &self.scorer {
            Scorer::Gradient(scorer) => scorer.plan.lowest_layer(),
            Scorer::Routing(_) | Scorer::Usage(_) | Scorer::None => None,
        }
    }

    /// This rank's micro-batches of the next interval; `None` at the end. All ranks get intervals at the same time.
    pub fn next_interval(&mut self, replica: &Replica<B>) -> Option<Vec<usize>> {
        let size = replica.world.world_size();
        self.interval(replica, MICRO_BATCHES_PER_INTERVAL * size)
    }

    /// The same in one interval for all that is left: without synchronization in between.
    pub fn last_interval(&mut self, replica: &Replica<B>) -> Option<Vec<usize>> {
        let left = self.left();
        self.interval(replica, left)
    }

    fn interval(&mut self, replica: &Replica<B>, len: usize) -> Option<Vec<usize>> {
        if self.left() == 0 {
            return None;
        }
        let (rank, size) = (replica.world.rank(), replica.world.world_size());
        replica.world.set_activity(&format!("identification, micro-batches from {}", self.next));
        let first = self.next;
        self.next = self.micro_batches.len().min(first + len);
        Some((first..self.next).filter(|i| i % size == rank).collect())
    }

    /// Scores the micro-batch with this index in the global order.
    ///
    /// # Errors
    /// An injected fault.
    pub fn add(&mut self, replica: &Replica<B>, index: usize) -> Result<ScoredBatch> {
        replica.visit_unchanged(Point::Batch)?;
        let records = &self.micro_batches[index];
        Ok(match &mut self.scorer {
            Scorer::Gradient(scorer) => scorer.add(replica, index, &self.sampler.pack_unsafe(records)),
            Scorer::Routing(scorer) => scorer.add(replica, self.sampler, index, records),
            Scorer::Usage(scorer) => scorer.add(replica, self.sampler, index, records),
            Scorer::None => ScoredBatch::default(),
        })
    }

    /// Synchronizes the ranks at the end of an interval: they agree whether to continue. After the last interval there is
    /// nothing to agree on. A loss that is not finite ends the scan: [`Self::finish`] then names it on all ranks.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn synchronize(&mut self, replica: &Replica<B>) -> Result<Decision> {
        if self.left() == 0 {
            return Ok(Decision::Continue);
        }
        let finite = match &self.scorer {
            Scorer::Gradient(scorer) => scorer.sums.losses.iter().all(|(_, loss)| loss.is_finite()),
            _ => true,
        };
        let [stop, not_finite] = replica.any([replica.stop.is_set(), !finite])?;
        if not_finite {
            self.next = self.micro_batches.len();
            return Ok(Decision::Continue);
        }
        Ok(if stop { Decision::Stop } else { Decision::Continue })
    }

    /// What this rank has added up, as JSON, for [`Self::restore`].
    pub fn state(&self) -> Vec<u8> {
        match &self.scorer {
            Scorer::Gradient(scorer) => scorer.sums.to_json(),
            Scorer::Routing(scorer) => scorer.sums.to_json(),
            Scorer::Usage(scorer) => scorer.sums.to_json(),
            Scorer::None => Vec::new(),
        }
    }

    /// Sums over all ranks; the means are the scores.
    ///
    /// # Errors
    /// A loss that is not finite ([`NonFinite`]); nothing to score; those of the collective.
    pub fn finish(self, replica: &Replica<B>) -> Result<Scores> {
        match self.scorer {
            Scorer::Gradient(scorer) => scorer.finish(replica, self.sampler, &self.micro_batches),
            Scorer::Routing(scorer) => scorer.finish(replica),
            Scorer::Usage(scorer) => scorer.finish(replica, self.micro_batches.len()),
            Scorer::None => Ok(Scores::zeros(replica)),
        }
    }
}
