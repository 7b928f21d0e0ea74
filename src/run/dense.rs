//! Dense models: no layer has experts, so nothing is identified, and training has one mode.

use crate::config::RunConfig;
use crate::exit::{self, Failure, Result};
use crate::launch::hub_cache;
use crate::model::ModelConfig;
use crate::train::{Identify, Recipe, ScoreBy, Trained, Training};
use crate::ui::Ui;

/// The recipe for the model of the run: of a dense model without identification and router phase.
///
/// # Errors
/// A model that cannot be found; a dense model, of which the recipe trains experts or routers, or nothing.
pub(super) fn fit_recipe(recipe: Recipe, config: &RunConfig, ui: &Ui) -> Result<Recipe> {
    let dir = hub_cache().resolve(&config.model_name)?;
    let model = ModelConfig::from_dir(&dir)?;
    if !model.is_dense() {
        return Ok(recipe);
    }
    let refused = |what: &str| {
        let message = format!(
            "{} is a dense model ({}): {what}. `moewarden eval` measures it, and `moewarden train --mode baseline` trains all its \
             weights",
            dir.display(),
            model.model_type
        );
        Failure::new(exit::CONFIG, message)
    };
    let training = match recipe.training {
        Training::Alternate(phase, _) if phase.trained == Trained::Everything => {
            ui.warn("the model is dense, without routers to align: there is no router phase");
            Training::Experts(phase)
        }
        Training::Experts(phase) if phase.trained == Trained::Everything => Training::Experts(phase),
        Training::Nothing => return Err(refused("it has no experts, so there is nothing to identify")),
        _ => return Err(refused("it has no experts and no routers, so this mode has nothing to identify or to train")),
    };
    if config.verify > 0 {
        return Err(refused("it has no experts, so --verify has nothing to check"));
    }
    if recipe.retain.is_some_and(|retain| retain.routing_weight > 0.0) {
        return Err(refused("it routes nothing, so --retain-routing-weight would do nothing"));
    }
    let identify = Identify { by: ScoreBy::Given, given: Vec::new(), bootstrap: 0, ..recipe.identify };
    Ok(Recipe { identify, training, ..recipe })
}
