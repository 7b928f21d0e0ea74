//! Fault injection into the real binary on a tiny model: the run ends with the right exit code and a message with the cause,
//! no process stays, and `--resume` is bit-identical to an undisturbed run.
//!
//! `cargo test --features mpi --test binary faults` tries each fault a few times. `MOEWARDEN_FAULT_REPEATS=20` tries each at
//! least 20 times (those during a save at least 50 times), and `MOEWARDEN_FAULT_TABLE=FILE` writes the rows of the table in
//! docs/reliability.md to FILE. Fault points and times are random, from printed seeds.

mod campaign;
mod damage;
mod differ;
mod disk;
mod ranks;
mod saves;
mod scene;
mod signals;
mod values;
