//! Prepares the output folder. A run never writes among foreign files, and `--overwrite` deletes only files that
//! moewarden writes.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::LaunchError;
use super::lock::LOCK_FILE;
use super::outputs::{Outputs, Place, entries, failed, folder, is_output, round_of};
use crate::checkpoint::{self, Position};
use crate::config::{Init, RunConfig, SaveRounds};
use crate::files;
use crate::quote::quote;
use crate::report::OWN_REPLIES;
use crate::train::Phase;

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
    // A run of random weights has no checkpoints.
    let finished = if config.init == Init::Random { &FINISHED[..1] } else { &FINISHED };
    if config.resume { check_resumable(dir, full, finished, &config.inputs()) } else { Ok(()) }
}

/// What a run leaves that has finished: a model, or of an identification, which has no checkpoints, the metadata. A training run writes
/// those after its first checkpoint.
const FINISHED: [&str; 2] = ["final_model", "training_metadata.json"];

/// Refuses a folder in which `--resume` would replace what is no output of the run that it continues: files of others in the final
/// model and, with `rounds`, in the models of rounds that come; and, where no checkpoint is found and the run starts from the
/// beginning, what a run that has `finished` leaves.
fn check_resumable(dir: &Path, rounds: bool, finished: &[&str], inputs: &[&Path]) -> Result<(), LaunchError> {
    if !dir.is_dir() {
        return Ok(());
    }
    let newest = checkpoint::newest_position(&dir.join("checkpoints"));
    // A model that is there has the files of its source, whatever their names; the source of a hub id is not known here.
    let source = inputs.iter().find(|path| path.join("config.json").is_file());
    let mut foreign = None;
    for entry in entries(dir)? {
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| folder(name, Place::Top) == Some(Place::Model)) else { continue };
        // A round before that of the checkpoint is not written again, but for one that has just ended there.
        let ended = |round: usize, at: Position| round <= at.round && at != Position::start(round, Phase::Identify);
        let kept = |at: Position| round_of(name).is_some_and(|round| !rounds || ended(round, at));
        let model = entry.path();
        if foreign.is_some() || !model.is_dir() || newest.is_some_and(kept) {
            continue;
        }
        let mut found = Outputs::default();
        found.collect(&model, Place::Model)?;
        let copied = |file: &PathBuf| {
            let name = file.strip_prefix(&model).unwrap_or(file);
            model.join("config.json").is_file() && source.is_none_or(|source| source.join(name).exists())
        };
        foreign = found.foreign.into_iter().find(|file| !copied(file));
    }
    let relative = |path: PathBuf| path.strip_prefix(dir).unwrap_or(&path).display().to_string();
    let message = match (newest, foreign) {
        (Some(_), None) => return Ok(()),
        (Some(_), Some(foreign)) => format!(
            "holds {}, which is no output of a run and which a resumed one would delete with the model beside it: move it away",
            relative(foreign)
        ),
        (None, foreign) => {
            let whole = fs::canonicalize(dir).map_err(failed("read", dir))?;
            let is_input = inputs.iter().any(|input| fs::canonicalize(input).is_ok_and(|input| input == whole));
            let mut finished = finished.iter().map(|name| dir.join(name));
            let held = match finished.find(|path| path.exists()).or(foreign) {
                _ if is_input => "the model that is to be trained".to_owned(),
                Some(held) => relative(held),
                None => return Ok(()),
            };
            format!(
                "holds {held}, but no checkpoint that --resume could continue, and a run from the beginning would replace it: give \
                 another --output-dir, or --overwrite to delete an earlier run's outputs"
            )
        }
    };
    Err(LaunchError::OutputDir { path: dir.to_owned(), message })
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

/// Deletes those of the folders `names` of the output folder `dir` that exist.
///
/// # Errors
/// [`LaunchError::OutputDir`] if one holds what is no output of a run: then nothing is deleted. [`LaunchError::OutputIo`].
pub fn remove_output_folders(dir: &Path, names: &[&str]) -> Result<(), LaunchError> {
    let mut outputs = Outputs::default();
    for entry in entries(dir)?.into_iter().filter(|entry| names.iter().any(|name| entry.file_name() == *name)) {
        outputs.collect_entry(&entry, Place::Top)?;
    }
    outputs.refuse_kept(dir, &[])?;
    outputs.remove(&[])
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
    outputs.remove(&kept)
}

