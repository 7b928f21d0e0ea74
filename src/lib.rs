//! moewarden finds the experts of a Mixture-of-Experts language model that answer unsafe prompts, by the size of their
//! gradients, and retrains only those experts and the routers.
//!
//! Data flow: [`data`] turns rows into packed micro-batches; [`model`] runs them forward and backward over a
//! [`backend`], asking a plan what to do with each expert's weight gradient; [`experts`] makes scores of what comes
//! back and selects; [`routers`] computes the alignment loss; [`optim`] moves the chosen weights; [`checkpoint`] and
//! [`report`] write; [`run`] is the only place where all of them meet, over a [`collective`].

#![warn(missing_docs)]

pub mod backend;
pub mod checkpoint;
pub mod cli;
pub mod collective;
pub mod config;
pub mod data;
pub mod exit;
pub mod experts;
pub mod files;
pub mod launch;
pub mod model;
pub mod optim;
pub mod panics;
pub mod report;
pub mod routers;
pub mod run;
pub mod train;
pub mod ui;
