//! Exports a complete Hugging Face model folder: the source model with some parameters changed.
//!
//! Shards are copied byte for byte, header included, except for the bytes of changed parameters. So tensor names,
//! order, dtypes and metadata are the source's, and an unchanged shard is an identical file.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::atomic_dir::AtomicDir;
use super::error::Error;
use crate::backend::{HostTensor, SharedBytes};
use crate::input;
use crate::meter::{Meter, Unit};
use crate::model::{Checkpoint, ParamId, ParamKind, ParamTable, safe_file};

/// Subfolders of a model folder that are copied: <https://huggingface.co/docs/transformers/chat_templating>.
const COPIED_FOLDERS: [&str; 1] = ["additional_chat_templates"];

/// File extensions of weights, which are not copied: safetensors shards are written by the export, and other formats
/// would hold the unchanged weights.
const WEIGHT_EXTENSIONS: [&str; 12] =
    ["safetensors", "bin", "pt", "pth", "ckpt", "h5", "msgpack", "gguf", "ggml", "onnx", "npz", "ot"];

/// Ending of index files of weights. Only the index of the safetensors shards is copied.
const INDEX_ENDING: &str = ".index.json";

/// Bytes that are written at a time.
const CHUNK: usize = 8 << 20;

/// The index of the safetensors shards.
const SHARD_INDEX: &str = "model.safetensors.index.json";

/// Writes the model of `source_dir` with the parameters `changed` to the new folder `out_dir`.
///
/// Shards keep their names, headers and order. The index, configuration, tokenizer and other files without weights are
/// copied; weights in other formats (pickles, for example) are not. If the checkpoint stores a tied embedding twice,
/// both copies change.
///
/// # Errors
/// An `out_dir` that exists and is not empty, or a read or write that fails; no incomplete folder is left.
///
/// # Panics
/// If a changed value has another shape or dtype than its parameter.
pub fn export(
    source_dir: &Path,
    checkpoint: &Checkpoint,
    table: &ParamTable,
    changed: &BTreeMap<ParamId, HostTensor>,
    out_dir: &Path,
) -> Result<(), Error> {
    let occupied = match fs::read_dir(out_dir) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) => error.kind() != io::ErrorKind::NotFound,
    };
    if occupied {
        return Err(Error::Exists(out_dir.into())); // checked before the work, not only at the rename
    }
    write_model(source_dir, checkpoint, table, changed, out_dir)?.finish(false)
}

/// [`export`], but an existing `out_dir` is replaced once the new folder is complete: for a resumed run.
///
/// # Errors
/// A read or write that fails; `out_dir` is then as it was before.
pub fn export_replacing(
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
) -> Result<AtomicDir, Error> {
    let aside = AtomicDir::create(out_dir)?;
    let patches = patches(checkpoint, table, changed);
    let bytes = checkpoint.shards().iter().map(|shard| shard.bytes().len() as u64).sum();
    let meter = Meter::start(format!("writing {}", out_dir.display()), Unit::Bytes, bytes);
    // Write shards in parallel: cluster file systems are slow for one stream and fast for many.
    checkpoint.shards().par_iter().zip(&patches).try_for_each(|(shard, patches)| {
        aside.write(Path::new(&shard.file), |out| write_patched(out, shard.bytes(), patches, &meter))
    })?;
    for file in files_without_weights(source_dir, checkpoint.index_file())? {
        let from = safe_file(source_dir, &file)?;
        let mut from = input::open(&from).map_err(Error::read(&from))?;
        aside.write(&file, |out| io::copy(&mut from, out).map(|_| ()))?;
    }
    Ok(aside)
}

/// Whether `dir` holds an export of this model: its shards with the headers of the source, and the files beside them as they are
/// there.
pub fn is_export(source_dir: &Path, checkpoint: &Checkpoint, dir: &Path) -> bool {
    let same = |file: &PathBuf| {
        let [ours, theirs] = [source_dir, dir].map(|folder| input::read(&folder.join(file)));
        ours.is_ok_and(|ours| theirs.is_ok_and(|theirs| ours == theirs))
    };
    let layout = Checkpoint::open(dir).map(|written| written.layout_hash());
    layout.is_ok_and(|layout| layout == checkpoint.layout_hash())
        && files_without_weights(source_dir, checkpoint.index_file()).is_ok_and(|files| files.iter().all(same))
}

