//! The commands: the only places where models and ranks meet.

pub mod alignment;
mod check;
pub mod engine;
mod export;
pub mod forecast;
pub mod identify;
pub mod memory;
pub mod outputs;
pub mod phases;
pub mod progress;
pub mod session;
pub mod train;
pub mod trainer;
pub mod verify;

pub use check::check;
pub use export::export;
pub use train::{TrainSummary, identify, train};

use crate::config::{CompareArgs, EvalArgs, QuickstartArgs, ReportArgs, RunConfig};
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
    eval(args: &EvalArgs, ui: &Ui);
    report(args: &ReportArgs, ui: &Ui);
    compare(config: &RunConfig, args: &CompareArgs, ui: &Ui);
    quickstart(args: &QuickstartArgs, ui: &Ui);
}
