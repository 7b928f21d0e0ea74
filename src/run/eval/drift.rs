//! `--drift-from`: how far the evaluated model is from another one on the replies to safe prompts.

use std::sync::Arc;

use crate::backend::Backend;
use crate::config::EvalArgs;
use crate::exit::{self, Failure, Result};
use crate::launch::Rank;
use crate::model::{Model, OffloadedBelow};
use crate::report::DriftReport;
use crate::run::other_routing::{OtherModel, open_alike};
use crate::run::session::{Base, Session};
use crate::train::{Recipe, Replica, RetainRows, RowDrift, drift_by_row, hidden_states};
use crate::ui::Ui;

/// The model of `--drift-from`.
pub struct Other(OtherModel);

/// What it computes for the rows.
pub struct OtherOutputs<B: Backend> {
    states: Vec<Vec<f32>>,
    head: B::Weight,
}

impl Other {
    /// Opens the model, unless it is `base`; `None` without the option, and with a warning where no row has a reply to a safe prompt.
    ///
    /// # Errors
    /// A model that cannot be opened, is damaged, or has another family or other sizes.
    pub fn open(session: &Session, args: &EvalArgs, base: Option<&Base>, ui: &Ui) -> Result<Option<Self>> {
        let Some(name) = &args.drift_from else { return Ok(None) };
        let other = open_alike(session, "--drift-from", name, base)?;
        if session.data.records.iter().all(|record| record.safe_reply.is_none()) {
            let path = session.data.report.path.display();
            ui.warn(format_args!("no drift is measured: {path} holds no reply to a safe prompt, on which it would be"));
            return Ok(None);
        }
        Ok(Some(Self(other)))
    }

    /// The hash over its parameters.
    pub fn sha(&self) -> &str {
        &self.0.sha
    }

    /// Computes its outputs. All ranks call it together.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn outputs<B: Backend>(
        &self,
        session: &Session,
        recipe: &Recipe,
        backend: Arc<B>,
        rank: &Rank,
        offloaded: OffloadedBelow,
    ) -> Result<OtherOutputs<B>> {
        let (config, table) = (session.model.clone(), self.0.table.clone());
        let model = Model::offloaded(backend.clone(), config, table, offloaded);
        let head = self.0.table.weight(&*backend, model.head());
        let replica = Replica::new(model, rank.world.clone());
        replica.world.set_activity("the outputs of the model of --drift-from");
        let states = hidden_states(&replica, &rows(session, recipe))?;
        replica.finish();
        Ok(OtherOutputs { states, head })
    }

    /// The drift over all rows, and by row.
    ///
    /// # Errors
    /// Those of the collective; numbers that are not finite.
    pub fn measure<B: Backend>(
        &self,
        session: &Session,
        recipe: &Recipe,
        replica: &Replica<B>,
        outputs: &OtherOutputs<B>,
    ) -> Result<(DriftReport, Vec<RowDrift>)> {
        replica.world.set_activity("measuring the drift from the model of --drift-from");
        let by_row = drift_by_row(replica, &rows(session, recipe), &outputs.states, &outputs.head)?;
        let tokens: usize = by_row.iter().map(|row| row.tokens).sum();
        let per_token = |sum: f64| sum / tokens.max(1) as f64;
        let kl = per_token(by_row.iter().map(|row| row.kl).sum());
        if !kl.is_finite() {
            let message = format!(
                "the divergence from {} is {kl}: the weights of {} are damaged, or overflow",
                self.0.path.display(),
                session.dir.display()
            );
            return Err(Failure::new(exit::NOT_FINITE, message));
        }
        let report = DriftReport {
            from: self.0.path.clone(),
            sha: self.0.sha.clone(),
            rows: by_row.iter().filter(|row| row.tokens > 0).count(),
            tokens,
            kl,
            same_top_token: per_token(by_row.iter().map(|row| row.same_top as f64).sum()),
        };
        Ok((report, by_row))
    }
}

/// The rows with a reply to a safe prompt, in the order of the file.
fn rows<'s>(session: &'s Session, recipe: &Recipe) -> RetainRows<'s> {
    RetainRows::new(session.sampler(recipe))
}
