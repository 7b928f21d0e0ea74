//! The commands: the only places where models and ranks meet.

pub mod alignment;
pub mod engine;
pub mod identify;
pub mod memory;
pub mod outputs;
pub mod phases;
pub mod progress;
mod quickstart;
pub mod session;
pub mod train;
pub mod trainer;
pub mod verify;

pub use quickstart::quickstart;
pub use train::{TrainSummary, identify, train};

use crate::config::{CheckArgs, CompareArgs, EvalArgs, ExportArgs, ReportArgs, RunConfig};
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
    export(args: &ExportArgs, ui: &Ui);
    check(config: &RunConfig, args: &CheckArgs, ui: &Ui);
}
