//! The routing of the safe prompts at the start of a router phase (`--router-target round-start`): the target p of the
//! alignment stays there while the routers move. It is kept as one sum a safe prompt and layer, so that the statistic of
//! any batch is a sum over its prompts.

use super::alignment::{RoutingSide, watch};
use super::recipe::Divergence;
use super::replica::{Replica, share};
use crate::backend::Backend;
use crate::data::{MicroBatch, Sampler, micro_batches};
use crate::exit::{self, Failure, Result};
use crate::model::PassEnd;
use crate::routers::LayerStatistic;

/// The routing statistics of safe prompts, the same on all ranks. Memory: prompts · layers · (experts + 1) · 8 bytes.
#[derive(Debug, Clone, PartialEq)]
pub struct PromptRouting {
    /// The records whose safe prompts these are, ascending.
    records: Vec<usize>,
    /// `[records][layers]`.
    statistics: Vec<Vec<LayerStatistic>>,
}

impl PromptRouting {
    /// The statistics of the safe prompts of `partners` in the present model. Each rank computes a share of them.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn compute<B: Backend>(
        replica: &Replica<B>,
        sampler: Sampler<'_>,
        partners: &[usize],
        divergence: Divergence,
    ) -> Result<Self> {
        let records = distinct(partners);
        let batches = micro_batches(&records, sampler.batch_size);
        let (layers, experts) = (replica.moe_layers().layers.len(), replica.model().config.num_experts);
        let mut own = Vec::new();
        for (_, batch) in share(&batches, &*replica.world) {
            let prompts = batch.iter().filter_map(|&i| sampler.data.records[i].safe_prompt.as_deref());
            let packed = MicroBatch::of_prompts(prompts);
            let Divergence { statistic, last_tokens, .. } = divergence;
            let side = |s| RoutingSide::new(statistic, last_tokens, layers, experts, &packed.packing, s..s + 1);
            let mut sides: Vec<RoutingSide> = (0..packed.packing.len()).map(side).collect();
            let mut observer = watch(replica, sides.iter_mut().collect());
            replica.forward(&replica.inputs(&packed), None, PassEnd::Routers, Some(&mut observer));
            drop(observer);
            own.extend(sides.into_iter().map(RoutingSide::into_statistics));
        }
        let all = replica.world.all_gather(&to_bytes(&own))?;
        let mut parts = Vec::new();
        for bytes in &all {
            parts.push(from_bytes(bytes, layers, experts).expect("written by this program").into_iter());
        }
        let ranks = parts.len();
        let of_batch =
            |(i, batch): (usize, &Vec<usize>)| parts[i % ranks].by_ref().take(batch.len()).collect::<Vec<_>>();
        let statistics = batches.iter().enumerate().flat_map(of_batch).collect();
        Ok(Self { records, statistics })
    }

    /// The sum over these records, each as often as it occurs.
    pub fn side(&self, divergence: Divergence, layers: usize, experts: usize, records: &[usize]) -> RoutingSide {
        let of = |record: &usize| {
            let index = self.records.binary_search(record).expect("a record with a safe prompt");
            self.statistics[index].as_slice()
        };
        RoutingSide::of_known(divergence.statistic, layers, experts, records.iter().map(of))
    }

    /// For a checkpoint: f64 in little-endian order, the sums and the weight of each layer of each record.
    pub fn to_bytes(&self) -> Vec<u8> {
        to_bytes(&self.statistics)
    }

    /// Reads [`Self::to_bytes`] of the safe prompts of `partners`.
    ///
    /// # Errors
    /// A length that does not fit the prompts and the model.
    pub fn from_bytes(bytes: &[u8], partners: &[usize], layers: usize, experts: usize) -> Result<Self> {
        let records = distinct(partners);
        match from_bytes(bytes, layers, experts) {
            Some(statistics) if statistics.len() == records.len() => Ok(Self { records, statistics }),
            _ => Err(Failure::new(
                exit::DATA,
                format!(
                    "the router target in the checkpoint has {} bytes, which are not {} prompts of {layers} layers with \
                     {experts} experts: remove the checkpoint, or start again with --overwrite",
                    bytes.len(),
                    records.len()
                ),
            )),
        }
    }
}

fn distinct(partners: &[usize]) -> Vec<usize> {
    let mut records = partners.to_vec();
    records.sort_unstable();
    records.dedup();
    records
}

fn to_bytes(statistics: &[Vec<LayerStatistic>]) -> Vec<u8> {
    let values = |layer: &LayerStatistic| layer.sum.iter().copied().chain([layer.weight]).collect::<Vec<f64>>();
    statistics.iter().flatten().flat_map(values).flat_map(f64::to_le_bytes).collect()
}

/// `None` if the length is not a multiple of that of one prompt.
fn from_bytes(bytes: &[u8], layers: usize, experts: usize) -> Option<Vec<Vec<LayerStatistic>>> {
    let a_layer = 8 * (experts + 1);
    let layer = |bytes: &[u8]| {
        let mut sum: Vec<f64> =
            bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().expect("8 bytes"))).collect();
        let weight = sum.pop().expect("a weight behind the sums");
        LayerStatistic { sum, weight }
    };
    let prompt = |bytes: &[u8]| bytes.chunks_exact(a_layer).map(layer).collect();
    let a_prompt = layers * a_layer;
    bytes.len().is_multiple_of(a_prompt).then(|| bytes.chunks_exact(a_prompt).map(prompt).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_round_trip_and_other_lengths_are_refused() {
        let layer = |x: f64| LayerStatistic { sum: vec![x, -0.0, x / 3.0], weight: 7.0 };
        let table = PromptRouting {
            records: vec![1, 4],
            statistics: vec![vec![layer(1.5), layer(2.5)], vec![layer(1e-300), layer(0.1)]],
        };
        let bytes = table.to_bytes();
        assert_eq!(bytes.len(), 2 * 2 * 4 * 8);
        assert_eq!(PromptRouting::from_bytes(&bytes, &[4, 1, 4], 2, 3).unwrap(), table);
        for (bytes, partners) in [(&bytes[..64], &[1, 4][..]), (&bytes[..127], &[1, 4]), (&bytes, &[1, 4, 5])] {
            let error = PromptRouting::from_bytes(bytes, partners, 2, 3).unwrap_err().to_string();
            assert!(error.contains("router target") && error.contains("--overwrite"), "{error}");
        }
    }
}
