//! Tests that run the real binary: its commands and options, bad input, resumed runs, faults, and ranks as threads and, with
//! the feature `mpi`, as processes.

#[path = "../common/golden_copy.rs"]
mod golden_copy;
#[path = "../common/processes.rs"]
mod processes;
#[path = "../common/shared.rs"]
mod shared;

mod comparison;
mod program;

mod ablate;
mod bad_input;
mod browser;
mod cli_options;
mod commands;
mod compare;
mod download;
mod evaluation;
mod faults;
mod judges;
mod lockstep;
mod other_routing;
mod own_replies;
mod progress;
mod python;
mod questions;
mod quickstart;
mod random_init;
mod resume;
mod resume_inputs;
mod retention;
mod selection;
#[cfg(feature = "mpi")]
mod sharding;
mod shared_cases;
