//! The causal check: random sets to compare a selection with, permutation p, intervals, and the verdict by fixed bounds.
//!
//! Pure functions of numbers: the measurements come from `crate::train`, the files from `crate::report`. The rule is written
//! in docs/method.md, section "Causal check".

mod matched;
mod statistics;
mod verdict;

pub use matched::{Matching, NoRandomSet, RandomSets};
pub use statistics::{Rate, Spread, permutation_p, wilson};
pub use verdict::{Bounds, Evidence, SideEffect, Verdict, verdict};
