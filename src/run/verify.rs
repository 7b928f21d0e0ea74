//! Verifies on disk that the frozen parameters of an exported model are bit-identical to its source.

use std::collections::BTreeSet;
use std::path::Path;

use super::session::Session;
use crate::exit::{self, Failure, Result};
use crate::meter::{Meter, Unit};
use crate::model::{Checkpoint, ParamId, ParamTable};

/// The result of comparing an exported model with its source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FrozenReport {
    /// Parameters that no optimizer wrote.
    pub frozen: usize,
    /// Elements of the frozen parameters.
    pub frozen_elements: usize,
    /// Parameters that an optimizer wrote.
    pub trained: usize,
    /// Trained parameters whose bits changed.
    pub changed: usize,
    /// blake3 over the frozen parameters' bytes, in the table's order; the same in both models.
    pub hash: blake3::Hash,
}

/// Compares every parameter of the exported folder with the source.
///
/// # Errors
/// A frozen parameter whose bits differ: a bug of moewarden.
pub fn verify_frozen(session: &Session, exported: &Path, written: &BTreeSet<ParamId>) -> Result<FrozenReport> {
    let checkpoint = Checkpoint::open(exported)?;
    let table = ParamTable::build(&session.model, &checkpoint)?;
    let (mut source, mut copy) = (blake3::Hasher::new(), blake3::Hasher::new());
    let (mut frozen, mut frozen_elements, mut changed) = (0, 0, 0);
    let bytes = table.params.iter().map(|spec| spec.base.bytes.len() as u64).sum();
    let meter = Meter::start(format!("comparing {} with its source", exported.display()), Unit::Bytes, bytes);
    for (id, (ours, theirs)) in session.table.params.iter().zip(&table.params).enumerate() {
        meter.add(theirs.base.bytes.len());
        if written.contains(&id) {
            changed += usize::from(ours.base.bytes[..] != theirs.base.bytes[..]);
            continue;
        }
        frozen += 1;
        frozen_elements += ours.len();
        source.update_rayon(&ours.base.bytes);
        copy.update_rayon(&theirs.base.bytes);
    }
    let hash = source.finalize();
    if hash != copy.finalize() {
        let pairs = session.table.params.iter().zip(&table.params).enumerate();
        let mut differ = pairs.filter(|(id, (a, b))| !written.contains(id) && a.base.bytes[..] != b.base.bytes[..]);
        let name = differ.next().map_or_else(String::new, |(_, (spec, _))| spec.name());
        return Err(Failure::new(
            exit::INTERNAL,
            format!(
                "the frozen parameter {name} of {} differs from its source: please report this",
                exported.display()
            ),
        ));
    }
    Ok(FrozenReport { frozen, frozen_elements, trained: written.len(), changed, hash })
}
