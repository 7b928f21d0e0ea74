//! Prepares the output folder. A run never writes among foreign files, and `--overwrite` deletes only files that
//! moewarden writes.

use std::fs::{self, FileType};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::LaunchError;
use super::lock::LOCK_FILE;
use crate::checkpoint::{self, is_model_file, is_model_folder};
use crate::config::{RunConfig, SaveRounds, Variant};
use crate::files;
use crate::report::{OWN_REPLIES, REPLY_LOSSES};

/// What to do with an output folder that is not empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Return an error.
    Refuse,
    /// Delete known outputs. If the folder holds any other file, return an error and delete nothing.
    Replace,
    /// Keep all files except temporary files of a killed run.
    Keep,
}

impl Existing {
    /// From `--overwrite` and `--resume`, which exclude each other.
    pub fn of(overwrite: bool, resume: bool) -> Self {
        match (overwrite, resume) {
            (true, _) => Existing::Replace,
            (false, true) => Existing::Keep,
            (false, false) => Existing::Refuse,
        }
    }
}

/// Prepares the output folder of a run.
///
/// # Errors
/// As [`prepare_dir_keeping`].
pub fn prepare_output_dir(config: &RunConfig) -> Result<(), LaunchError> {
    prepare_dir_keeping(&config.output_dir, Existing::of(config.overwrite, config.resume), &config.inputs())
}

/// Checks whether [`prepare_output_dir`] would succeed, without changing anything.
///
/// # Errors
/// As [`prepare_output_dir`].
pub fn check_output_dir(config: &RunConfig) -> Result<(), LaunchError> {
    let dir = &config.output_dir;
    inspect(dir, Existing::of(config.overwrite, config.resume), &config.inputs(), Place::Top)?;
    let full = config.save_rounds == SaveRounds::Full;
    if config.resume { check_resumable(dir, full, &config.inputs()) } else { Ok(()) }
}

/// Without a checkpoint, `--resume` starts from the beginning, in a new folder or that of a run that was interrupted early. Refuses a
/// folder in which this would replace what is no such run's: a finished model, or files of others in the folders of models. With a
/// checkpoint it refuses files of others in the folders that the run writes as a whole and has not written yet: the final model and, with
/// `rounds`, the models of rounds.
fn check_resumable(dir: &Path, rounds: bool, inputs: &[&Path]) -> Result<(), LaunchError> {
    if !dir.is_dir() {
        return Ok(());
    }
    if entries(&dir.join("checkpoints")).is_ok_and(|found| !found.is_empty()) {
        // A model that is there has the files of its source, whatever their names.
        let is_new = |path: &Path| !path.join("config.json").is_file();
        let replaced = |path: &Path| (rounds || path.ends_with("final_model")) && is_new(path);
        let Some(foreign) = foreign_in_models(dir, replaced)? else { return Ok(()) };
        let message = format!(
            "holds {}, which moewarden did not write and the resumed run would remove with its folder: move it away",
            foreign.strip_prefix(dir).unwrap_or(&foreign).display()
        );
        return Err(LaunchError::OutputDir { path: dir.to_owned(), message });
    }
    let whole = fs::canonicalize(dir).map_err(failed("read", dir))?;
    let held = if inputs.iter().any(|input| fs::canonicalize(input).is_ok_and(|input| input == whole)) {
        Some("the model that is to be trained".to_owned())
    } else {
        let foreign = foreign_in_models(dir, |_| true)?;
        let finished = Some(dir.join("final_model")).filter(|path| path.exists());
        let held = finished.or(foreign);
        held.map(|path| path.strip_prefix(dir).unwrap_or(&path).display().to_string())
    };
    let Some(held) = held else { return Ok(()) };
    let message = format!(
        "holds {held}, but no checkpoint that --resume could continue, and a run from the beginning would replace it: give another \
         --output-dir, or --overwrite to delete an earlier run's outputs"
    );
    Err(LaunchError::OutputDir { path: dir.to_owned(), message })
}

