//! The memory of a run, predicted from shapes.

use super::generation::GenerationMemory;
use super::placement::{Away, ExpertPlacement};
use crate::config::RunConfig;
use crate::exit::{self, Failure, Result};
use crate::launch::memory::{far_beyond, human};
use crate::model::ParamKind;
use crate::run::session::Session;
use crate::train::memory::{Activations, MemoryBudget, TrainedState};
use crate::train::{Recipe, Trained, Training};

/// The predicted peak memory of one rank, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryForecast {
    /// All weights, except for those of a device that are in the host's memory; with the room through which these pass.
    pub weights: u64,
    /// Which routed experts are in the host's memory.
    pub placement: ExpertPlacement,
    /// Whether they are memory-mapped, so that the kernel may drop them and read them again.
    pub mapped: bool,
    /// Free memory, that of the mapped weights included.
    pub free: u64,
    /// Whether it is the memory of a device.
    pub device: bool,
    /// Activations of the largest micro-batches.
    pub activations: u64,
    /// Gradients, optimizer state and new weights.
    pub state: TrainedState,
    /// The model's own replies, which are not generated while activations wait for a backward.
    pub generation: GenerationMemory,
    /// Tokens of the largest micro-batch.
    pub rows: usize,
    /// Micro-batches whose activations exist at the same time.
    pub forwards: usize,
    /// Layers that keep their activations.
    pub kept_layers: usize,
}

impl MemoryForecast {
    /// Of a run that trains at most `trained` elements at once, on `world_size` ranks.
    pub fn new(
        session: &Session,
        config: &RunConfig,
        recipe: &Recipe,
        trained: usize,
        world_size: usize,
        budget: MemoryBudget,
        placement: ExpertPlacement,
    ) -> Self {
        let rows = session.longest_batch(recipe.batch_size);
        let activations = Activations::predict(&session.model, rows, &budget);
        let layers = session.model.layers.len();
        let forwards = forwards(session, recipe);
        let loaded = loaded(session, trained, world_size, budget, placement);
        let kept = activations.kept_layers(recipe.recompute, layers, 0, &loaded, forwards);
        let keep_from = kept.keep_from(layers, 0);
        let waiting = activations.peak(layers, 0, keep_from) - activations.working;
        Self {
            weights: placement.on_device(session.table.total().bytes as u64) + base_head(session, recipe, budget),
            placement,
            mapped: is_mapped(session, budget),
            free: budget.free,
            device: budget.device,
            activations: waiting.saturating_mul(forwards as u64).saturating_add(activations.working),
            state: trained_state(session, trained, world_size, budget),
            generation: GenerationMemory::new(session, config, recipe, &budget),
            rows,
            forwards,
            kept_layers: layers - keep_from,
        }
    }

    /// Where routed experts lie in a run that trains at most `trained` elements at once, on `world_size` ranks: beside what passes
    /// need at least, and the trained state.
    pub fn place_experts(
        session: &Session,
        config: &RunConfig,
        recipe: &Recipe,
        trained: usize,
        world_size: usize,
        budget: MemoryBudget,
    ) -> ExpertPlacement {
        let rows = session.longest_batch(recipe.batch_size);
        let activations = Activations::predict(&session.model, rows, &budget);
        let passes = activations.least(recipe.recompute, session.model.layers.len(), forwards(session, recipe));
        let passes = passes.max(GenerationMemory::new(session, config, recipe, &budget).total());
        let state =
            trained_state(session, trained_in_a_phase(session, recipe, trained, world_size), world_size, budget);
        let needs = room_for_passes(passes) + state.whole + state.sharded + base_head(session, recipe, budget);
        ExpertPlacement::plan(config.offload, &session.table, 1, needs, &budget)
    }

    /// What a rank uses if there is enough memory.
    pub fn total(&self) -> u64 {
        self.needed().saturating_add(if self.mapped { self.weights } else { 0 })
    }

    /// What a rank cannot do without. Of memory-mapped weights, the kernel keeps as many as fit into the rest.
    pub fn needed(&self) -> u64 {
        let passes = self.activations.max(self.generation.total());
        let weights = if self.mapped { 0 } else { self.weights };
        passes.saturating_add(weights + self.state.whole + self.state.sharded)
    }

    /// The predicted peak of a rank in the memory that is free.
    pub fn peak(&self) -> u64 {
        self.total().min(self.free.max(self.needed()))
    }

