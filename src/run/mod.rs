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
pub mod refusals;
mod report;
pub mod session;
pub mod train;
pub mod trainer;
pub mod verify;

pub use check::check;
pub use compare::compare;
pub use eval::eval;
pub use export::export;
pub use report::report;
pub use train::{TrainSummary, identify, train};

use crate::config::QuickstartArgs;
use crate::exit::{self, Failure, Result};
use crate::ui::Ui;
fn absent() -> Result<()> {
    Err(Failure::new(exit::INTERNAL, "not yet"))
}
macro_rules! commands {
    ($($name:ident($($arg:ident: $kind:ty),*);)*) => {
        $(#[doc = "See the command of this name."] pub fn $name($($arg: $kind),*) -> Result<()> { $(_ = $arg;)* absent() })*
    };
}
commands! {
    quickstart(args: &QuickstartArgs, ui: &Ui);
}
