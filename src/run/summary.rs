//! What a run says at its end, or at the end of a part of it.

use super::session::Session;
use crate::backend::Backend;
use crate::exit::Result;
use crate::launch::memory::{human, peak_resident};
use crate::train::{Identification, Measured, Replica};
use crate::ui::Ui;

/// The losses in one line.
pub(super) fn losses(when: &str, m: &Measured) -> String {
    let parts = [
        m.ce_loss.map(|x| format!("cross-entropy of the refusals {x:.4}")),
        m.safe_loss.map(|x| format!("of the replies to safe prompts {x:.4}")),
        m.router_loss.map(|x| format!("divergence of the routers {x:.5}")),
        m.held_out_loss.map(|x| format!("cross-entropy of the held-out refusals {x:.4}")),
    ];
    format!("{when}: {}", parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
}

/// Prints how many experts of each layer are selected, the first of them with their scores, and how many the scores single out.
pub(super) fn selection(found: &Identification, session: &Session, ui: &Ui) {
    const SHOWN: usize = 5;
    if session.model.is_dense() {
        return;
    }
    let layers = &session.model.moe_layers().layers;
    let experts = &found.selected.experts;
    let all = layers.len() * session.model.num_experts;
    let mut lines = format!("selected {} of {all} experts; by layer:", experts.len());
    for layer in layers {
        lines += &format!(" {}", experts.iter().filter(|id| id.layer == *layer).count());
    }
    for id in experts.iter().take(SHOWN) {
        if let Some(score) = found.scores.get(*id).filter(|s| *s != 0.0) {
            lines += &format!("\n  layer {:>2} expert {:>3}  {score:.4e}", id.layer, id.expert);
        }
    }
    if let Some(how_many) = found.how_many.as_ref().filter(|_| found.kept_from.is_none()) {
        for line in how_many.describe().lines() {
            lines += &format!("\n  {line}");
        }
    }
    ui.line(lines);
}

/// Peak resident memory of each process, peak memory of each rank on its device beside the prediction, and the profile of the
/// device's operations, if one was taken. All ranks call it together.
pub(super) fn resources<B: Backend>(replica: &Replica<B>, predicted: u64) -> Result<String> {
    let device = replica.model().backend.peak_memory();
    let own = [peak_resident(), device.unwrap_or(0)].map(u64::to_le_bytes).concat();
    let all = replica.world.all_gather(&own)?;
    let nth = |i: usize| {
        let bytes = all.iter().map(|both| both[8 * i..][..8].try_into().map_or(0, u64::from_le_bytes));
        bytes.map(human).collect::<Vec<_>>().join(", ")
    };
    let many = all.len() > 1;
    let mut text = format!("peak memory{}: {}", if many { " of each rank's process" } else { "" }, nth(0));
    if device.is_some() {
        let whose = if many { " of each rank" } else { "" };
        text += &format!("\npeak memory on the GPU{whose}, for tensors: {} (predicted: {})", nth(1), human(predicted));
    }
    if let Some(profile) = replica.model().backend.profile() {
        let whose = if many { format!("of rank {}, ", replica.world.rank()) } else { String::new() };
        text += &format!("\n{whose}{profile}");
    }
    Ok(text)
}
