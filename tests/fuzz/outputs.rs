//! What a run may leave in its output folder.

use std::fs;
use std::path::{Path, PathBuf};

use moewarden::model::{Checkpoint, ModelConfig, ParamTable};
use serde_json::Value;

/// The first file of others below `folder` that a run has changed or removed.
pub fn changed(folder: &Path, foreign: &[(PathBuf, Vec<u8>)]) -> Option<String> {
    let kept = |(name, content): &&(PathBuf, Vec<u8>)| fs::read(folder.join(name)).is_ok_and(|found| found == *content);
    let (name, _) = foreign.iter().find(|file| !kept(file))?;
    Some(format!("it changed or removed {}, which is a file of others", name.display()))
}

/// What is wrong with the output folder of a run that ended with `code`, files of others aside.
pub fn fault(folder: &Path, command: &str, code: i32, foreign: &[(PathBuf, Vec<u8>)]) -> Option<String> {
    if !folder.exists() {
        return (code == 0 && command != "check").then(|| "exit code 0 without an output folder".into());
    }
    let names = names(folder);
    if code != 0 {
        return names.is_empty().then(|| "a failed run left an empty output folder".into());
    }
    let of_others = |name: &str| foreign.iter().any(|(path, _)| path.components().any(|part| part.as_os_str() == name));
    let temporary = |name: &&String| [".part", ".partial"].iter().any(|end| name.ends_with(end)) && !of_others(name);
    if let Some(left) = names.iter().find(temporary) {
        return Some(format!("it left the temporary file {left}"));
    }
    let needed: &[&str] = match command {
        "identify" => &["expert_scores.json", "rankings.json", "training_metadata.json"],
        "train" => &["expert_scores.json", "rankings.json", "training_metadata.json", "expert_gradients.pkl"],
        "eval" => &["eval.json"],
        "ablate" => &["ablation.json"],
        "compare" => &["compare.json"],
        _ => &[],
    };
    let broken = needed.iter().find_map(|name| match fs::read(folder.join(name)) {
        Err(_) => Some(format!("exit code 0 without {name}")),
        Ok(bytes) if name.ends_with(".json") && serde_json::from_slice::<Value>(&bytes).is_err() => {
            Some(format!("exit code 0 with a torn {name}"))
        }
        Ok(bytes) => bytes.is_empty().then(|| format!("exit code 0 with an empty {name}")),
    });
    let model = match command {
        "train" => Some(folder.join("final_model")),
        "export" => Some(folder.to_owned()),
        _ => None,
    };
    broken.or_else(|| model.and_then(|model| unusable(&model)))
}

fn names(folder: &Path) -> Vec<String> {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
}

/// Why an exported model cannot be used.
fn unusable(model: &Path) -> Option<String> {
    let said = |what: String| Some(format!("exit code 0 with a model that cannot be read: {what}"));
    let opened = ModelConfig::from_dir(model).map_err(|e| e.to_string());
    let opened = opened.and_then(|config| Ok((config, Checkpoint::open(model).map_err(|e| e.to_string())?)));
    let table = opened.and_then(|(config, weights)| ParamTable::build(&config, &weights).map_err(|e| e.to_string()));
    match table {
        Err(what) => said(what),
        Ok(table) => table.check_finite().err().and_then(|what| said(what.to_string())),
    }
}
