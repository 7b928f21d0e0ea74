//! The commands: the only places where models and ranks meet.

mod alignment;
mod engine;
mod identify;
mod memory;
mod outputs;
mod phases;
mod progress;
mod session;
mod train;
mod trainer;
mod verify;

pub use train::{TrainSummary, identify, train};
