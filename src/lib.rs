//! moewarden finds the experts of a Mixture-of-Experts language model that answer unsafe prompts, by the size of their
//! gradients, and retrains only those experts and the routers.
//!
//! The library serves the binary and its tests; it has no stable interface. Internal modules are hidden from this
//! documentation. `CONTRIBUTING.md` has a map of the code, and recipes for extending it.
//!
//! # Data flow of one training step
//!
//! 1. [`config`] merges the options and resolves them, once, into a [`train::Recipe`]: which phases a round has and what they train.
//! 2. [`data`] has rendered and tokenised the rows; a [`data::Sampler`] names the records of each micro-batch in the global
//!    order, and packs them.
//! 3. [`train::TrainingPhase::step`] is the step. A [`train::Objective`] runs forward and backward passes of this rank's
//!    micro-batches through its [`train::Replica`] of the [`model`], over the operations of a [`backend`].
//! 4. During the backward a [`model::GradPlan`] says what becomes of each weight gradient: nothing, one number (a score), or a
//!    sum in the gradient buffer. [`train::Trainer`] sends full buckets of gradients to the other ranks of a [`collective`]
//!    while lower layers still compute.
//! 5. The ranks agree on the gradient norm; [`optim::AdamW`] updates this rank's shard, and the ranks gather the new weights.
//!
//! Identification is the same with a [`train::Scan`]: the plan "score", then [`experts`] ranks and selects. [`routers`] has the
//! statistics and divergences of router alignment.

#![warn(missing_docs)]

pub mod backend;
#[doc(hidden)]
pub mod checkpoint;
#[doc(hidden)]
pub mod cli;
pub mod collective;
pub mod config;
pub mod data;
pub mod exit;
pub mod experts;
#[doc(hidden)]
pub mod files;
#[doc(hidden)]
pub mod input;
#[doc(hidden)]
pub mod judge;
pub mod launch;
#[doc(hidden)]
pub mod meter;
pub mod model;
pub mod optim;
#[doc(hidden)]
pub mod panics;
#[doc(hidden)]
pub mod quote;
#[doc(hidden)]
pub mod report;
pub mod routers;
#[doc(hidden)]
pub mod run;
pub mod train;
#[doc(hidden)]
pub mod ui;
