//! What the base model computes for the retain rows: made once, by the untrained model.
//!
//! Logits of the whole vocabulary would take V/D times the memory of the hidden states that they are made of. So the final
//! hidden states behind the norm are stored, and the base's logits are made of them again by the base's head, which is exact.

use std::sync::Arc;

use super::RetainRows;
use crate::backend::{Backend, HostTensor, decode_into};
use crate::data::MicroBatch;
use crate::exit::Result;
use crate::meter::{Meter, Unit};
use crate::model::{ModelConfig, PassEnd, Routed};
use crate::train::replica::Replica;

/// The base model's outputs for one row.
#[derive(Clone)]
pub struct BaseRow {
    /// Final hidden states behind the norm of the n tokens that carry loss, `[n, D]`.
    pub hidden: HostTensor,
    /// Router logits of the row's T tokens in each of the L MoE layers, `[L, T, E]`.
    pub router_logits: HostTensor,
}

/// The base model's outputs for all retain rows, in their order.
#[derive(Clone)]
pub struct BaseOutputs(pub Vec<BaseRow>);

impl BaseOutputs {
    /// Shapes of [`BaseRow::hidden`] and [`BaseRow::router_logits`] of each row.
    pub fn shapes(rows: &RetainRows<'_>, config: &ModelConfig) -> Vec<[Vec<usize>; 2]> {
        let layers = config.moe_layers().layers.len();
        let shapes = |row: usize| {
            let batch = rows.pack(&[row]);
            let hidden = vec![batch.targets.len(), config.hidden_size];
            [hidden, vec![layers, batch.ids.len(), config.num_experts]]
        };
        (0..rows.len()).map(shapes).collect()
    }

    /// Hidden states of these rows, one after another: `[n, D]`.
    pub(super) fn hidden(&self, rows: &[usize]) -> Vec<f32> {
        rows.iter().flat_map(|&row| self.0[row].hidden.to_f32()).collect()
    }

    /// Router logits of these rows in the MoE layer of this index, one row after another: `[T, E]`.
    pub(super) fn router_logits(&self, rows: &[usize], index: usize) -> Arc<[f32]> {
        let mut out = Vec::new();
        for &row in rows {
            let logits = &self.0[row].router_logits;
            let (len, size) = (logits.shape[1] * logits.shape[2], logits.dtype.size());
            let at = out.len();
            out.resize(at + len, 0.0);
            decode_into(logits.dtype, &logits.bytes[index * len * size..][..len * size], &mut out[at..]);
        }
        out.into()
    }
}

/// Computes the base model's outputs with the weights that `replica` has, which must be the base model's. `row` gets the hidden
/// states and router logits of one row after another, in order, on every rank: see [`BaseRow`].
///
/// # Errors
/// Those of the collective.
pub fn compute_base<B: Backend>(
    replica: &Replica<B>,
    rows: &RetainRows<'_>,
    mut row: impl FnMut(&[f32], &[f32]),
) -> Result<()> {
    let (rank, world_size) = (replica.world.rank(), replica.world.world_size());
    let shapes = BaseOutputs::shapes(rows, &replica.model().config);
    let sizes = |row: usize| shapes[row].each_ref().map(|shape| shape.iter().product::<usize>());
    let meter = Meter::start("computing the original model's outputs for retain rows", Unit::Rows, rows.len() as u64);
    for group in rows.in_order().chunks(world_size) {
        meter.add(group.iter().map(Vec::len).sum());
        let own = group.get(rank).map(|rows_of_batch| outputs(replica, rows, rows_of_batch)).unwrap_or_default();
        let all = replica.world.all_gather(bytemuck::cast_slice(&own))?;
        for (rows_of_batch, bytes) in group.iter().zip(&all) {
            let values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            let mut rest = values.as_slice();
            for &i in rows_of_batch {
                let [hidden, logits] = sizes(i);
                let (own, after) = rest.split_at(hidden + logits);
                row(&own[..hidden], &own[hidden..]);
                rest = after;
            }
        }
    }
    Ok(())
}

/// The outputs of a micro-batch: hidden states and router logits of one row, then of the next.
fn outputs<B: Backend>(replica: &Replica<B>, rows: &RetainRows<'_>, rows_of_batch: &[usize]) -> Vec<f32> {
    let (b, model) = (&*replica.model().backend, replica.model());
    let batch = rows.pack(rows_of_batch);
    let inputs = replica.inputs(&batch);
    let mut layers: Vec<Vec<f32>> = Vec::new();
    let mut observe = |routed: Routed<'_, B>| layers.push(b.download(routed.logits));
    let forward = replica.forward(&inputs, None, PassEnd::Loss { all_rows: true }, Some(&mut observe));
    let hidden = b.download(&model.normed(&forward));
    let (d, e) = (model.config.hidden_size, model.config.num_experts);
    let mut out = Vec::new();
    let mut loss_row = 0;
    for sequence in 0..batch.packing.len() {
        let tokens = batch.rows_of(sequence..sequence + 1);
        let carry_loss = loss_rows_in(&batch, &tokens);
        out.extend_from_slice(&hidden[loss_row * d..(loss_row + carry_loss) * d]);
        loss_row += carry_loss;
        layers.iter().for_each(|logits| out.extend_from_slice(&logits[tokens.start * e..tokens.end * e]));
    }
    out
}

pub(super) fn loss_rows_in(batch: &MicroBatch, tokens: &std::ops::Range<usize>) -> usize {
    batch.loss_rows.iter().filter(|row| tokens.contains(&(**row as usize))).count()
}
