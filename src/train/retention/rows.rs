//! How far a model is from another one, row by row: the next-token distributions on the replies.

use super::RetainRows;
use super::base::{compute_base, loss_rows_in};
use crate::backend::Backend;
use crate::exit::Result;
use crate::meter::{Meter, Unit};
use crate::model::{BaseHead, PassEnd};
use crate::train::replica::{Replica, share};

/// The distance of a model from another one on one row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowDrift {
    /// Tokens with loss, n.
    pub tokens: usize,
    /// Σ over them of KL(p_other ‖ p) of the next-token distributions, in nats.
    pub kl: f64,
    /// At how many of them both models have the same most probable token.
    pub same_top: usize,
}

impl RowDrift {
    /// Mean divergence over the tokens; `None` without one.
    pub fn per_token(&self) -> Option<f64> {
        (self.tokens > 0).then(|| self.kl / self.tokens as f64)
    }
}

/// The final hidden states of the tokens with loss behind the norm, `[n, D]` for each row.
///
/// # Errors
/// Those of the collective.
pub fn hidden_states<B: Backend>(replica: &Replica<B>, rows: &RetainRows<'_>) -> Result<Vec<Vec<f32>>> {
    let mut states = Vec::with_capacity(rows.len());
    compute_base(replica, rows, |hidden, _| states.push(hidden.to_vec()))?;
    Ok(states)
}

/// The distance of `replica`'s model from the one with these hidden states and this head, for each row; the same on all ranks.
///
/// # Errors
/// Those of the collective.
pub fn drift_by_row<B: Backend>(
    replica: &Replica<B>,
    rows: &RetainRows<'_>,
    states: &[Vec<f32>],
    head: &B::Weight,
) -> Result<Vec<RowDrift>> {
    let (b, model) = (&*replica.model().backend, replica.model());
    let d = model.config.hidden_size;
    let batches = rows.in_order();
    let mut own = Vec::new();
    let meter = Meter::start("measuring the drift from another model", Unit::Rows, rows.len() as u64);
    for (_, rows_of_batch) in share(&batches, &*replica.world) {
        meter.add(rows_of_batch.len());
        let batch = rows.pack(rows_of_batch);
        let inputs = replica.inputs(&batch);
        let forward = replica.forward(&inputs, None, PassEnd::Loss { all_rows: false }, None);
        let normed = b.download(&model.normed(&forward));
        let mut first = 0;
        for (sequence, &row) in rows_of_batch.iter().enumerate() {
            let n = loss_rows_in(&batch, &batch.rows_of(sequence..sequence + 1));
            let (mut kl, mut same) = (0.0, 0);
            if n > 0 {
                let [ours, theirs] =
                    [&normed[first * d..(first + n) * d], &states[row]].map(|rows| b.upload(n, d, rows));
                (kl, same) = model.kl_of(&ours, &BaseHead { normed: &theirs, head: Some(head) });
            }
            first += n;
            own.extend([(3 * row, n as f64), (3 * row + 1, kl), (3 * row + 2, same as f64)]);
        }
    }
    let all = replica.gather_by_index(3 * rows.len(), &own)?;
    let row = |values: &[f64; 3]| RowDrift { tokens: values[0] as usize, kl: values[1], same_top: values[2] as usize };
    Ok(all.as_chunks::<3>().0.iter().map(row).collect())
}
