//! `export`: applies a delta to a base model and writes a complete model folder.

use std::path::PathBuf;

use crate::checkpoint::{apply_delta, apply_delta_replacing};
use crate::config::ExportArgs;
use crate::exit::{self, Failure, Result};
use crate::launch::{check_model_dir, hub_cache};
use crate::ui::Ui;

/// Writes the base model with the delta applied. An existing output folder is replaced only when the new model is complete.
///
/// # Errors
/// A missing input; a delta of another base model; an output folder with other contents.
pub fn export(args: &ExportArgs, ui: &Ui) -> Result<()> {
    let base = hub_cache().resolve(&args.base)?;
    let delta = delta_file(args)?;
    check_model_dir(&args.output_dir, args.overwrite, &[&base, &delta])?;
    ui.line(format_args!("base {}, delta {}", base.display(), delta.display()));
    let apply = if args.overwrite { apply_delta_replacing } else { apply_delta };
    apply(&base, &delta, &args.output_dir)?;
    ui.result(format_args!("model: {}", args.output_dir.display()));
    Ok(())
}

/// The path of the delta: the file itself, or `delta.safetensors` in the folder of a round.
fn delta_file(args: &ExportArgs) -> Result<PathBuf> {
    let given = &args.delta;
    let file = if given.is_dir() { given.join("delta.safetensors") } else { given.clone() };
    if file.is_file() {
        return Ok(file);
    }
    Err(Failure::new(
        exit::NO_INPUT,
        format!(
            "{}: there is no such delta; --delta takes the folder of a round that was saved with --save-rounds delta, or \
             the file in it",
            file.display()
        ),
    ))
}
