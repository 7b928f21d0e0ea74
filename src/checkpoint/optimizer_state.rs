//! The optimizer state of one rank in a safetensors file. For each parameter it has this rank's shard of the f32 tensors
//! `NAME.master`, `NAME.m` and `NAME.v` (master weights, first and second moment of AdamW). The metadata key `steps`
//! maps each parameter to its number of updates.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::error::Error;
use crate::backend::Dtype;
use crate::files;
use crate::input;
use crate::meter::{Meter, Unit};
use crate::model::{ParamTable, Shard, write_header};
use crate::optim::{ParamState, piece};

const PARTS: [&str; 3] = ["master", "m", "v"];

/// Writes the optimizer state of one rank. `layout`: (parameter, updates, elements of this rank's shard) of each item
/// of
/// `states`, in the same order.
///
/// # Errors
/// A write that fails; `path` is then as it was before.
pub fn write_optimizer(
    table: &ParamTable,
    layout: &[(usize, u64, usize)],
    states: impl Iterator<Item = ParamState>,
    path: &Path,
) -> Result<(), Error> {
    let name = |id: usize| table.params[id].name();
    let steps: BTreeMap<String, u64> = layout.iter().map(|(id, step, _)| (name(*id), *step)).collect();
    let metadata = [("steps".into(), serde_json::to_string(&steps).expect("strings and numbers serialize"))];
    let tensors: Vec<_> = layout
        .iter()
        .flat_map(|(id, _, len)| PARTS.map(|part| (format!("{}.{part}", name(*id)), Dtype::F32, vec![*len])))
        .collect();
    let elements: usize = layout.iter().map(|(.., len)| PARTS.len() * len).sum();
    let meter = Meter::start(format!("writing {}", path.display()), Unit::Bytes, 4 * elements as u64);
    Ok(files::write_with(path, |out| {
        write_header(out, &metadata, &tensors)?;
        for state in states {
            for values in [&state.master, &state.m, &state.v] {
                meter.add(4 * values.len());
                out.write_all(bytemuck::cast_slice(values))?;
            }
        }
        Ok(())
    })?)
}

/// Reads the optimizer state of rank `rank` of `world_size` from `files`, one of each rank that saved, in rank order.
/// The world size may differ from that of the run that saved: shards are then joined and split again.
///
/// # Errors
/// A file that is not an optimizer state, or does not match the model.
pub fn read_optimizer(
    table: &ParamTable,
    files: &[PathBuf],
    rank: usize,
    world_size: usize,
) -> Result<Vec<ParamState>, Error> {
    // With an unchanged world size, each rank reads only its own file.
    let unchanged = files.len() == world_size;
    let needed = if unchanged { &files[rank..rank + 1] } else { files };
    let shards = needed.iter().map(|file| Shard::open(file)).collect::<Result<Vec<_>, _>>()?;
    let wrong = |message: String| Error::Damaged { file: needed[0].clone(), message };
    let ids: HashMap<String, usize> = table.iter().map(|(id, spec)| (spec.name(), id)).collect();
    let steps = shards[0].header.metadata.iter().find(|(key, _)| key == "steps").map(|(_, value)| value.as_str());
    let steps: BTreeMap<String, u64> = serde_json::from_str(steps.unwrap_or_default())
        .map_err(|e| wrong(format!("its metadata key steps: {}", input::json_problem(&e))))?;
    let tensors: Vec<HashMap<&str, _>> =
        shards.iter().map(|s| s.header.tensors.iter().map(|info| (info.name.as_str(), info)).collect()).collect();
    let mut states = Vec::new();
    for (name, step) in steps {
        let param = *ids.get(&name).ok_or_else(|| wrong(format!("the model has no parameter {name}")))?;
        let len = table.params[param].len();
        let read = |part: &str| -> Result<Vec<f32>, Error> {
            let tensor = format!("{name}.{part}");
            let mut values = Vec::new();
            for (shard, tensors) in shards.iter().zip(&tensors) {
                let info = tensors.get(&*tensor).ok_or_else(|| wrong(format!("it has no tensor {tensor}")))?;
                values.extend(shard.value(info)?.to_f32());
            }
            let piece = piece(len, rank, world_size);
            let values = if unchanged { values } else { values.get(piece.clone()).unwrap_or_default().to_vec() };
            match values.len() == piece.len() {
                true => Ok(values),
                false => Err(wrong(format!("the length of {tensor} does not match this model"))),
            }
        };
        states.push(ParamState { param, step, master: read("master")?, m: read("m")?, v: read("v")? });
    }
    states.sort_by_key(|state| state.param);
    Ok(states)
}
