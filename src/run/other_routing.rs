//! Evaluation with the routing or the routers of another model: how much of what training gained is re-routing.

use std::path::PathBuf;

use super::session::{Base, Session};
use crate::config::EvalArgs;
use crate::exit::{self, Context, Failure, Result};
use crate::launch::hub_cache;
use crate::model::{Checkpoint, ModelConfig, ParamTable, check_same_routing};
use crate::report::{OtherRouting, RoutingFrom};

/// Applies `--routers` or `--route-as` to the session, and says which routing is used; `None`: the model's own.
///
/// # Errors
/// A dense model, which has no routing; a model that cannot be opened, is damaged, or has another family or other sizes.
pub(super) fn use_other_routing(session: &mut Session, args: &EvalArgs) -> Result<Option<OtherRouting>> {
    let (from, option, name) = match (&args.routers, &args.route_as) {
        (Some(name), _) => (RoutingFrom::Routers, "--routers", name),
        (None, Some(name)) => (RoutingFrom::LockedRouting, "--route-as", name),
        (None, None) => return Ok(None),
    };
    if session.model.is_dense() {
        let message = format!(
            "{option} would do nothing: {} is a dense model ({}), without experts and routers; leave it out",
            session.dir.display(),
            session.model.model_type
        );
        return Err(Failure::new(exit::CONFIG, message));
    }
    let OtherModel { path, sha, table } = open_alike(session, option, name, None)?;
    let other = OtherRouting { from, path, sha };
    match from {
        RoutingFrom::LockedRouting => session.route_as = Some(table),
        RoutingFrom::Routers => session.table.take_routers(table),
    }
    Ok(Some(other))
}

/// Another model of the configuration of the evaluated one.
pub(super) struct OtherModel {
    pub path: PathBuf,
    /// The hash over its parameters.
    pub sha: String,
    pub table: ParamTable,
}

/// Opens the model that `option` names. `base`: a model that is open already; it is used if it is that one.
///
/// # Errors
/// A model that cannot be opened, is damaged, or has another family or other sizes.
pub(super) fn open_alike(session: &Session, option: &str, name: &str, base: Option<&Base>) -> Result<OtherModel> {
    let path = hub_cache().resolve(name)?;
    let config = ModelConfig::from_dir(&path)?;
    check_same_routing(&session.model, &config).map_err(|mismatch| {
        let folders = (session.dir.display(), path.display());
        Failure::new(exit::CONFIG, format!("{option} {} does not fit {}: {mismatch}", folders.1, folders.0))
    })?;
    let table = match base.filter(|base| base.checkpoint.is_some() && base.dir == path) {
        Some(base) => base.table.clone(),
        None => {
            let checkpoint = Checkpoint::open(&path)?;
            ParamTable::build(&config, &checkpoint).context(format!("{option} {}", path.display()))?
        }
    };
    table.check_finite().context(format!("the checkpoint {} is damaged: fetch it again", path.display()))?;
    Ok(OtherModel { sha: weights_sha(&table), path, table })
}

/// The hash over a model's parameters that eval.json names.
pub(super) fn weights_sha(table: &ParamTable) -> String {
    format!("blake3:{}", table.hashed().finalize())
}
