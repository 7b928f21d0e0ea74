//! Every parameter of a model, in one stable order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, OnceLock};

use super::claim::{self, Error as ClaimError};
use super::config::ModelConfig;
use super::finite::{self, NotFinite};
use super::ids::{Group, ParamId, ParamKind, ParamSpec};
use super::random::RandomInit;
use super::weights::Checkpoint;
use crate::backend::{Backend, HostTensor};
use crate::meter::{Meter, Unit};

/// All parameters, in the order of [`ParamKind`] by layer: embedding, each layer from the first, final norm, head.
#[derive(Clone)]
pub struct ParamTable {
    /// In order, indexed by [`ParamId`].
    pub params: Vec<ParamSpec>,
    /// How the values are generated, if there is no checkpoint.
    pub random: Option<RandomInit>,
    read: Arc<Read>,
}

/// What was found by reading all values: once for a table and its clones.
#[derive(Default)]
struct Read {
    hashed: OnceLock<blake3::Hasher>,
    /// The first parameter and element that is not finite.
    non_finite: OnceLock<Option<(ParamId, usize)>>,
}

/// Gives the bytes of values to a hasher.
pub fn hash_values<'a>(values: impl Iterator<Item = &'a HostTensor> + Clone, hasher: &mut blake3::Hasher) {
    let bytes = values.clone().map(|value| value.bytes.len() as u64).sum();
    let meter = Meter::start("hashing weights", Unit::Bytes, bytes);
    for value in values {
        hasher.update_rayon(&value.bytes);
        meter.add(value.bytes.len());
    }
}

/// Number and size of a set of parameters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Count {
    /// Matrices and vectors.
    pub params: usize,
    /// Elements in total.
    pub elements: usize,
    /// Bytes in their stored formats.
    pub bytes: usize,
}

impl ParamTable {
    /// The parameters of a model in their checkpoint.
    ///
    /// # Errors
    /// A tensor that is missing or does not belong to the model, or that has another shape than config.json requires or an
    /// unsupported number format; a tied output head that differs from the embedding. Each error names the tensor.
    pub fn build(config: &ModelConfig, checkpoint: &Checkpoint) -> Result<Self, ClaimError> {
        claim::claim(config, checkpoint).map(|params| Self { params, random: None, read: Arc::default() })
    }

    /// The parameters of a model without a checkpoint.
    pub fn random(config: &ModelConfig, init: RandomInit) -> Self {
        Self { params: init.params(config), random: Some(init), read: Arc::default() }
    }

    /// All parameters on a backend: from the checkpoint, or random. The routed experts of layers below `offloaded_below` are
    /// offloaded, those of a layer together.
    pub(super) fn weights<B: Backend>(&self, backend: &B, offloaded_below: usize) -> Vec<B::Weight> {
        let meter = Meter::start("loading the weights", Unit::Bytes, self.bytes());
        let weight = |id: ParamId| {
            let weight = self.weight(backend, id);
            meter.add(self.params[id].base.bytes.len());
            weight
        };
        let offloaded = |spec: &ParamSpec| match spec.kind {
            ParamKind::Expert(layer, ..) if layer < offloaded_below => Some(layer),
            _ => None,
        };
        let mut weights = Vec::with_capacity(self.params.len());
        // The experts of a layer are neighbours in the table.
        for part in self.params.chunk_by(|a, b| offloaded(a) == offloaded(b)) {
            let ids = weights.len()..weights.len() + part.len();
            weights.extend(match (offloaded(&part[0]), &self.random) {
                (None, _) => ids.map(weight).collect(),
                (Some(_), Some(_)) => backend.offload(ids.map(weight).collect()),
                (Some(_), None) => {
                    let loaded = backend.offloaded_weights(part.iter().map(|spec| spec.base.clone()).collect());
                    meter.add(part.iter().map(|spec| spec.base.bytes.len()).sum());
                    loaded
                }
            });
        }
        weights
    }

    /// Takes the routers of another table of the same parameters.
    pub fn take_routers(&mut self, other: Self) {
        for (ours, theirs) in self.params.iter_mut().zip(other.params) {
            if matches!(ours.kind, ParamKind::Router(_)) {
                *ours = theirs;
            }
        }
        self.read = Arc::default();
    }

    /// A blake3 hasher that has been given all parameters and nothing else: see [`Self::hash_into`]. They are read once for a table
    /// and its clones.
    pub fn hashed(&self) -> &blake3::Hasher {
        self.read.hashed.get_or_init(|| {
            let mut hasher = blake3::Hasher::new();
            self.hash_into(&mut hasher);
            hasher
        })
    }