/// The first file of others in those folders of models below `dir` that `of` names.
fn foreign_in_models(dir: &Path, of: impl Fn(&Path) -> bool) -> Result<Option<PathBuf>, LaunchError> {
    let mut models = Outputs::default();
    for entry in entries(dir)? {
        let (name, path) = (entry.file_name(), entry.path());
        let kind = entry.file_type().map_err(failed("read", &path))?;
        let is_model = name.to_str().is_some_and(|name| is_output(name, Place::Top, kind) == Some(Place::Model));
        if is_model && of(&path) {
            models.collect(&path, Place::Model)?;
        }
    }
    Ok(models.foreign)
}

/// Checks whether a model can be written to the folder `dir`, without changing anything. The folder must be absent or
/// empty; with `overwrite` it may hold a model with config.json, but no other file and none of `inputs`.
///
/// # Errors
/// [`LaunchError::OutputDir`] or [`LaunchError::OutputIo`].
pub fn check_model_dir(dir: &Path, overwrite: bool, inputs: &[&Path]) -> Result<(), LaunchError> {
    let Some(outputs) = inspect(dir, Existing::of(overwrite, false), inputs, Place::Model)? else { return Ok(()) };
    // The user chose this folder. Without config.json it was not written by an export: do not replace it.
    if outputs.files.is_empty() || dir.join("config.json").is_file() {
        return Ok(());
    }
    let message =
        "holds no config.json, so it is not a model that --overwrite may replace; give another --output-dir".into();
    Err(LaunchError::OutputDir { path: dir.to_owned(), message })
}

/// Creates `dir` and its parents, or applies `existing` to a folder that is not empty.
///
/// [`Existing::Replace`] deletes only names that moewarden writes (`is_output`). The whole tree is checked before
/// anything is deleted; an unknown name, a symbolic link or a special file anywhere in the tree is an error.
///
/// # Errors
/// [`LaunchError::OutputDir`] or [`LaunchError::OutputIo`].
pub fn prepare_dir(dir: &Path, existing: Existing) -> Result<(), LaunchError> {
    prepare_dir_keeping(dir, existing, &[])
}

/// [`prepare_dir`] for a command that reads `inputs`. It is an error to delete one of them with an earlier run's
/// outputs (such as the final model of a run that is trained further). Inputs that do not exist are ignored: they are
/// hub ids, or opening them reports the error.
///
/// # Errors
/// [`LaunchError::OutputDir`] or [`LaunchError::OutputIo`].
pub fn prepare_dir_keeping(dir: &Path, existing: Existing, inputs: &[&Path]) -> Result<(), LaunchError> {
    let Some(outputs) = inspect(dir, existing, inputs, Place::Top)? else {
        return fs::create_dir_all(dir).map_err(failed("create the output folder", dir));
    };
    if existing == Existing::Keep {
        remove_temporaries(dir, Place::Top)?;
    }
    // Keep the lock file: the process that holds the lock deletes it. Keep the model's own replies: their keys say to which model
    // and prompts they belong, and they are expensive.
    let kept = [dir.join(LOCK_FILE), dir.join(OWN_REPLIES)];
    for file in outputs.files.iter().filter(|file| !kept.contains(file)) {
        fs::remove_file(file).map_err(failed("remove", file))?;
    }
    for folder in &outputs.folders {
        fs::remove_dir(folder).map_err(failed("remove", folder))?;
    }
    Ok(())
}

/// The outputs to delete from `dir`; `None` if the folder does not exist yet.
fn inspect(dir: &Path, existing: Existing, inputs: &[&Path], place: Place) -> Result<Option<Outputs>, LaunchError> {
    let refused = |message: String| LaunchError::OutputDir { path: dir.to_owned(), message };
    match fs::metadata(dir) {
        Ok(meta) if !meta.is_dir() => return Err(refused("is a file; give a folder with --output-dir".into())),
        Ok(_) => {}
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed("read", dir)(e)),
    }
    let mut outputs = Outputs::default();
    match existing {
        Existing::Keep => {}
        // The lock file belongs to this process or to a killed one.
        Existing::Refuse if entries(dir)?.iter().all(|entry| entry.file_name() == LOCK_FILE) => {}
        Existing::Refuse => {
            return Err(refused(
                "is not empty; give another --output-dir, --overwrite to delete an earlier run's outputs from it, \
                 or (train, eval) --resume to continue that run"
                    .into(),
            ));
        }
        Existing::Replace => {
            outputs.collect(dir, place)?;
            if let Some(foreign) = outputs.foreign {
                let name = foreign.strip_prefix(dir).unwrap_or(&foreign).display().to_string();
                return Err(refused(format!(
                    "holds {name}, which moewarden did not write: nothing was removed; move it away, or give another \
                     --output-dir"
                )));
            }
            let whole = fs::canonicalize(dir).map_err(failed("read", dir))?;
            let inside = |path: &&&Path| fs::canonicalize(path).is_ok_and(|path| path.starts_with(&whole));
            if let Some(input) = inputs.iter().find(inside) {
                return Err(refused(format!(
                    "holds {}, which is to be read and which --overwrite would delete; give another --output-dir",
                    input.display()
                )));
            }
        }
    }
    Ok(Some(outputs))
}