    /// Refuses a run that needs far more memory than there is for each of `ranks` ranks on this machine.
    ///
    /// # Errors
    /// What is needed, what is free, and what helps.
    pub fn check(&self, budget: &MemoryBudget, ranks: usize, force: bool) -> Result<()> {
        if force || !far_beyond(self.needed(), self.free) {
            return self.placement.check(budget, ranks, force);
        }
        let message = format!(
            "a rank needs {} of memory, but {} are free{}; --force starts the run all the same",
            human(self.needed()),
            human(self.free),
            self.shortage().map_or_else(String::new, |shortage| format!(": {shortage}")),
        );
        Err(Failure::new(exit::LAUNCHER, message))
    }

    /// Where the memory does not suffice: what happens, and what helps.
    fn shortage(&self) -> Option<String> {
        if self.total() <= self.free {
            None
        } else if self.mapped && self.needed() <= self.free {
            Some(format!(
                "{} of the weights do not fit into the memory that is left for them, and are read from the disk again in each pass",
                human(self.total() - self.free)
            ))
        } else {
            let weights = match self.placement.away {
                Away::Ranks(_) => " more GPUs on this machine, --offload host in place of --shard-frozen,",
                Away::Host if self.can_offload() => " --offload auto or host, --shard-frozen on several GPUs,",
                Away::Host => "",
            };
            Some(format!(
                "{} are missing: --recompute always, a smaller --batch-size, --max-length or --top-k-experts,{weights} or ranks on more \
                 machines need less",
                human(self.needed() - self.free),
            ))
        }
    }

    /// Whether there are experts on a device that could be in the host's memory.
    fn can_offload(&self) -> bool {
        self.device && self.placement.offloaded < self.placement.moe_layers
    }

    /// The forecast in text.
    pub fn describe(&self, session: &Session, world_size: usize, budget: MemoryBudget) -> String {
        let Self { state, forwards, rows, kept_layers, generation, .. } = *self;
        let replies = match generation.cache {
            0 => String::new(),
            cache => {
                format!(", or {} for own replies, of which {} keys and values", human(generation.total()), human(cache))
            }
        };
        let of = if forwards == 1 { "a micro-batch".into() } else { format!("{forwards} micro-batches") };
        let mapped = match session.checkpoint {
            _ if budget.device => "",
            Some(_) => " (memory-mapped: ranks on one machine share them)",
            None => " (random: each rank makes its own)",
        };
        format!(
            "memory a rank: weights {}{mapped}, activations {} for {of} of up to {rows} tokens ({kept_layers} of {} layers \
             kept, the others recomputed){replies}, trained state {} ({} {}, 1/{world_size} of masters and moments {}): {} in total; {} \
             free{}{}",
            human(self.weights),
            human(self.activations),
            session.model.layers.len(),
            human(state.whole + state.sharded),
            if budget.device { "gradients" } else { "gradients and new weights" },
            human(state.whole),
            human(state.sharded),
            human(self.total()),
            human(self.free),
            self.shortage().map_or_else(String::new, |shortage| format!(". {shortage}")),
            self.placement.describe().map_or_else(String::new, |placement| format!("\n{placement}")),
        )
    }
}

/// The memory in which passes that need so much run: in an eighth more, for fragmentation.
pub fn room_for_passes(bytes: u64) -> u64 {
    bytes.saturating_add(bytes / 7)
}

/// Bytes of forward passes alone: over the rows, and of replies of at most `max_new_tokens` tokens to prompts of these lengths.
pub fn forward_passes(
    session: &Session,
    batch_size: usize,
    (prompts, max_new_tokens, generation_batch_size): (&[usize], usize, usize),
    budget: &MemoryBudget,
) -> u64 {
    let rows = Activations::predict(&session.model, session.longest_batch(batch_size), budget);
    let rows = rows.input + rows.kept + rows.working;
    let replies =
        GenerationMemory::of_prompts(prompts, max_new_tokens.max(1), generation_batch_size, &session.model, budget);
    rows.max(replies.total())
}

/// Forward passes that wait for their backward at the same time.
fn forwards(session: &Session, recipe: &Recipe) -> usize {
    recipe.forwards_at_once(session.unsafe_replies())
}

/// Bytes of the base model's head: the divergence from the base model needs it, if the run trains the head. On the host it is
/// memory-mapped.
fn base_head(session: &Session, recipe: &Recipe, budget: MemoryBudget) -> u64 {
    let copied = recipe.retain.is_some() && recipe.trained() == Some(Trained::Everything) && budget.device;
    let head = session.model.vocab_size * session.model.hidden_size * head_size(session);
    if copied { head as u64 } else { 0 }
}

