//! What moewarden writes into an output folder: the names of its files and folders, and which of those in a folder are its own.

use std::fs::{self, FileType};
use std::io;
use std::path::{Path, PathBuf};

use super::LaunchError;
use super::lock::LOCK_FILE;
use crate::checkpoint::{self, is_model_file, is_model_folder};
use crate::config::Variant;
use crate::files;
use crate::report::{EventLog, OWN_REPLIES, REPLY_LOSSES};

/// Kind of a folder in the output folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// The output folder itself.
    Top,
    /// `round_1`, `final_model`: a model folder in Hugging Face format, or a delta.
    Model,
    /// A subfolder of a model folder, as export copies it.
    ModelFolder,
    /// `checkpoints`: one folder for each checkpoint.
    Checkpoints,
    /// A checkpoint.
    Checkpoint,
    /// `retain_cache`: one folder for each base model and set of retain rows.
    BaseCaches,
    /// The cached outputs of a base model.
    BaseCache,
    /// `tensorboard`: event files, among which may be those of other programs.
    Events,
}

/// Files at the top of the output folder. A new output file must be added here, or `--overwrite` refuses the folder.
const TOP_FILES: [&str; 23] = [
    LOCK_FILE,
    "config.resolved.yaml",
    "metrics.jsonl",
    "expert_scores.json",
    "rankings.json",
    "expert_gradients.pkl",
    "training_metadata.json",
    "ablation.json",
    "ablation.html",
    "eval.json",
    "eval_options.json",
    "eval_times.json",
    "generations.jsonl",
    "questions.jsonl",
    "verdicts.jsonl",
    OWN_REPLIES,
    REPLY_LOSSES,
    "report.html",
    "compare.json",
    "compare.html",
    "compare.md",
    "compare_plan.json",
    "compare_variant.json",
];

/// Folders of the evaluations of `compare`: `evaluations/VARIANT/held-out`, `evaluations/original/benign`.
const EVALUATIONS: [&str; 4] = ["evaluations", "original", "held-out", "benign"];

