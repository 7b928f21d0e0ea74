//! The check that all ranks hold the same weights.

use std::collections::BTreeMap;

use super::replica::Replica;
use crate::backend::Backend;
use crate::exit::{self, Failure, Result};
use crate::model::ParamId;

/// Compares the hashes of all weights that training has written, over all ranks. (The other weights are those of the
/// checkpoint's files, which the ranks compare at the start.)
///
/// # Errors
/// The first tensor that differs, and the ranks whose value is not that of the majority.
pub fn check_replicas<B: Backend>(replica: &Replica<B>) -> Result<()> {
    let world = &*replica.world;
    if world.world_size() == 1 {
        return Ok(());
    }
    let activity = world.activity();
    world.set_activity(&format!("the comparison of all ranks' weights in {activity}"));
    let hashes: Vec<(ParamId, blake3::Hash)> = replica
        .written()
        .iter()
        .map(|&id| (id, blake3::Hasher::new().update_rayon(&replica.model().weight_host(id).bytes).finalize()))
        .collect();
    let mut all = blake3::Hasher::new();
    for (id, hash) in &hashes {
        all.update(&(*id as u64).to_le_bytes()).update(hash.as_bytes());
    }
    let digests = world.all_gather(all.finalize().as_bytes())?;
    if digests.iter().all(|digest| *digest == digests[0]) {
        world.set_activity(&activity);
        return Ok(());
    }
    // Only on failure: gather the hash of every tensor to find the one that differs.
    let list: Vec<u8> = hashes.iter().flat_map(|(_, hash)| *hash.as_bytes()).collect();
    let lists = world.all_gather(&list)?;
    for (i, (id, _)) in hashes.iter().enumerate() {
        let of_rank: Vec<&[u8]> = lists.iter().map(|list| list.get(32 * i..32 * i + 32).unwrap_or_default()).collect();
        let ranks = minority(&of_rank);
        if !ranks.is_empty() {
            let name = replica.model().table.params[*id].name();
            return Err(Failure::new(
                exit::RANKS_DIFFER,
                format!(
                    "the weights of {name} on rank(s) {ranks:?} differ from those on the others: probably faulty memory or a \
                     faulty device on that machine; resume from the last checkpoint, without it"
                ),
            ));
        }
    }
    Err(Failure::new(exit::RANKS_DIFFER, "the ranks have trained different sets of parameters: please report this"))
}

/// The ranks that do not hold the majority value (on a tie: the one of the lowest rank).
fn minority(values: &[&[u8]]) -> Vec<usize> {
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
    fn the_minority_is_named() {
        let odd = |values: &[&str]| minority(&values.iter().map(|v| v.as_bytes()).collect::<Vec<_>>());
        assert_eq!(odd(&["a", "a", "a"]), [0; 0]);
        assert_eq!(odd(&["b", "a", "a"]), [0]);
        assert_eq!(odd(&["a", "b"]), [1], "of two, rank 0 is believed");
        assert_eq!(odd(&["a", "b", "c", "c"]), [0, 1]);
    }
}
