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
//! | `base_weights` | blake3 of all values of the base model, in the order of its parameters |
//! | `base_config` | config.json of the base model |
//! | `values` | blake3 of the tensors of the delta file |
//!
//! Applying a delta checks all of them, so it cannot be applied to another model, nor with a part of it lost. Deltas of older
//! versions lack the last three.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Write;
use std::path::Path;

use serde_json::{Map, Value};

use super::error::Error;
use super::export::{export, export_replacing};
use crate::backend::HostTensor;
use crate::files;
use crate::input;
use crate::meter::{Meter, Unit};
use crate::model::{
    Checkpoint, ModelConfig, NotFinite, ParamId, ParamTable, Shard, find_non_finite, hash_values, write_header,
};
use crate::quote::cut;

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
        ("base_values".into(), values_hash(table, changed.keys())),
        ("base_weights".into(), table.hashed().finalize().to_string()),
        ("base_config".into(), read_config(checkpoint.dir())?),
        ("values".into(), hash(changed.values())),
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
    let other_base = |message: &str| other_base(delta_file, checkpoint.dir(), message);
    if metadata.get("base_layout") != Some(&&*checkpoint.layout_hash().to_string()) {
        return Err(other_base("their files, tensor names or shapes differ"));
    }

    let ids: HashMap<String, ParamId> = table.iter().map(|(id, spec)| (spec.name(), id)).collect();
    let mut changed = BTreeMap::new();
    for info in &delta.header.tensors {
        let wrong = |message| Error::DeltaTensor { file: file(), tensor: info.name.clone(), message };
        let id = *ids.get(&info.name).ok_or_else(|| wrong("the base model has no such parameter".into()))?;
        let (value, base) = (delta.value(info)?, &table.params[id].base);
        if value.shape != base.shape || value.dtype != base.dtype {
            let (found, expected) = ((value.dtype, value.shape), (base.dtype, &base.shape));
            return Err(wrong(format!("is {found:?}, in the base model {expected:?}")));
        }
        changed.insert(id, value);
    }
    if metadata.get("base_values") != Some(&&*values_hash(table, changed.keys())) {
        return Err(other_base("the weights it replaces differ"));
    }
    match metadata.get("values") {
        Some(stated) if **stated != *hash(changed.values()) => {
            let message =
                "its values are not those that were written: the file is damaged; resume the run to write it again"
                    .into();
            Err(Error::Damaged { file: file(), message })
        }
        _ => Ok(changed),
    }
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
    check_base(base_dir, &config, &table, delta_file)?;
    table.check_finite().map_err(|source| Error::NotFinite { file: base_dir.into(), source })?;
    for (&id, value) in &changed {
        if let Some(index) = find_non_finite(value) {
            let source = NotFinite { tensor: table.params[id].name(), index };
            return Err(Error::NotFinite { file: delta_file.into(), source });
        }
    }
    export(base_dir, &checkpoint, &table, &changed, out_dir)
}

/// Checks that the base has the configuration and all the weights that the delta was made from, as far as the delta says.
fn check_base(base_dir: &Path, config: &ModelConfig, table: &ParamTable, delta_file: &Path) -> Result<(), Error> {
    let delta = Shard::open(delta_file)?;
    let stated = |key: &str| delta.header.metadata.iter().find(|(name, _)| name == key).map(|(_, value)| &**value);
    if let Some(text) = stated("base_config")
        && ModelConfig::from_text(delta_file, text)? != *config
    {
        let keys = differing_keys(text, &read_config(base_dir)?, delta_file, config);
        return Err(other_base(delta_file, base_dir, &format!("config.json differs in {keys}")));
    }
    match stated("base_weights") {
        Some(hash) if *hash != *table.hashed().finalize().to_string() => {
            Err(other_base(delta_file, base_dir, "weights that the delta does not replace differ"))
        }
        _ => Ok(()),
    }
}

/// The keys of two configurations that make the difference, with both values: `ours` is that of the base.
fn differing_keys(theirs: &str, ours: &str, path: &Path, config: &ModelConfig) -> String {
    let object = |text: &str| serde_json::from_str::<Map<String, Value>>(text).unwrap_or_default();
    let (theirs, ours) = (object(theirs), object(ours));
    let mut named = Vec::new();
    for key in ours.keys().chain(theirs.keys().filter(|key| !ours.contains_key(*key))) {
        let mut changed = ours.clone();
        match theirs.get(key) {
            Some(value) => changed.insert(key.clone(), value.clone()),
            None => changed.shift_remove(key),
        };
        let matters = ModelConfig::from_text(path, &Value::Object(changed).to_string()).map_or(true, |c| c != *config);
        if ours.get(key) != theirs.get(key) && matters {
            let shown = |value: Option<&Value>| value.map_or_else(|| "missing".into(), |v| cut(&v.to_string(), 60));
            named.push(format!("{} ({}, not {})", cut(key, 60), shown(ours.get(key)), shown(theirs.get(key))));
        }
    }
    named.join(", ")
}

/// config.json without white space between its values.
fn read_config(dir: &Path) -> Result<String, Error> {
    let path = dir.join("config.json");
    let bytes = input::read(&path).map_err(Error::read(&path))?;
    let text = input::without_mark(&bytes);
    let value: Value = serde_json::from_slice(text)
        .map_err(|e| Error::Damaged { file: path.clone(), message: input::not_json(text, &e) })?;
    Ok(value.to_string())
}

fn other_base(file: &Path, base: &Path, message: &str) -> Error {
    Error::OtherBase { file: file.into(), base: base.into(), message: message.into() }
}

/// blake3 over the base model's values of these parameters.
fn values_hash<'a>(table: &ParamTable, ids: impl Iterator<Item = &'a ParamId> + Clone) -> String {
    hash(ids.map(|&id| &table.params[id].base))
}

/// blake3 over these values.
fn hash<'a>(values: impl Iterator<Item = &'a HostTensor> + Clone) -> String {
    let mut hasher = blake3::Hasher::new();
    hash_values(values, &mut hasher);
    hasher.finalize().to_string()
}