/// Kind of a folder in the output folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// The output folder itself.
    Top,
    /// `round_1`, `final_model`: a model folder in Hugging Face format, or a delta.
    Model,
    /// A subfolder of a model folder, as export copies it.
    ModelFolder,
    /// `checkpoints` and `retain_cache` with their subfolders: resume state and what can be made again, where any name counts as an
    /// output.
    State,
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
fn is_output(name: &str, place: Place, kind: FileType) -> Option<Place> {
    if kind.is_file() {
        let name = files::target_of_temporary(name).unwrap_or(name);
        let heatmap = name.starts_with("heatmap-") && name.ends_with(".svg");
        let ours = match place {
            Place::Top => TOP_FILES.contains(&name) || heatmap,
            Place::Model => is_model_file(name) && is_of_a_model(name) && !TOP_FILES.contains(&name),
            Place::ModelFolder => is_model_file(name) && is_of_a_model(name),
            Place::State => true,
            Place::Events => name.starts_with("events.out.tfevents.") && name.ends_with(".moewarden"),
        };
        return ours.then_some(place);
    }
    let round = |name: &str| name.strip_prefix("round_").is_some_and(|n| n.parse::<u32>().is_ok());
    let model = |name: &str| name == "final_model" || round(name);
    match place {
        Place::State if kind.is_dir() => Some(Place::State),
        Place::Model if kind.is_dir() && is_model_folder(name) => Some(Place::ModelFolder),
        Place::Top if kind.is_dir() && model(checkpoint::target_of_temporary(name).unwrap_or(name)) => {
            Some(Place::Model)
        }
        Place::Top if kind.is_dir() && ["checkpoints", "retain_cache"].contains(&name) => Some(Place::State),
        Place::Top if kind.is_dir() && name == "tensorboard" => Some(Place::Events),
        // A variant of `compare` has the layout of a run. (It holds no variants itself; allowing their names is
        // harmless.)
        Place::Top if kind.is_dir() && (Variant::is_name(name) || EVALUATIONS.contains(&name)) => Some(Place::Top),
        _ => None,
    }
}

/// Outputs in a folder tree; each folder comes after its contents.
#[derive(Default)]
struct Outputs {
    files: Vec<PathBuf>,
    folders: Vec<PathBuf>,
    /// The first entry that is not an output.
    foreign: Option<PathBuf>,
}

impl Outputs {
    fn collect(&mut self, dir: &Path, place: Place) -> Result<(), LaunchError> {
        for entry in entries(dir)? {
            let path = entry.path();
            // `file_type` does not follow links: a symbolic link is neither file nor folder here.
            let kind = entry.file_type().map_err(failed("read", &path))?;
            match entry.file_name().to_str().and_then(|name| is_output(name, place, kind)) {
                None => _ = self.foreign.get_or_insert(path),
                Some(inside) if kind.is_dir() => {
                    self.collect(&path, inside)?;
                    self.folders.push(path);
                }
                Some(_) => self.files.push(path),
            }
        }
        Ok(())
    }
}