/// The outputs to delete from `dir`; `None` if the folder does not exist yet.
fn inspect(dir: &Path, existing: Existing, inputs: &[&Path], place: Place) -> Result<Option<Outputs>, LaunchError> {
    let refused = |message: String| LaunchError::OutputDir { path: dir.to_owned(), message };
    match fs::metadata(dir) {
        Ok(meta) if !meta.is_dir() => return Err(refused("is a file; give a folder with --output-dir".into())),
        Ok(_) => {}
        Err(e) if e.kind() == ErrorKind::NotFound => {
            // Without the slash at the end, behind which a link is followed.
            let links = dir.components().as_path().ancestors().take_while(|path| !path.exists());
            let Some((link, target)) = links.filter_map(|path| Some((path, fs::read_link(path).ok()?))).last() else {
                return Ok(None);
            };
            let message = format!(
                "is a link to {}, which does not exist: create that folder, or give another --output-dir",
                quote(&target.to_string_lossy())
            );
            return Err(LaunchError::OutputDir { path: link.into(), message });
        }
        Err(e) => return Err(failed("read", dir)(e)),
    }
    let mut outputs = Outputs::default();
    match existing {
        Existing::Keep => {
            let blocks = |entry: &fs::DirEntry| {
                let name = entry.file_name();
                name.to_str().is_some_and(|name| folder(name, place).is_some()) && entry.path().is_file()
            };
            if let Some(file) = entries(dir)?.iter().find(|entry| blocks(entry)) {
                let name = file.file_name().display().to_string();
                return Err(refused(format!("holds a file {name}, where a folder of this name belongs: move it away")));
            }
        }
        // The lock file belongs to this process or to a killed one.
        Existing::Refuse if entries(dir)?.iter().all(|entry| entry.file_name() == LOCK_FILE) => {}
        Existing::Refuse => {
            outputs.collect(dir, place)?;
            let (overwrite, instead) = match outputs.kept(dir, inputs)? {
                None => ("--overwrite to delete an earlier run's outputs from it, ", String::new()),
                Some(what) => ("", format!(" (--overwrite would not do: the folder holds {what})")),
            };
            return Err(refused(format!(
                "is not empty; give another --output-dir, {overwrite}or (train, eval, compare) --resume to continue that run{instead}"
            )));
        }
        Existing::Replace => {
            outputs.collect(dir, place)?;
            outputs.refuse_kept(dir, inputs)?;
        }
    }
    Ok(Some(outputs))
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

    const OUTPUTS: [&str; 19] = [
        "config.resolved.yaml",
        "metrics.jsonl",
        "heatmap-run-1-round-2.svg",
        "random-combined/final_model/config.json",
        "frozen/metrics.jsonl",
        "round_1/model-00001-of-00002.safetensors",
        "final_model/config.json",
        "checkpoints/round_1-expert-step_3/state.json",
        "checkpoints/round_1-expert-step_3/optimizer-0-of-2.safetensors",
        "round_12/",
        "retain_cache/0123456789abcdef0123456789abcdef/manifest.json",
        "final_model/tokenizer.tiktoken",
        "final_model/additional_chat_templates/tool_use.jinja",
        // temporary names of a killed run
        ".round_2.partial/model.safetensors",
        ".final_model.old/config.json",
        ".metrics.jsonl.qX3f9a.part",
        "round_3/.delta.safetensors.0fG5hJ.part",
        "checkpoints/.round_1-router-step_0.partial/manifest.json",
        "retain_cache/.0123456789abcdef0123456789abcdef.partial/base.safetensors",
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
        let gone = [&OUTPUTS[13..], &foreign[..1]].concat();
        assert!(gone.iter().all(|name| !dir.path().join(name).exists()));
        assert!(OUTPUTS[..13].iter().chain(&foreign[1..]).all(|name| dir.path().join(name).exists()));
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
            "checkpoints/thesis.txt",
            "checkpoints/best/",
            "checkpoints/round_1-expert-step_3/thesis.txt",
            "checkpoints/round_1-expert-step_3/optimizer-x.safetensors",
            "checkpoints/round_1-expert-step_3/old/",
            "retain_cache/thesis.txt",
            "retain_cache/0123456789abcdef0123456789abcdef/thesis.txt",
        ] {
            let dir = folder(&[&OUTPUTS[..], &[foreign]].concat());
            let error = prepare_dir(dir.path(), Existing::Replace).unwrap_err();
            assert!(error.to_string().contains("no output of a run"), "{error}");
            assert!(OUTPUTS.iter().all(|name| dir.path().join(name).exists()), "{foreign}: something was removed");
        }
    }

    #[test]
    fn a_resumed_run_deletes_nothing_of_others() {
        let saved = ["checkpoints/round_2-expert-step_3/state.json", "round_1/config.json", "final_model/config.json"];
        let source = folder(&["config.json", "modeling.py"]);
        let inputs = [source.path()];
        let resumed = |more: &[&str], rounds| {
            check_resumable(folder(&[&saved[..], more].concat()).path(), rounds, &FINISHED, &inputs)
        };
        let check = |more: &[&str]| resumed(more, true);
        check(&[]).unwrap();
        // The model of the first round is not written again.
        check(&["round_1/notes.md", "thesis.txt"]).unwrap();
        let just_ended = folder(&["checkpoints/round_2-identify-step_0/state.json", "round_1/notes.md"]);
        check_resumable(just_ended.path(), true, &FINISHED, &inputs).unwrap_err();
        // A delta is written beside other files, and a model has the files of its source.
        resumed(&["round_2/notes.md"], false).unwrap();
        check(&["final_model/modeling.py", "final_model/README.md"]).unwrap();
        for foreign in ["final_model/notes.md", "final_model/eval/", "round_2/notes.md", ".round_2.partial/notes.md"] {
            let error = check(&[foreign]).unwrap_err().to_string();
            assert!(error.contains(foreign.trim_end_matches('/')) && error.contains("move it away"), "{error}");
        }
        let fresh = |files: &[&str]| check_resumable(folder(files).path(), true, &FINISHED, &inputs);
        fresh(&["metrics.jsonl", "expert_scores.json", "round_1/config.json"]).unwrap();
        for held in ["final_model/config.json", "round_1/notes.md", "training_metadata.json"] {
            // What is among the checkpoints is none.
            let error = fresh(&[held, "checkpoints/notes.md"]).unwrap_err().to_string();
            assert!(error.contains("no checkpoint that --resume could continue"), "{error}");
        }
    }

    #[test]
    fn a_file_in_the_place_of_a_folder_is_named() {
        for name in ["final_model", "checkpoints", "round_3", "tensorboard", "retain_cache"] {
            let dir = folder(&["metrics.jsonl", name]);
            let error = prepare_dir(dir.path(), Existing::Keep).unwrap_err().to_string();
            assert!(error.contains(&format!("holds a file {name}, where a folder")), "{error}");
        }
    }

    #[test]
    fn folders_are_removed_whole_or_not_at_all() {
        let names = ["final_model", "checkpoints", "retain_cache"];
        let dir = folder(&OUTPUTS);
        remove_output_folders(dir.path(), &names).unwrap();
        assert!(names.iter().all(|name| !dir.path().join(name).exists()));
        assert!(dir.path().join("metrics.jsonl").exists() && dir.path().join("round_12").exists());
        let dir = folder(&[&OUTPUTS[..], &["checkpoints/notes.md"]].concat());
        assert!(remove_output_folders(dir.path(), &names).unwrap_err().to_string().contains("checkpoints/notes.md"));
        assert!(OUTPUTS.iter().all(|name| dir.path().join(name).exists()));
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
