//! Proof that all ranks hold the same weights.

use std::collections::BTreeMap;

use super::engine::Engine;
use crate::backend::Backend;
use crate::exit::{self, Failure, Result};
use crate::model::ParamId;

/// Compares the weights that training has written, on all ranks, by hash. (The others are those of the checkpoint's files,
/// which the ranks compare when they begin.)
///
/// # Errors
/// The first tensor that differs, and the ranks that differ from most others.
pub fn check<B: Backend>(engine: &Engine<'_, B>) -> Result<()> {
    let world = &*engine.world;
    if world.world_size() == 1 {
        return Ok(());
    }
    let place = world.place();
    world.doing(&format!("the comparison of all ranks' weights in {place}"));
    let hashes: Vec<(ParamId, blake3::Hash)> = engine
        .touched
        .iter()
        .map(|&id| (id, blake3::Hasher::new().update_rayon(&engine.model.weight_host(id).bytes).finalize()))
        .collect();
    let mut all = blake3::Hasher::new();
    for (id, hash) in &hashes {
        all.update(&(*id as u64).to_le_bytes()).update(hash.as_bytes());
    }
    let digests = world.all_gather(all.finalize().as_bytes())?;
    if digests.iter().all(|digest| *digest == digests[0]) {
        world.doing(&place);
        return Ok(());
    }
    // Rare, so that it may be slow: every rank's list of hashes, to find the tensor.
    let list: Vec<u8> = hashes.iter().flat_map(|(_, hash)| *hash.as_bytes()).collect();
    let lists = world.all_gather(&list)?;
    for (i, (id, _)) in hashes.iter().enumerate() {
        let of_rank: Vec<&[u8]> = lists.iter().map(|list| list.get(32 * i..32 * i + 32).unwrap_or_default()).collect();
        let odd = odd_ones(&of_rank);
        if !odd.is_empty() {
            let name = engine.model.table.params[*id].name();
            return Err(Failure::new(
                exit::RANKS_DIFFER,
                format!(
                    "the weights of {name} on rank(s) {odd:?} differ from those on the others: memory or a device is at \
                     fault there; resume from the last checkpoint, without that machine"
                ),
            ));
        }
    }
    Err(Failure::new(exit::RANKS_DIFFER, "the ranks have trained different sets of parameters: please report this"))
}

/// The ranks whose value is not the most common one (of equally common ones, that of the lowest rank).
fn odd_ones(values: &[&[u8]]) -> Vec<usize> {
    let mut counts: BTreeMap<&[u8], usize> = BTreeMap::new();
    for value in values {
        *counts.entry(value).or_default() += 1;
    }
    let most = counts.values().copied().max().unwrap_or(0);
    let common = values.iter().find(|value| counts[**value] == most);
    (0..values.len()).filter(|&rank| Some(&values[rank]) != common).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_minority_is_odd() {
        let odd = |values: &[&str]| odd_ones(&values.iter().map(|v| v.as_bytes()).collect::<Vec<_>>());
        assert_eq!(odd(&["a", "a", "a"]), [0; 0]);
        assert_eq!(odd(&["b", "a", "a"]), [0]);
        assert_eq!(odd(&["a", "b"]), [1], "of two, rank 0 is believed");
        assert_eq!(odd(&["a", "b", "c", "c"]), [0, 1]);
    }
}
