//! The optimizer's state of one rank, in a safetensors file: for each parameter the tensors `NAME.master`, `NAME.m` and
//! `NAME.v` (f32, the rank's piece), and in the metadata `steps`, which counts each parameter's updates.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};

use super::error::Error;
use crate::backend::Dtype;
use crate::files;
use crate::model::{ParamTable, Shard, write_header};
use crate::optim::{ParamState, piece};

const PARTS: [&str; 3] = ["master", "m", "v"];

/// Writes the states of one rank. `layout`: (parameter, updates, elements of the piece) of what `states` gives, in order.
///
/// # Errors
/// A write that fails: then no file is left behind.
pub fn write_optimizer(
    table: &ParamTable,
    layout: &[(usize, u64, usize)],
    states: impl Iterator<Item = ParamState>,
    path: &Path,
) -> Result<(), Error> {
    let name = |id: usize| table.params[id].name();
    let steps: BTreeMap<String, u64> = layout.iter().map(|(id, step, _)| (name(*id), *step)).collect();
    let metadata = [("steps".into(), serde_json::to_string(&steps).expect("names and numbers"))];
    let tensors: Vec<_> = layout
        .iter()
        .flat_map(|(id, _, len)| PARTS.map(|part| (format!("{}.{part}", name(*id)), Dtype::F32, vec![*len])))
        .collect();
    Ok(files::write_with(path, |out| {
        write_header(out, &metadata, &tensors)?;
        for state in states {
            for values in [&state.master, &state.m, &state.v] {
                out.write_all(bytemuck::cast_slice(values))?;
            }
        }
        Ok(())
    })?)
}

/// Reads the states of all ranks that wrote one (files in the order of their ranks), and gives each parameter's piece of
/// rank `rank` of `world_size`, which may be another number than wrote them.
///
/// # Errors
/// A file that is none of these, or does not fit the model.
pub fn read_optimizer(
    table: &ParamTable,
    files: &[PathBuf],
    rank: usize,
    world_size: usize,
) -> Result<Vec<ParamState>, Error> {
    // With as many readers as writers, a rank's piece is what its file holds.
    let same = files.len() == world_size;
    let mine = if same { &files[rank..rank + 1] } else { files };
    let shards = mine.iter().map(|file| Shard::open(file)).collect::<Result<Vec<_>, _>>()?;
    let wrong = |message: String| Error::NotWhole { file: mine[0].clone(), message };
    let ids: HashMap<String, usize> = table.iter().map(|(id, spec)| (spec.name(), id)).collect();
    let steps = shards[0].header.metadata.iter().find(|(key, _)| key == "steps").map(|(_, value)| value.as_str());
    let steps: BTreeMap<String, u64> =
        serde_json::from_str(steps.unwrap_or_default()).map_err(|e| wrong(format!("its steps: {e}")))?;
    let tensors: Vec<HashMap<&str, _>> =
        shards.iter().map(|s| s.header.tensors.iter().map(|info| (info.name.as_str(), info)).collect()).collect();
    let mut states = Vec::new();
    for (name, step) in steps {
        let param = *ids.get(&name).ok_or_else(|| wrong(format!("the model has no parameter {name}")))?;
        let len = table.params[param].value.len();
        let read = |part: &str| -> Result<Vec<f32>, Error> {
            let tensor = format!("{name}.{part}");
            let mut values = Vec::new();
            for (shard, tensors) in shards.iter().zip(&tensors) {
                let info = tensors.get(&*tensor).ok_or_else(|| wrong(format!("it has no tensor {tensor}")))?;
                values.extend(shard.value(info)?.to_f32());
            }
            let piece = piece(len, rank, world_size);
            let values = if same { values } else { values.get(piece.clone()).unwrap_or_default().to_vec() };
            match values.len() == piece.len() {
                true => Ok(values),
                false => Err(wrong(format!("{tensor} has another length than in this model"))),
            }
        };
        states.push(ParamState { param, step, master: read("master")?, m: read("m")?, v: read("v")? });
    }
    states.sort_by_key(|state| state.param);
    Ok(states)
}
