//! Which activations a training phase keeps.

use super::RankRun;
use crate::backend::Backend;
use crate::launch::memory;
use crate::run::prepare::{self, LargestPass};
use crate::train::memory::TrainedState;
use crate::train::{Objective, TrainingPhase};

impl<B: Backend> RankRun<'_, B> {
    /// Decides how many layers keep their activations in a phase.
    pub(super) fn plan_memory<O: Objective<B>>(&mut self, phase: &TrainingPhase<'_, B, O>, round: usize) {
        let (recipe, model) = (self.recipe, &self.session.model);
        let layers = model.layers.len();
        // A run that was resumed on fewer ranks puts the micro-batches of several former ranks on each.
        let per_rank = self.replica.step_world_size.div_ceil(self.replica.world.world_size());
        let (packed, forwards) = phase.objective().forwards(per_rank);
        let rows = packed * self.session.longest_batch(recipe.batch_size);
        // Each step's own selection may reach any layer.
        let lowest = if recipe.selects_each_step() { 0 } else { phase.trainer().plan.lowest_layer().unwrap_or(layers) };
        let mut budget = memory::budget(&*self.replica.model().backend, self.local_world_size, model.vocab_size);
        if budget.device && recipe.selects_each_step() {
            // Gradients and optimizer state of the experts that the steps will select are not allocated yet.
            let selected = recipe.selected_elements(&self.session.table, model, phase.total_steps());
            let world_size = self.replica.world.world_size();
            let state = TrainedState::predict(selected as u64, 0, world_size);
            budget.free = budget.free.saturating_sub(state.whole + state.sharded);
        }
        let largest = LargestPass { rows, lowest, forwards };
        let part = (round, phase.phase());
        self.replica.kept = prepare::kept_layers(self.session, recipe, &budget, largest, part, self.ui);
    }
}
