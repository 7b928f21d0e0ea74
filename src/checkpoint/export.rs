//! A complete Hugging Face folder: the source model with some parameters changed.
//!
//! A shard is copied byte for byte, header included, except for the bytes of changed parameters. So names, order,
//! formats and metadata are the source's, whatever they are, and an unchanged shard is an identical file.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::aside::AsideDir;
use super::error::Error;
use crate::backend::{HostTensor, SharedBytes};
use crate::model::{Checkpoint, ParamId, ParamKind, ParamTable, safe_file};

/// Folders of a model that hold no weights: <https://huggingface.co/docs/transformers/chat_templating>.
const FOLDERS: [&str; 1] = ["additional_chat_templates"];

/// Endings of files that hold weights, which are those of another format or written anew.
const WEIGHT_ENDINGS: [&str; 12] =
    ["safetensors", "bin", "pt", "pth", "ckpt", "h5", "msgpack", "gguf", "ggml", "onnx", "npz", "ot"];

/// Indices of weights; the one in use is written apart.
const INDEX_ENDING: &str = ".index.json";

/// The index of shards.
const SHARD_INDEX: &str = "model.safetensors.index.json";

/// Writes the model of `source_dir` with the parameters `changed` to the new folder `out_dir`.
///
/// Shards keep their names, headers and order; the index, configuration, tokenizer and all other small files are copied
/// as they are (pickles and other weight formats are not). A second copy of a tied embedding changes with it.
///
/// # Errors
/// An `out_dir` that exists and is not empty, or a read or write that fails: then nothing is left behind.
///
/// # Panics
/// If a changed value has another shape or format than its parameter.
pub fn export(
    source_dir: &Path,
    checkpoint: &Checkpoint,
    table: &ParamTable,
    changed: &BTreeMap<ParamId, HostTensor>,
    out_dir: &Path,
) -> Result<(), Error> {
    let taken = match fs::read_dir(out_dir) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    };
    if taken {
        return Err(Error::Exists(out_dir.into())); // before the work, not after it
    }
    write_model(source_dir, checkpoint, table, changed, out_dir)?.finish(false)
}

/// The same, but an `out_dir` that exists gives way to the new one once that is whole: for a run that was interrupted.
///
/// # Errors
/// A read or write that fails: then `out_dir` is as it was.
pub fn export_over(
    source_dir: &Path,
    checkpoint: &Checkpoint,
    table: &ParamTable,
    changed: &BTreeMap<ParamId, HostTensor>,
    out_dir: &Path,
) -> Result<(), Error> {
    write_model(source_dir, checkpoint, table, changed, out_dir)?.finish(true)
}

fn write_model(
    source_dir: &Path,
    checkpoint: &Checkpoint,
    table: &ParamTable,
    changed: &BTreeMap<ParamId, HostTensor>,
    out_dir: &Path,
) -> Result<AsideDir, Error> {
    let aside = AsideDir::create(out_dir)?;
    let patches = patches(checkpoint, table, changed);
    // Side by side: the file systems of clusters are slow for one stream and fast for many.
    checkpoint.shards().par_iter().zip(&patches).try_for_each(|(shard, patches)| {
        aside.write(Path::new(&shard.file), |out| write_patched(out, shard.bytes(), patches))
    })?;
    for file in small_files(source_dir, checkpoint.index_file())? {
        let from = safe_file(source_dir, &file)?;
        let mut from = fs::File::open(&from).map_err(Error::read(&from))?;
        aside.write(&file, |out| io::copy(&mut from, out).map(|_| ()))?;
    }
    Ok(aside)
}

/// Whether an export may write a file of this name: a shard or one of the small files beside it.
pub fn is_model_file(name: &str) -> bool {
    let shard = Path::new(name).extension().is_some_and(|ending| ending == "safetensors");
    shard || name == SHARD_INDEX || !name.starts_with('.') && !is_weights(name, None)
}

/// Whether an export copies a folder of this name.
pub fn is_model_folder(name: &str) -> bool {
    FOLDERS.contains(&name)
}

/// For each shard the byte ranges that change, in order.
fn patches(
    checkpoint: &Checkpoint,
    table: &ParamTable,
    changed: &BTreeMap<ParamId, HostTensor>,
) -> Vec<Vec<(Range<usize>, SharedBytes)>> {
    let mut patches = vec![Vec::new(); checkpoint.shards().len()];
    let mut patch = |tensor: &str, within: &Range<usize>, bytes: &SharedBytes| {
        let shard = checkpoint.shard_of(tensor).expect("the table was made from this checkpoint");
        let (_, info) = checkpoint.get(tensor).expect("the table was made from this checkpoint");
        let start = info.file_range.start + within.start;
        patches[shard].push((start..start + within.len(), bytes.clone()));
    };
    for (&id, value) in changed {
        let spec = &table.params[id];
        let same = value.shape == spec.value.shape && value.dtype == spec.value.dtype;
        assert!(same, "the changed value of `{}` has another shape or format", spec.name());
        patch(&spec.tensor, &spec.byte_range, &value.bytes);
        if spec.kind == ParamKind::Embedding
            && let Some(head) = table.tied_head(checkpoint)
        {
            patch(head, &spec.byte_range, &value.bytes);
        }
    }
    for shard in &mut patches {
        shard.sort_by_key(|(range, _)| range.start);
    }
    patches
}

/// `source` with the patched ranges replaced. Straight from the mapped file: no shard is ever held in memory.
fn write_patched(out: &mut dyn Write, source: &[u8], patches: &[(Range<usize>, SharedBytes)]) -> io::Result<()> {
    let mut at = 0;
    for (range, bytes) in patches {
        out.write_all(&source[at..range.start])?;
        out.write_all(bytes)?;
        at = range.end;
    }
    out.write_all(&source[at..])
}

/// The files of a model besides its weights, relative to its folder, sorted; hidden ones are left out.
fn small_files(dir: &Path, index: Option<&str>) -> Result<Vec<PathBuf>, Error> {
    let mut files = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let here = dir.join(&folder);
        for entry in fs::read_dir(&here).map_err(Error::read(&here))? {
            let entry = entry.map_err(Error::read(&here))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with('.') || is_weights(&name, index) {
                continue;
            }
            let path = folder.join(entry.file_name());
            let kind = fs::metadata(entry.path()).map_err(Error::read(&entry.path()))?.file_type();
            if kind.is_file() {
                files.push(path);
            } else if kind.is_dir() && folder.as_os_str().is_empty() && FOLDERS.contains(&&*name) {
                folders.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

fn is_weights(name: &str, index: Option<&str>) -> bool {
    let ending = Path::new(name).extension().and_then(|ending| ending.to_str()).unwrap_or("");
    WEIGHT_ENDINGS.contains(&ending) || (name.ends_with(INDEX_ENDING) && index != Some(name))
}
