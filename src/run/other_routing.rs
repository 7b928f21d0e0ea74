//! Evaluation with the routing or the routers of another model: how much of what training gained is re-routing.

use super::session::Session;
use crate::config::EvalArgs;
use crate::exit::{self, Context, Failure, Result};
use crate::launch::hub_cache;
use crate::model::{Checkpoint, ModelConfig, ParamTable, check_same_routing};
use crate::report::{OtherRouting, RoutingFrom};

/// Applies `--routers` or `--route-as` to the session, and says which routing is used; `None`: the model's own.
///
/// # Errors
/// A model that cannot be opened, is damaged, or has another family or other sizes.
pub(super) fn use_other_routing(session: &mut Session, args: &EvalArgs) -> Result<Option<OtherRouting>> {
    let (from, option, name) = match (&args.routers, &args.route_as) {
        (Some(name), _) => (RoutingFrom::Routers, "--routers", name),
        (None, Some(name)) => (RoutingFrom::LockedRouting, "--route-as", name),
        (None, None) => return Ok(None),
    };
    let dir = hub_cache().resolve(name)?;
    let config = ModelConfig::from_dir(&dir)?;
    let refused = |what: String| {
        let folders = (session.dir.display(), dir.display());
        Failure::new(exit::CONFIG, format!("{option} {} does not fit {}: {what}", folders.1, folders.0))
    };
    check_same_routing(&session.model, &config).map_err(|mismatch| refused(mismatch.to_string()))?;
    let table = ParamTable::build(&config, &Checkpoint::open(&dir)?)?;
    table.check_finite().context(format!("the checkpoint {} is damaged: fetch it again", dir.display()))?;
    let other = OtherRouting { from, path: dir, sha: weights_sha(&table) };
    match from {
        RoutingFrom::LockedRouting => session.route_as = Some(table),
        RoutingFrom::Routers => session.table.take_routers(table),
    }
    Ok(Some(other))
}

/// The hash over a model's parameters that eval.json names.
pub(super) fn weights_sha(table: &ParamTable) -> String {
    format!("blake3:{}", table.hashed().finalize())
}
