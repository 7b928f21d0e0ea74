//! A delta: only the changed parameters, in one safetensors file.
//!
//! Every expert matrix is a tensor of its own (`model.layers.3.mlp.experts.7.gate_proj.weight`), even if the base model
//! fuses its experts into one tensor. Each tensor has the shape and dtype of its parameter. The metadata:
//!
//! | key | value |
//! |---|---|
//! | `schema` | `moewarden.delta/1` |
//! | `base_layout` | blake3 of the file names and safetensors headers of the base model |
//! | `base_values` | blake3 of the base model's values of these parameters, in the order of the delta file |
//!
//! Applying a delta checks both hashes, so it cannot be applied to another model.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Write;
use std::path::Path;

use super::error::Error;
use super::export::{export, export_replacing};
use crate::backend::HostTensor;
use crate::files;
use crate::meter::{Meter, Unit};
use crate::model::{Checkpoint, ModelConfig, NotFinite, ParamId, ParamTable, Shard, find_non_finite, write_header};

/// Value of the metadata key `schema`.
pub const DELTA_SCHEMA: &str = "moewarden.delta/1";

/// Writes the changed parameters of a model as a delta to the file `path`.
///
/// # Errors
/// A write that fails; `path` is then as it was before.
pub fn save_delta(
    checkpoint: &Checkpoint,
    table: &ParamTable,
    changed: &BTreeMap<ParamId, HostTensor>,
    path: &Path,
) -> Result<(), Error> {
    let metadata = [
        ("format".into(), "pt".into()),
        ("schema".into(), DELTA_SCHEMA.into()),
        ("base_layout".into(), checkpoint.layout_hash().to_string()),
        ("base_values".into(), base_values(table, changed.keys())),
    ];
    let tensors: Vec<_> =
        changed.iter().map(|(&id, value)| (table.params[id].name(), value.dtype, value.shape.clone())).collect();
    fs::create_dir_all(files::folder_of(path)).map_err(Error::create(path))?;
    let bytes = changed.values().map(|value| value.bytes.len() as u64).sum();
    let meter = Meter::start(format!("writing {}", path.display()), Unit::Bytes, bytes);
    Ok(files::write_with(path, |out| {
        write_header(out, &metadata, &tensors)?;
        changed.values().try_for_each(|value| {
            meter.add(value.bytes.len());
            out.write_all(&value.bytes)
        })
    })?)
}

/// Reads a delta file: the changed parameters, memory-mapped. Checks that the delta was made from this base model.
///
/// # Errors
/// A file that is not a delta, was made from another base model, or has a tensor whose name, shape or dtype does not
/// match the base model.
pub fn load_delta(
    checkpoint: &Checkpoint,
    table: &ParamTable,
    delta_file: &Path,
) -> Result<BTreeMap<ParamId, HostTensor>, Error> {
    let file = || delta_file.to_path_buf();
    let delta = Shard::open(delta_file)?;
    let metadata: HashMap<&str, &str> = delta.header.metadata.iter().map(|(k, v)| (&**k, &**v)).collect();
    match metadata.get("schema") {
        Some(&DELTA_SCHEMA) => {}
        Some(other) => return Err(Error::NotADelta { file: file(), message: format!("its schema is `{other}`") }),
        None => return Err(Error::NotADelta { file: file(), message: "its metadata has no schema".into() }),
    }
    let other_base = |message| Error::OtherBase { file: file(), base: checkpoint.dir().into(), message };
    if metadata.get("base_layout") != Some(&&*checkpoint.layout_hash().to_string()) {
        return Err(other_base("their files, tensor names or shapes differ"));
    }

    let ids: HashMap<String, ParamId> = table.iter().map(|(id, spec)| (spec.name(), id)).collect();
    let mut changed = BTreeMap::new();
    let mut order = Vec::new();
    for info in &delta.header.tensors {
        let wrong = |message| Error::DeltaTensor { file: file(), tensor: info.name.clone(), message };
        let id = *ids.get(&info.name).ok_or_else(|| wrong("the base model has no such parameter".into()))?;
        let (value, base) = (delta.value(info)?, &table.params[id].base);
        if value.shape != base.shape || value.dtype != base.dtype {
            let (found, expected) = ((value.dtype, value.shape), (base.dtype, &base.shape));
            return Err(wrong(format!("is {found:?}, in the base model {expected:?}")));
        }
        changed.insert(id, value);
        order.push(id);
    }
    if metadata.get("base_values") != Some(&&*base_values(table, &order)) {
        return Err(other_base("the weights it replaces differ"));
    }
    Ok(changed)
}

/// Writes the model of `base_dir` with the delta applied to it to the new folder `out_dir`.
///
/// # Errors
/// Those of opening the base, of [`load_delta`] and of [`export`]; a weight that is not finite.
pub fn apply_delta(base_dir: &Path, delta_file: &Path, out_dir: &Path) -> Result<(), Error> {
    apply_delta_by(base_dir, delta_file, out_dir, export)
}

/// [`apply_delta`], but an existing `out_dir` is replaced once the new folder is complete.
///
/// # Errors
/// Those of opening the base, of [`load_delta`] and of [`export_replacing`].
pub fn apply_delta_replacing(base_dir: &Path, delta_file: &Path, out_dir: &Path) -> Result<(), Error> {
    apply_delta_by(base_dir, delta_file, out_dir, export_replacing)
}

type Export = fn(&Path, &Checkpoint, &ParamTable, &BTreeMap<ParamId, HostTensor>, &Path) -> Result<(), Error>;

fn apply_delta_by(base_dir: &Path, delta_file: &Path, out_dir: &Path, export: Export) -> Result<(), Error> {
    let config = ModelConfig::from_dir(base_dir)?;
    let checkpoint = Checkpoint::open(base_dir)?;
    let table = ParamTable::build(&config, &checkpoint)?;
    let changed = load_delta(&checkpoint, &table, delta_file)?;
    table.check_finite().map_err(|source| Error::NotFinite { file: base_dir.into(), source })?;
    for (&id, value) in &changed {
        if let Some(index) = find_non_finite(value) {
            let source = NotFinite { tensor: table.params[id].name(), index };
            return Err(Error::NotFinite { file: delta_file.into(), source });
        }
    }
    export(base_dir, &checkpoint, &table, &changed, out_dir)
}

/// blake3 over the base model's values of these parameters.
fn base_values<'a>(table: &ParamTable, ids: impl IntoIterator<Item = &'a ParamId> + Clone) -> String {
    let mut hasher = blake3::Hasher::new();
    let size = |&id: &ParamId| table.params[id].base.bytes.len();
    let bytes = ids.clone().into_iter().map(|id| size(id) as u64).sum();
    let meter = Meter::start("hashing the base model's values", Unit::Bytes, bytes);
    for id in ids {
        hasher.update(&table.params[*id].base.bytes);
        meter.add(size(id));
    }
    hasher.finalize().to_string()
}
