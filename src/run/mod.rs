//! The commands, one file each: the only places where options, ranks, devices, models and outputs meet.

mod ablate;
mod check;
mod compare;
pub mod counted;
mod dense;
mod eval;
mod export;
pub mod forecast;
pub mod generate;
mod identify;
mod other_routing;
mod outputs;
mod prepare;
mod progress;
mod quickstart;
pub mod refusals;
pub mod replies;
mod report;
pub mod retention;
mod rounds;
pub mod session;
mod spread;
mod summary;
mod train;
mod verify;

pub use ablate::ablate;
pub use check::check;
pub use compare::compare;
pub use eval::eval;
pub use export::export;
pub use identify::identify;
pub use quickstart::quickstart;
pub use report::report;
pub use train::{TrainSummary, train};
