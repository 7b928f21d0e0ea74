//! The retention of a training run: the base model's outputs, from the cache or made, and what is said about them.

use std::sync::Arc;

use super::session::Session;
use crate::backend::Backend;
use crate::checkpoint::BaseCache;
use crate::config::RunConfig;
use crate::exit::{self, Failure, Result};
use crate::train::{Drift, Recipe, Replica, RetainRows, Retention, Trained};
use crate::ui::Ui;

/// The folder of the base model's outputs in the output folder.
const FOLDER: &str = "retain_cache";

/// The retention of the run, if it has retain rows. `replica` must have the base model's weights. All ranks call it together.
pub(super) fn open<'a, B: Backend>(
    session: &'a Session,
    config: &RunConfig,
    recipe: &Recipe,
    replica: &Replica<B>,
    ui: &Ui,
) -> Result<Option<Arc<Retention<'a, B>>>> {
    let Some((goal, rows)) = recipe.retain.zip(session.retain_rows(recipe)) else { return Ok(None) };
    replica.world.set_activity("the base model's outputs on the retain rows");
    let cache = BaseCache { folder: config.output_dir.join(FOLDER), key: key(session, &rows, replica)? };
    let base = cache.get(replica, &rows, |why| {
        ui.warn(format_args!("the cached outputs of the base model are made again: {why}"));
    })?;
    let trains_head = recipe.trained() == Some(Trained::Everything);
    Ok(Some(Arc::new(Retention::new(goal, rows, base, replica, trains_head))))
}

/// A hash of everything that decides the base model's outputs.
fn key<B: Backend>(session: &Session, rows: &RetainRows<'_>, replica: &Replica<B>) -> Result<blake3::Hash> {
    let b = &*replica.model().backend;
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"moewarden.base_outputs/2");
    hasher.update(session.weights_hash()?.as_bytes());
    hasher.update(rows.hash().as_bytes());
    hasher.update(&[b.precision() as u8, u8::from(b.free_memory().is_some())]);
    Ok(hasher.finalize())
}

/// The distance from the base model, in one line.
pub(super) fn describe(when: &str, rows: usize, drift: &Drift) -> String {
    let routing = match drift.layers.is_empty() {
        true => String::new(),
        false => {
            format!(", KL of the routing {:.6}, same experts {:.2} %", drift.routing_kl, 100.0 * drift.expert_overlap)
        }
    };
    format!(
        "{when}, on {rows} retain rows: KL from the original model {:.6}, same most probable token {:.2} %, cross-entropy \
         {:.4}{routing}",
        drift.kl,
        100.0 * drift.top1_agreement,
        drift.ce_loss,
    )
}

/// Refuses numbers that are not finite.
pub(super) fn check_finite(drift: &Drift) -> Result<()> {
    if drift.is_finite() {
        return Ok(());
    }
    let message = format!(
        "on the retain rows the cross-entropy is {}, the divergence from the original model {}: the weights have diverged; \
         lower the learning rates",
        drift.ce_loss, drift.kl
    );
    Err(Failure::new(exit::NOT_FINITE, message))
}