/// Deletes temporary files and folders of a killed run. (Each variant of `compare` does this for its own folder.)
fn remove_temporaries(dir: &Path, place: Place) -> Result<(), LaunchError> {
    for entry in entries(dir)? {
        let path = entry.path();
        let kind = entry.file_type().map_err(failed("read", &path))?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        match is_output(name, place, kind) {
            Some(_) if kind.is_file() && files::target_of_temporary(name).is_some() => {
                fs::remove_file(&path).map_err(failed("remove", &path))?;
            }
            Some(_) if kind.is_dir() && checkpoint::target_of_temporary(name).is_some() => {
                fs::remove_dir_all(&path).map_err(failed("remove", &path))?;
            }
            Some(inside) if kind.is_dir() && inside != Place::Top => remove_temporaries(&path, inside)?,
            _ => {}
        }
    }
    Ok(())
}

/// The entries of a folder, sorted by name.
fn entries(dir: &Path) -> Result<Vec<fs::DirEntry>, LaunchError> {
    let mut entries =
        fs::read_dir(dir).and_then(Iterator::collect::<io::Result<Vec<_>>>).map_err(failed("read", dir))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    Ok(entries)
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LaunchError {
    let path = path.to_owned();
    move |source| LaunchError::OutputIo { what, path, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder with these files; a name that ends with `/` is an empty folder.
    fn folder(names: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            let path = dir.path().join(name);
            fs::create_dir_all(if name.ends_with('/') { &path } else { path.parent().unwrap() }).unwrap();
            if !name.ends_with('/') {
                fs::write(path, name).unwrap();
            }
        }
        dir
    }

    fn held(dir: &Path) -> usize {
        entries(dir).unwrap().len()
    }

    const OUTPUTS: [&str; 15] = [
        "config.resolved.yaml",
        "metrics.jsonl",
        "heatmap-run-1-round-2.svg",
        "random-combined/final_model/config.json",
        "frozen/metrics.jsonl",
        "round_1/model-00001-of-00002.safetensors",
        "final_model/config.json",
        "checkpoints/step_7/state.bin",
        "round_12/",
        "final_model/tokenizer.tiktoken",
        "final_model/additional_chat_templates/tool_use.jinja",
        // temporary names of a killed run
        ".round_2.partial/model.safetensors",
        ".final_model.old/config.json",
        ".metrics.jsonl.qX3f9a.part",
        "round_3/.delta.safetensors.0fG5hJ.part",
    ];

    #[test]
    fn a_new_or_empty_folder_is_fine() {
        let dir = tempfile::tempdir().unwrap();
        for existing in [Existing::Refuse, Existing::Replace, Existing::Keep] {
            prepare_dir(dir.path(), existing).unwrap();
            let new = dir.path().join(format!("{existing:?}/deep"));
            prepare_dir(&new, existing).unwrap();
            assert!(new.is_dir());
            fs::remove_dir_all(new.parent().unwrap()).unwrap();
        }
    }

    #[test]
    fn outputs_are_refused_kept_or_removed() {
        let dir = folder(&OUTPUTS);
        let count = held(dir.path());
        let error = prepare_dir(dir.path(), Existing::Refuse).unwrap_err();
        assert!(error.to_string().contains("not empty"), "{error}");
        assert_eq!(held(dir.path()), count);
        prepare_dir(dir.path(), Existing::Replace).unwrap();
        assert_eq!(held(dir.path()), 0);
    }

    #[test]
    fn what_a_killed_run_left_is_cleared_where_the_rest_is_kept() {
        let dir = folder(&OUTPUTS);
        let foreign =
            ["checkpoints/.round_1-expert-step_3.old/state.json", ".thesis.txt.qX3f9a.part", ".data.partial/a"];
        for name in foreign {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, name).unwrap();
        }
        prepare_dir(dir.path(), Existing::Keep).unwrap();
        let gone = [&OUTPUTS[11..], &foreign[..1]].concat();
        assert!(gone.iter().all(|name| !dir.path().join(name).exists()));
        assert!(OUTPUTS[..11].iter().chain(&foreign[1..]).all(|name| dir.path().join(name).exists()));
    }

    #[test]
    fn a_lock_outlives_what_it_guards() {
        let dir = folder(&[LOCK_FILE, "metrics.jsonl", "frozen/.moewarden.lock", "frozen/metrics.jsonl"]);
        prepare_dir(dir.path(), Existing::Replace).unwrap();
        assert!(held(dir.path()) == 1 && dir.path().join(LOCK_FILE).exists());
        prepare_dir(dir.path(), Existing::Refuse).unwrap();
    }

    #[test]
    fn what_is_not_ours_saves_everything() {
        for foreign in [
            "thesis.txt",
            "final_model/notes.md",
            ".thesis.txt.qX3f9a.part",
            ".data.partial/",
            "final_model/pytorch_model.bin",
            "final_model/.hidden",
            "final_model/additional_chat_templates/deep/",
            "round_x/config.json",
            "data/",
            "round_1/old/",
        ] {
            let dir = folder(&[&OUTPUTS[..], &[foreign]].concat());
            let error = prepare_dir(dir.path(), Existing::Replace).unwrap_err();
            assert!(error.to_string().contains("did not write"), "{error}");
            assert!(OUTPUTS.iter().all(|name| dir.path().join(name).exists()), "{foreign}: something was removed");
        }
    }

    #[test]
    fn a_resumed_run_removes_no_file_of_others() {
        let run = ["metrics.jsonl", "checkpoints/step_7/state.bin", "round_1/config.json", "round_2/"];
        for (foreign, full, says) in [
            ("final_model/notes.md", false, Some("holds final_model/notes.md, which moewarden did not write")),
            ("final_model/old/model.safetensors", false, Some("final_model/old")),
            ("final_model/README.md", false, None),
            ("final_model/config.json", false, None),
            // A round that is written stays, and a delta is written beside other files.
            ("round_1/notes.md", true, None),
            ("round_2/notes.md", false, None),
            ("round_2/notes.md", true, Some("move it away")),
            ("notes.md", true, None),
        ] {
            let dir = folder(&[&run[..], &[foreign]].concat());
            let found = check_resumable(dir.path(), full, &[]).map_err(|e| e.to_string());
            match says {
                Some(says) => assert!(found.unwrap_err().contains(says), "{foreign}"),
                None => assert_eq!(found, Ok(()), "{foreign}"),
            }
        }
    }

    #[test]
    fn what_is_to_be_read_is_not_removed() {
        let dir = folder(&OUTPUTS);
        let count = held(dir.path());
        let model = dir.path().join("final_model");
        let inputs = [Path::new("hub/id"), &model];
        let error = prepare_dir_keeping(dir.path(), Existing::Replace, &inputs).unwrap_err();
        assert!(error.to_string().contains("to be read"), "{error}");
        assert_eq!(held(dir.path()), count);
        prepare_dir_keeping(dir.path(), Existing::Replace, &inputs[..1]).unwrap();
        assert_eq!(held(dir.path()), 0);
    }

    #[test]
    fn a_model_replaces_a_model_and_nothing_else() {
        let model = folder(&["config.json", "model.safetensors"]);
        let run = folder(&["config.json", "metrics.jsonl"]);
        assert!(check_model_dir(model.path(), false, &[]).is_err());
        check_model_dir(model.path(), true, &[]).unwrap();
        assert!(check_model_dir(model.path(), true, &[model.path()]).is_err());
        assert!(check_model_dir(run.path(), true, &[]).is_err());
        let data = folder(&["rows.json", "README.md"]);
        assert!(check_model_dir(data.path(), true, &[]).unwrap_err().to_string().contains("config.json"));
        check_model_dir(&run.path().join("new"), false, &[]).unwrap();
        assert!(!run.path().join("new").exists() && held(model.path()) == 2);
    }

    #[cfg(unix)]
    #[test]
    fn links_are_not_followed() {
        let elsewhere = folder(&["config.json"]);
        let dir = folder(&["metrics.jsonl"]);
        std::os::unix::fs::symlink(elsewhere.path(), dir.path().join("final_model")).unwrap();
        assert!(prepare_dir(dir.path(), Existing::Replace).is_err());
        assert_eq!(held(elsewhere.path()), 1);
    }

    #[test]
    fn a_file_is_no_folder() {
        let dir = folder(&["file"]);
        let error = prepare_dir(&dir.path().join("file"), Existing::Keep).unwrap_err();
        assert!(error.to_string().contains("is a file"), "{error}");
    }
}