/// Checks that an export can copy the files beside the weights, before anything is computed.
///
/// # Errors
/// A symbolic link that is broken or leads out of the folder; a folder that cannot be read.
pub fn check_copied(source_dir: &Path, checkpoint: &Checkpoint) -> Result<(), Error> {
    for file in files_without_weights(source_dir, checkpoint.index_file())? {
        safe_file(source_dir, &file)?;
    }
    Ok(())
}

/// Whether an export can write a file of this name: a shard, the index, or a file without weights.
pub fn is_model_file(name: &str) -> bool {
    let shard = Path::new(name).extension().is_some_and(|extension| extension == "safetensors");
    shard || name == SHARD_INDEX || !name.starts_with('.') && !is_weights(name, None)
}

/// Whether an export copies a subfolder of this name.
pub fn is_model_folder(name: &str) -> bool {
    COPIED_FOLDERS.contains(&name)
}

/// For each shard, the byte ranges that change and their new bytes, ascending.
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
        let same = value.shape == spec.shape() && value.dtype == spec.dtype();
        assert!(same, "the changed value of `{}` has another shape or dtype", spec.name());
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

/// Writes `source` with the patched ranges replaced. `source` is a memory-mapped file: no shard is held in memory.
fn write_patched(
    out: &mut dyn Write,
    source: &[u8],
    patches: &[(Range<usize>, SharedBytes)],
    meter: &Meter,
) -> io::Result<()> {
    let mut write = |bytes: &[u8]| {
        bytes.chunks(CHUNK).try_for_each(|chunk| {
            out.write_all(chunk)?;
            meter.add(chunk.len());
            Ok::<_, io::Error>(())
        })
    };
    let mut done = 0;
    for (range, bytes) in patches {
        write(&source[done..range.start])?;
        write(bytes)?;
        done = range.end;
    }
    write(&source[done..])
}

/// The files to copy, which hold no weights: paths relative to the model folder, sorted. Hidden files are left out.
fn files_without_weights(dir: &Path, index: Option<&str>) -> Result<Vec<PathBuf>, Error> {
    let mut files = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        let path = dir.join(&folder);
        for entry in fs::read_dir(&path).map_err(Error::read(&path))? {
            let entry = entry.map_err(Error::read(&path))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with('.') || is_weights(&name, index) {
                continue;
            }
            let path = folder.join(entry.file_name());
            let kind = fs::metadata(entry.path()).map_err(|source| match entry.path().is_symlink() {
                true => Error::BrokenLink { path: entry.path(), source },
                false => Error::Read { path: entry.path(), source },
            })?;
            let kind = kind.file_type();
            if kind.is_file() {
                files.push(path);
            } else if kind.is_dir() && folder.as_os_str().is_empty() && COPIED_FOLDERS.contains(&&*name) {
                folders.push(path);
            } else if !kind.is_dir() || is_named_as_file(&name) {
                // A pipe, or a folder in the place of a file: without it, the export would not be the model.
                input::open(&entry.path()).map_err(Error::read(&entry.path()))?;
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Whether a name is that of a file beside the weights, and of no folder.
fn is_named_as_file(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(|extension| extension.to_str()).unwrap_or("");
    ["json", "jinja", "model", "tiktoken", "txt", "md"].contains(&extension)
}

/// Whether a file of this name holds weights, or is an index of weights other than `index`.
fn is_weights(name: &str, index: Option<&str>) -> bool {
    let extension = Path::new(name).extension().and_then(|extension| extension.to_str()).unwrap_or("");
    WEIGHT_EXTENSIONS.contains(&extension) || (name.ends_with(INDEX_ENDING) && index != Some(name))
}
