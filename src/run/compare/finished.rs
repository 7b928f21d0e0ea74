//! Variants that are trained and evaluated: a resumed comparison takes their results as they are, and needs their models no more.

use serde::{Deserialize, Serialize};

use super::evaluate::Evaluations;
use crate::config::RunConfig;
use crate::exit::Result;
use crate::launch::remove_output_folders;
use crate::report::{Evaluated, VariantReport, read_json, write_json};
use crate::run::session::stored_dtype;

/// Name of the file in the folder of a variant.
const FILE: &str = "compare_variant.json";
const SCHEMA: &str = "moewarden.compare_variant/1";

/// The content of `compare_variant.json`.
#[derive(Serialize, Deserialize)]
struct File {
    schema: String,
    /// A hash of all that decides the results.
    key: String,
    results: VariantReport,
}

/// A run of the matrix, and what decides its results.
pub struct Cell<'a> {
    pub config: &'a RunConfig,
    /// The hash of its inputs.
    pub inputs: blake3::Hash,
    /// How many experts it has to select.
    pub exactly: Option<usize>,
    pub evaluations: &'a Evaluations<'a>,
}

impl Cell<'_> {
    /// Keeps the results, and removes the models with `--drop-models`.
    ///
    /// # Errors
    /// A failed write; a folder that cannot be removed.
    pub fn keep(&self, results: &VariantReport) -> Result<()> {
        let file = File { schema: SCHEMA.into(), key: self.key()?, results: results.clone() };
        write_json(self.config.output_dir.join(FILE), &file)?;
        self.drop_models()
    }

    /// The results of an earlier run of the comparison; `None` if the variant has to be run, with a warning if it has run before.
    ///
    /// # Errors
    /// Inputs that cannot be read; evaluations that are damaged.
    pub fn kept(&self, original: Option<&Evaluated>) -> Result<Option<(VariantReport, Evaluated)>> {
        let path = self.config.output_dir.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let ui = self.evaluations.ui;
        let again = |why: &str| {
            ui.warn(format_args!("{}: {why}: the variant is run again", path.display()));
            Ok(None)
        };
        let file = read_json::<File>(&path).ok().filter(|file| file.schema == SCHEMA);
        let Some(File { key, mut results, .. }) = file else { return again("is damaged, or of another version") };
        if key != self.key()? {
            return again("the model, the rows, the options or the number format were others");
        }
        match self.evaluations.read(&results.name)? {
            Some(found) if original.is_none_or(|original| found.is_comparable_with(original)) => {
                results.folder = self.config.output_dir.display().to_string();
                ui.line("it is trained and evaluated already");
                self.drop_models()?;
                Ok(Some((results, found)))
            }
            Some(_) => again("it was evaluated in another way than the model before training"),
            None => again("a part of its evaluation is missing"),
        }
    }

    /// A hash of what decides the results, besides the plan of the comparison.
    fn key(&self) -> Result<String> {
        let stored = stored_dtype(&self.evaluations.base.table);
        let format = self.evaluations.started.device.number_format(self.config.precision, stored)?;
        let (options, version) = (self.config.result_options_yaml()?, env!("CARGO_PKG_VERSION"));
        let text = format!("{version} {} {format} {:?}\n{options}", self.inputs, self.exactly);
        Ok(format!("blake3:{}", blake3::hash(text.as_bytes())))
    }

    /// Removes what only a run that goes on, or is evaluated, reads.
    fn drop_models(&self) -> Result<()> {
        if !self.evaluations.args.drops_models() {
            return Ok(());
        }
        Ok(remove_output_folders(&self.config.output_dir, &["final_model", "checkpoints", "retain_cache"])?)
    }
}
