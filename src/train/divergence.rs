//! How the routing of all safe and of all unsafe prompts of some rows differs, without gradient.

use super::alignment::{RoutingSide, watch};
use super::recipe::Divergence;
use super::replica::Replica;
use crate::backend::Backend;
use crate::data::{MicroBatch, Record};
use crate::exit::Result;
use crate::meter::{Meter, Unit};
use crate::model::PassEnd;
use crate::routers::{self, LayerStatistic};

/// The divergence of each MoE layer between the mean routing of all safe and that of all unsafe prompts: one mean a side over all of
/// its tokens (or samples), so that it does not depend on the batch size. (Training minimises divergences of batches: see
/// [`super::alignment_by_layer`].) Prompts are added in the order of the file, whatever the number of ranks. `None` if a side has no
/// prompt.
///
/// # Errors
/// Those of the collective.
pub fn divergence_of_prompts<B: Backend>(
    replica: &Replica<B>,
    records: &[Record],
    batch_size: usize,
    divergence: Divergence,
) -> Result<Option<Vec<f64>>> {
    let side = |prompt: fn(&Record) -> Option<&Vec<u32>>| records.iter().filter_map(prompt).collect::<Vec<_>>();
    let (safe, unsafe_) = (side(|r| r.safe_prompt.as_ref()), side(|r| r.unsafe_prompt.as_ref()));
    if safe.is_empty() || unsafe_.is_empty() {
        return Ok(None);
    }
    let meter = Meter::start("measuring the routers", Unit::Rows, (safe.len() + unsafe_.len()) as u64);
    let [safe, unsafe_] =
        [safe, unsafe_].map(|prompts| summed_routing(replica, &prompts, batch_size, divergence, &meter));
    Ok(routers::alignment(divergence.kl, &safe?, &unsafe_?).map(|found| found.per_layer))
}

/// The sum of the statistics of these prompts by layer. Each round of passes, one a rank, ends with the exchange of its sums, so that
/// no rank holds those of all prompts.
fn summed_routing<B: Backend>(
    replica: &Replica<B>,
    prompts: &[&Vec<u32>],
    batch_size: usize,
    divergence: Divergence,
    meter: &Meter,
) -> Result<Vec<LayerStatistic>> {
    let (rank, size) = (replica.world.rank(), replica.world.world_size());
    let (layers, experts) = (replica.moe_layers().layers.len(), replica.model().config.num_experts);
    // The sum and the weight of each layer.
    let stride = layers * (experts + 1);
    let mut total = vec![LayerStatistic::zero(experts); layers];
    for round in prompts.chunks(size * batch_size) {
        let first = rank * batch_size;
        let own = round.iter().skip(first).take(batch_size).map(|ids| ids.as_slice());
        let batch = MicroBatch::of_prompts(own);
        let mut values = Vec::new();
        for (i, statistics) in observe_each(replica, divergence, &batch).into_iter().enumerate() {
            let flat = statistics.into_iter().flat_map(|s| s.sum.into_iter().chain([s.weight]));
            values.extend(flat.enumerate().map(|(k, value)| ((first + i) * stride + k, value)));
        }
        let all = replica.gather_by_index(round.len() * stride, &values)?;
        for (part, layer) in all.chunks_exact(experts + 1).zip((0..layers).cycle()) {
            total[layer].add(&part[..experts], part[experts]);
        }
        meter.add(round.len());
    }
    Ok(total)
}

/// The statistics of each prompt of a packed batch, by layer, from one forward pass.
fn observe_each<B: Backend>(
    replica: &Replica<B>,
    divergence: Divergence,
    batch: &MicroBatch,
) -> Vec<Vec<LayerStatistic>> {
    if batch.ids.is_empty() {
        return Vec::new();
    }
    let Divergence { statistic, last_tokens, .. } = divergence;
    let (layers, experts) = (replica.moe_layers().layers.len(), replica.model().config.num_experts);
    let side = |s: usize| RoutingSide::new(statistic, last_tokens, layers, experts, &batch.packing, s..s + 1);
    let mut sides: Vec<RoutingSide> = (0..batch.packing.len()).map(side).collect();
    let mut observer = watch(replica, sides.iter_mut().collect());
    replica.forward(&replica.inputs(batch), None, PassEnd::Routers, Some(&mut observer));
    drop(observer);
    sides.into_iter().map(RoutingSide::into_statistics).collect()
}