    /// Gives all parameters in their stored formats to a hasher, in this table's order; of random ones the seed, which decides them
    /// together with config.json.
    pub fn hash_into(&self, hasher: &mut blake3::Hasher) {
        match &self.random {
            Some(init) => _ = hasher.update(&init.seed.to_le_bytes()),
            None => hash_values(self.params.iter().map(|spec| &spec.base), hasher),
        }
    }

    /// Bytes of all parameters.
    fn bytes(&self) -> u64 {
        self.params.iter().map(|spec| spec.base.bytes.len() as u64).sum()
    }

    /// One parameter with its base value on a backend: from the checkpoint, or random.
    pub fn weight<B: Backend>(&self, backend: &B, id: ParamId) -> B::Weight {
        let spec = &self.params[id];
        match &self.random {
            None => backend.weight(spec.base.clone()),
            Some(init) => init.weight(backend, id, spec),
        }
    }

    /// The id of a parameter, if the model has it.
    pub fn id(&self, kind: ParamKind) -> Option<ParamId> {
        self.params.binary_search_by_key(&kind.sort_key(), |spec| spec.kind.sort_key()).ok()
    }

    /// The id of a parameter that every model of this configuration has.
    pub(super) fn expect_id(&self, kind: ParamKind) -> ParamId {
        self.id(kind).expect("the table was checked against the family")
    }

    /// The id of the first parameter of a layer; for the number of layers, that of the final norm.
    pub(super) fn start_of(&self, layer: usize) -> ParamId {
        self.params.partition_point(|spec| spec.kind.sort_key() < (1, layer, 0, 0, 0))
    }

    /// All parameters with their ids, in order.
    pub fn iter(&self) -> impl Iterator<Item = (ParamId, &ParamSpec)> {
        self.params.iter().enumerate()
    }

    /// Number and size of the parameters for which `chosen` is true.
    pub fn count(&self, chosen: impl Fn(&ParamSpec) -> bool) -> Count {
        self.params.iter().filter(|spec| chosen(spec)).fold(Count::default(), |sum, spec| Count {
            params: sum.params + 1,
            elements: sum.elements + spec.len(),
            bytes: sum.bytes + spec.byte_range.len(),
        })
    }

    /// Number and size by group, without groups that the model does not have.
    pub fn by_group(&self) -> BTreeMap<Group, Count> {
        let groups: BTreeSet<Group> = self.params.iter().map(|spec| spec.kind.group()).collect();
        groups.into_iter().map(|group| (group, self.count(|spec| spec.kind.group() == group))).collect()
    }

    /// Number and size of all parameters.
    pub fn total(&self) -> Count {
        self.count(|_| true)
    }

    /// Name of the tensor that holds a second copy of a tied embedding, if the checkpoint stores one.
    pub fn tied_head<'a>(&self, checkpoint: &'a Checkpoint) -> Option<&'a str> {
        claim::tied_head(checkpoint, &self.params).map(|(_, tensor)| &*tensor.name)
    }

    /// The first parameter with a NaN or an infinity, and the index of that element. Reads all weights on all cores, once for a
    /// table and its clones; random weights are finite by construction and not read.
    pub fn find_non_finite(&self) -> Option<(ParamId, usize)> {
        let first = || if self.random.is_some() { None } else { finite::first(&self.params) };
        *self.read.non_finite.get_or_init(first)
    }

    /// Checks that all weights are finite.
    ///
    /// # Errors
    /// The first parameter and element that is not finite.
    pub fn check_finite(&self) -> Result<(), NotFinite> {
        match self.find_non_finite() {
            None => Ok(()),
            Some((id, index)) => Err(NotFinite { tensor: self.params[id].name(), index }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::HostTensor;
    use crate::model::ids::{Proj, tests::config};

    #[test]
    fn parameters_are_found_by_their_kind() {
        let kinds = ParamKind::all(&config());
        assert_eq!(kinds.len(), 1 + (12 + 3) + (12 + 1 + 9 + 4) + 2);
        let value = HostTensor::from_f32(vec![1], &[0.0]);
        let spec = |kind| ParamSpec::new(kind, String::new(), 0..4, value.clone());
        let table =
            ParamTable { params: kinds.iter().copied().map(spec).collect(), random: None, read: Arc::default() };
        for (id, kind) in kinds.iter().enumerate() {
            assert_eq!(table.id(*kind), Some(id), "{kind:?}");
        }
        let starts = [ParamKind::InputNorm(0), ParamKind::InputNorm(1), ParamKind::FinalNorm];
        assert_eq!([0, 1, 2].map(|layer| Some(table.start_of(layer))), starts.map(|kind| table.id(kind)));
        assert_eq!(table.id(ParamKind::Router(0)), None);
        assert_eq!(table.id(ParamKind::Expert(1, 3, Proj::Gate)), None);
        assert_eq!(table.by_group().values().map(|count| count.params).sum::<usize>(), table.total().params);
    }
}
