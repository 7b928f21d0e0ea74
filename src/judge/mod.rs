//! The causal check: random sets to compare a selection with, permutation p, intervals, and the verdict by fixed bounds. And what
//! safety judges say of answers, and how far they agree.
//!
//! Pure functions of numbers and texts: the measurements come from `crate::train`, the files from `crate::report`. The rule of the
//! check is written in docs/method.md, section "Causal check".

mod agreement;
mod guards;
mod matched;
mod paired;
mod statistics;
mod verdict;

pub use agreement::cohen_kappa;
pub use guards::{Assessment, JudgeForm, Safety};
pub use matched::{Matching, NoRandomSet, RandomSets};
pub use paired::{PairedDifference, holm, mcnemar_p, mean_difference, sign_flip_p};
pub use statistics::{Rate, Spread, permutation_p, wilson};
pub use verdict::{Bounds, Evidence, SideEffect, Verdict, verdict};
