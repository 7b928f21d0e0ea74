//! Faults on purpose, through the real binary on a tiny model: whatever happens, the run ends with the right code and says
//! what it was, no process stays, and `--resume` comes to the same bits as a run that nothing happened to.
//!
//! `cargo test --features mpi --test binary faults` tries each fault a few times. `MOEWARDEN_FAULT_REPEATS=20` tries each at least
//! so often (those within a save at least 50 times), and `MOEWARDEN_FAULT_TABLE=FILE` gets the rows of the table in
//! docs/reliability.md. Places and moments are drawn from printed seeds.

mod campaign;
mod damage;
mod differ;
mod disk;
mod ranks;
mod saves;
mod scene;
mod signals;
mod values;
