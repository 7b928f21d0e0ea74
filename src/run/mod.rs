//! The commands: the only places where models and ranks meet.

pub mod alignment;
mod check;
mod compare;
pub mod engine;
mod eval;
mod export;
pub mod forecast;
pub mod generate;
pub mod identify;
pub mod memory;
pub mod outputs;
pub mod phases;
pub mod progress;
mod quickstart;
pub mod refusals;
mod report;
pub mod resume;
pub mod session;
pub mod train;
pub mod trainer;
pub mod verify;

pub use check::check;
pub use compare::compare;
pub use eval::eval;
pub use export::export;
pub use quickstart::quickstart;
pub use report::report;
pub use train::{TrainSummary, identify, train};