/// Documents in model folders; export copies them with all other small files.
const DOCUMENTS: [&str; 6] = ["README.md", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md"];

/// Whether model folders usually have a file of this name. Export copies more files if its source has more, but a
/// user's own file beside the model (notes.md, thesis.txt) must not count as an output.
fn is_of_a_model(name: &str) -> bool {
    let endings = [".safetensors", ".json", ".jinja", ".model", ".tiktoken"];
    DOCUMENTS.contains(&name)
        || ["vocab.txt", "merges.txt"].contains(&name)
        || endings.iter().any(|e| name.ends_with(e))
}

/// Whether moewarden writes a file or folder of this name here, temporary names included. Returns the kind of the
/// folder (for a file, `place`), or `None` for a foreign name.
pub(super) fn is_output(name: &str, place: Place, kind: FileType) -> Option<Place> {
    match kind {
        kind if kind.is_file() => is_file(files::target_of_temporary(name).unwrap_or(name), place).then_some(place),
        kind if kind.is_dir() => folder(name, place),
        _ => None,
    }
}

/// Whether moewarden writes a file of this name here.
fn is_file(name: &str, place: Place) -> bool {
    match place {
        Place::Top => TOP_FILES.contains(&name) || name.starts_with("heatmap-") && name.ends_with(".svg"),
        Place::Model => is_model_file(name) && is_of_a_model(name) && !TOP_FILES.contains(&name),
        Place::ModelFolder => is_model_file(name) && is_of_a_model(name),
        Place::Checkpoint => checkpoint::is_snapshot_file(name),
        Place::BaseCache => checkpoint::is_base_cache_file(name),
        Place::Events => EventLog::is_name(name),
        Place::Checkpoints | Place::BaseCaches => false,
    }
}

/// The kind of a folder that moewarden writes here under this name, temporary names included.
pub(super) fn folder(name: &str, place: Place) -> Option<Place> {
    let target = checkpoint::target_of_temporary(name).unwrap_or(name);
    match place {
        Place::Checkpoints => checkpoint::is_snapshot_folder(target).then_some(Place::Checkpoint),
        Place::BaseCaches => checkpoint::is_base_cache_folder(target).then_some(Place::BaseCache),
        Place::Model => is_model_folder(name).then_some(Place::ModelFolder),
        Place::Top if target == "final_model" || round_of(target).is_some() => Some(Place::Model),
        Place::Top => match name {
            "checkpoints" => Some(Place::Checkpoints),
            "retain_cache" => Some(Place::BaseCaches),
            "tensorboard" => Some(Place::Events),
            // A variant of `compare` has the layout of a run. (It holds no variants itself; allowing their names is
            // harmless.)
            _ => (Variant::is_name(name) || EVALUATIONS.contains(&name)).then_some(Place::Top),
        },
        Place::Checkpoint | Place::BaseCache | Place::ModelFolder | Place::Events => None,
    }
}

/// The round, from 1, whose model has a folder of this name.
pub(super) fn round_of(name: &str) -> Option<usize> {
    name.strip_prefix("round_")?.parse().ok()
}

/// Outputs in a folder tree; each folder comes after its contents.
#[derive(Default)]
pub(super) struct Outputs {
    pub(super) files: Vec<PathBuf>,
    pub(super) folders: Vec<PathBuf>,
    /// Entries that are not outputs.
    pub(super) foreign: Vec<PathBuf>,
}

impl Outputs {
    pub(super) fn collect(&mut self, dir: &Path, place: Place) -> Result<(), LaunchError> {
        entries(dir)?.iter().try_for_each(|entry| self.collect_entry(entry, place))
    }

    pub(super) fn collect_entry(&mut self, entry: &fs::DirEntry, place: Place) -> Result<(), LaunchError> {
        let path = entry.path();
        // `file_type` does not follow links: a symbolic link is neither file nor folder here.
        let kind = entry.file_type().map_err(failed("read", &path))?;
        match entry.file_name().to_str().and_then(|name| is_output(name, place, kind)) {
            None => self.foreign.push(path),
            Some(inside) if kind.is_dir() => {
                self.collect(&path, inside)?;
                self.folders.push(path);
            }
            Some(_) => self.files.push(path),
        }
        Ok(())
    }

    /// What of the folder `dir` must not be deleted, with the reason: what is no output, and the `inputs`.
    pub(super) fn kept(&self, dir: &Path, inputs: &[&Path]) -> Result<Option<String>, LaunchError> {
        let whole = fs::canonicalize(dir).map_err(failed("read", dir))?;
        let inside = |path: &&&Path| fs::canonicalize(path).is_ok_and(|path| path.starts_with(&whole));
        if let Some(input) = inputs.iter().find(inside) {
            return Ok(Some(format!("{}, which is to be read", input.display())));
        }
        let foreign = self.foreign.first();
        let name = foreign.map(|path| path.strip_prefix(dir).unwrap_or(path).display());
        Ok(name.map(|name| format!("{name}, which is no output of a run")))
    }

    /// Refuses to delete what must not be.
    pub(super) fn refuse_kept(&self, dir: &Path, inputs: &[&Path]) -> Result<(), LaunchError> {
        let Some(what) = self.kept(dir, inputs)? else { return Ok(()) };
        let message = format!("holds {what}: nothing was removed; move it away, or give another --output-dir");
        Err(LaunchError::OutputDir { path: dir.to_owned(), message })
    }

    /// Deletes all but the files `kept`.
    pub(super) fn remove(&self, kept: &[PathBuf]) -> Result<(), LaunchError> {
        for file in self.files.iter().filter(|file| !kept.contains(file)) {
            fs::remove_file(file).map_err(failed("remove", file))?;
        }
        for folder in &self.folders {
            fs::remove_dir(folder).map_err(failed("remove", folder))?;
        }
        Ok(())
    }
}

/// The entries of a folder, sorted by name.
pub(super) fn entries(dir: &Path) -> Result<Vec<fs::DirEntry>, LaunchError> {
    let mut entries =
        fs::read_dir(dir).and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(failed("read", dir))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    Ok(entries)
}

pub(super) fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LaunchError {
    let path = path.to_owned();
    move |source| LaunchError::OutputIo { what, path, source }
}
