//! The commands.

use crate::config::{CheckArgs, CompareArgs, EvalArgs, ExportArgs, QuickstartArgs, ReportArgs, RunConfig};
use crate::exit::{self, Failure, Result};
use crate::ui::Ui;

// Signatures only, so that this branch compiles: the commands themselves are written on another branch.
fn absent() -> Result<()> {
    Err(Failure::new(exit::INTERNAL, "the commands are not on this branch"))
}

macro_rules! commands {
    ($($name:ident($($arg:ident: $kind:ty),*);)*) => {
        $(#[doc = "See the command of this name."] pub fn $name($($arg: $kind),*) -> Result<()> { $(_ = $arg;)* absent() })*
    };
}
commands! {
    train(config: &RunConfig, ui: &Ui);
    identify(config: &RunConfig, ui: &Ui);
    eval(args: &EvalArgs, ui: &Ui);
    report(args: &ReportArgs, ui: &Ui);
    compare(config: &RunConfig, args: &CompareArgs, ui: &Ui);
    export(args: &ExportArgs, ui: &Ui);
    check(config: &RunConfig, args: &CheckArgs, ui: &Ui);
    quickstart(args: &QuickstartArgs, ui: &Ui);
}