/// Bytes of an element of the head.
fn head_size(session: &Session) -> usize {
    let table = &session.table;
    let head = table.id(ParamKind::LmHead).or_else(|| table.id(ParamKind::Embedding));
    head.map_or(4, |id| table.params[id].dtype().size())
}

/// Whether the weights are memory-mapped: those of a checkpoint, on the host.
fn is_mapped(session: &Session, budget: MemoryBudget) -> bool {
    !budget.device && session.checkpoint.is_some()
}

/// The memory that is left once weights and trained state are loaded. On the host the weights of a checkpoint stay
/// memory-mapped, and their pages count as free.
fn loaded(
    session: &Session,
    trained: usize,
    world_size: usize,
    budget: MemoryBudget,
    placement: ExpertPlacement,
) -> MemoryBudget {
    let state = trained_state(session, trained, world_size, budget);
    let total = session.table.total().bytes as u64;
    let resident = if is_mapped(session, budget) { 0 } else { placement.on_device(total) };
    MemoryBudget { free: budget.free.saturating_sub(resident + state.whole + state.sharded), ..budget }
}

/// The elements that a phase trains, if a step trains `trained`: where each step selects experts, the state of those of earlier steps
/// stays on the device.
fn trained_in_a_phase(session: &Session, recipe: &Recipe, trained: usize, world_size: usize) -> usize {
    let replies = session.unsafe_replies();
    let (examples, grad_accum, epochs) = match &recipe.training {
        Training::Experts(phase) | Training::Alternate(phase, _) => (replies, phase.grad_accum, phase.epochs),
        Training::Joint(phase) => (phase.examples(replies as f64).ceil() as usize, phase.grad_accum, phase.epochs),
        Training::Nothing | Training::Routers(_) => return trained,
    };
    let a_step = recipe.trained_elements(&session.table, &session.model).experts;
    if !recipe.selects_each_step() || trained < a_step {
        return trained;
    }
    let steps = examples.div_ceil(recipe.batch_size).div_ceil(grad_accum * world_size) * epochs;
    recipe.selected_elements(&session.table, &session.model, steps).max(a_step) + (trained - a_step)
}

fn trained_state(session: &Session, trained: usize, world_size: usize, budget: MemoryBudget) -> TrainedState {
    let total = session.table.total();
    // On a device, and where the weights are random, an update overwrites the weights; else it replaces memory-mapped ones.
    let new = if is_mapped(session, budget) { (total.bytes / total.elements.max(1)) as u64 } else { 0 };
    TrainedState::predict(trained as u64, new, world_size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_weights_take_what_is_left_of_the_memory() {
        let state = TrainedState { whole: 20, sharded: 30 };
        let generation = GenerationMemory::default();
        let budget = MemoryBudget {
            activation_size: 4,
            routed_size: 4,
            logit_rows: 0,
            vocab_size: 8,
            free: 0,
            host: 0,
            divided: None,
            device: false,
        };
        let of = |mapped, free| MemoryForecast {
            weights: 100,
            placement: ExpertPlacement::default(),
            mapped,
            free,
            device: false,
            activations: 7,
            state,
            generation,
            rows: 1,
            forwards: 1,
            kept_layers: 1,
        };
        for (mapped, free, needed, peak, said) in [
            (true, 200, 57, 157, ""),
            (true, 90, 57, 90, "67 B of the weights"),
            (true, 50, 57, 57, "7 B are missing"),
            (false, 150, 157, 157, "7 B are missing"),
            (false, 157, 157, 157, ""),
        ] {
            let forecast = of(mapped, free);
            assert_eq!((forecast.total(), forecast.needed(), forecast.peak()), (157, needed, peak), "{mapped} {free}");
            let shortage = forecast.shortage().unwrap_or_default();
            assert_eq!(shortage.is_empty(), said.is_empty());
            assert!(shortage.contains(said), "{shortage}");
            assert!(forecast.check(&budget, 1, false).is_ok(), "within the error of the forecast");
        }
        let far_beyond = of(false, 100);
        let refused = far_beyond.check(&budget, 1, false).unwrap_err().to_string();
        assert!(refused.contains("157 B") && refused.contains("100 B") && refused.contains("--force"), "{refused}");
        assert!(far_beyond.check(&budget, 1, true).is_ok());
        let on_a_gpu = |offloaded| MemoryForecast {
            device: true,
            placement: ExpertPlacement { moe_layers: 3, offloaded, ..ExpertPlacement::default() },
            ..far_beyond
        };
        assert!(on_a_gpu(2).shortage().unwrap().contains("--offload"));
        assert!(!on_a_gpu(3).shortage().unwrap().contains("--offload"), "all experts are in the host's memory");
    }
}
