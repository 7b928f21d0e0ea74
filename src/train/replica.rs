//! One rank's copy of the model, and the only ways to write its weights.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use super::device_transport::DeviceTransport;
use super::expert_load::ExpertLoads;
use super::fault::{Corruption, Fault, Point};
use super::memory::KeptLayers;
use super::stop::StopFlag;
use crate::backend::{Backend, HostTensor};
use crate::collective::{self, Collective};
use crate::data::MicroBatch;
use crate::exit::{Context, Result};
use crate::model::{
    Forward, ForwardOptions, GradPlan, Inputs, Intervention, InterventionError, Model, MoeLayers, NotFinite, Observer,
    ParamId, PassEnd, Routed, find_non_finite,
};

/// One rank's copy of the model, with its connection to the other ranks.
///
/// The weights are private. Only three methods write them: `update` (an optimizer step, called by [`super::Trainer::update`]),
/// [`Self::restore`] (a checkpoint), and `flip_bit` (an injected fault). Which parameters were written is recorded; all others
/// must stay bit-identical to the model's files, which `run/verify.rs` checks at the end of a run.
pub struct Replica<B: Backend> {
    /// Device-to-device transport; `None`: gradients and weights go through the host. It is the first field because it has to be
    /// dropped before the model: freeing pinned memory may wait for all streams of the device, and if another rank has failed, a
    /// stream ends an exchange only once the communicator is aborted.
    pub transport: Option<Arc<dyn DeviceTransport<B>>>,
    model: Model<B>,
    written: BTreeSet<ParamId>,
    /// The communicator of all ranks.
    pub world: Arc<dyn Collective>,
    /// The world size that the run was started with. It is kept on resume, so that each step sees the same rows.
    pub step_world_size: usize,
    /// Which layers keep their activations, decided once a phase.
    pub kept: KeptLayers,
    /// Set when this process is asked to save and stop.
    pub stop: StopFlag,
    /// The fault to inject on this rank, in tests.
    pub fault: Option<Fault>,
    /// Whether the next gradient becomes NaN, in tests.
    pub(super) inject_nan: bool,
    /// Counts the tokens of forward passes, between [`Self::count_loads`] and [`Self::take_loads`].
    loads: Option<Mutex<ExpertLoads>>,
}

/// Sums over all ranks before a step's first backward pass.
pub(super) struct StepTotals {
    /// Tokens with loss, of all ranks.
    pub loss_tokens: f64,
    /// Tokens of all ranks.
    pub tokens: usize,
    /// Whether the stop flag of some rank is set.
    pub stop: bool,
}

impl StepTotals {
    /// The divisor of a mean over tokens with loss; 1 without any.
    pub fn divisor(&self) -> f64 {
        self.loss_tokens.max(1.0)
    }
}

/// This rank's part of the global order: micro-batch `i` belongs to rank `i mod world size`. Each with its index.
pub fn share<'a, M>(
    micro_batches: &'a [M],
    world: &dyn Collective,
) -> impl Iterator<Item = (usize, &'a M)> + use<'a, M> {
    let (rank, size) = (world.rank(), world.world_size());
    micro_batches.iter().enumerate().filter(move |(i, _)| i % size == rank)
}

impl<B: Backend> Replica<B> {
    /// A copy of the untrained model. All layers keep their activations until [`Self::kept`] says otherwise.
    pub fn new(model: Model<B>, world: Arc<dyn Collective>) -> Self {
        Self {
            model,
            written: BTreeSet::new(),
            step_world_size: world.world_size(),
            world,
            transport: None,
            kept: KeptLayers::ALL,
            stop: StopFlag::default(),
            fault: None,
            inject_nan: false,
            loads: None,
        }
    }

    /// The model with its present weights.
    pub fn model(&self) -> &Model<B> {
        &self.model
    }

    /// Frees the model. All ranks call it together: until then one may read experts that lie on another's device.
    pub fn finish(self) {
        let backend = self.model.backend.clone();
        drop(self);
        backend.fence_weights();
    }

    /// The model with its present weights, without the ranks.
    pub fn into_model(self) -> Model<B> {
        self.model
    }

    /// Parameters that have been written since the model was loaded.
    pub fn written(&self) -> &BTreeSet<ParamId> {
        &self.written
    }

    /// The decoder layers that route.
    pub fn moe_layers(&self) -> &MoeLayers {
        self.model.config.moe_layers()
    }

    /// Changes the routing of all passes from now on; `None`: back to the model's own.
    ///
    /// # Errors
    /// An intervention that is not possible; the former one then stays.
    pub fn set_intervention(&mut self, intervention: Option<&Intervention>) -> Result<(), InterventionError> {
        self.model.set_intervention(intervention)
    }

    // --- writing weights -----------------------------------------------------------------------------------------

    /// Writes `params` by an optimizer step: the only parameters that `write` may change. All ranks call it together.
    pub(super) fn update(
        &mut self,
        params: &[ParamId],
        write: impl FnOnce(&mut Model<B>) -> collective::Result<()>,
    ) -> collective::Result<()> {
        self.written.extend(params);
        self.model.backend.fence_weights();
        write(&mut self.model)?;
        self.model.backend.fence_weights();
        Ok(())
    }

    /// Writes the weights of a checkpoint. All ranks call it together.
    pub fn restore(&mut self, weights: impl IntoIterator<Item = (ParamId, HostTensor)>) {
        self.model.backend.fence_weights();
        for (id, value) in weights {
            self.model.set_weight_host(id, value);
            self.written.insert(id);
        }
        self.model.backend.fence_weights();
    }

    /// Flips one bit of the first trained weight.
    fn flip_bit(&mut self) {
        let id = *self.written.first().expect("the fault needs a weight that was trained");
        let value = self.model.weight_host(id);
        let mut bytes = value.bytes.to_vec();
        bytes[0] ^= 1;
        self.model.set_weight_host(id, HostTensor::new(value.dtype, value.shape.clone(), bytes.into()));
    }

    /// The present values of all parameters that have been written.
    pub fn changed(&self) -> BTreeMap<ParamId, HostTensor> {
        self.written.iter().map(|&id| (id, self.model.weight_host(id))).collect()
    }

    /// Checks the trained weights: in a 16-bit format an update may overflow.
    ///
    /// # Errors
    /// The first weight that is not finite.
    pub fn check_weights(&self, when: &str) -> Result<()> {
        for (id, value) in self.changed() {
            if let Some(index) = find_non_finite(&value) {
                let what = format!(
                    "training diverged in {when}, whose model was not saved: lower the learning rates or set --max-grad-norm"
                );
                return Err(NotFinite { tensor: self.model.table.params[id].name(), index }).context(what);
            }
        }
        Ok(())
    }

    // --- passes --------------------------------------------------------------------------------------------------

    /// Copies a micro-batch to the device.
    pub fn inputs(&self, batch: &MicroBatch) -> Inputs<B> {
        Inputs::new(&self.model, &batch.ids, &batch.packing, &batch.loss_rows, &batch.targets)
    }

    /// Counts the tokens that all forward passes from now on route to each expert.
    pub(super) fn count_loads(&mut self) {
        let loads = ExpertLoads::new(&self.moe_layers().layers, self.model.config.num_experts);
        self.loads = Some(Mutex::new(loads));
    }

    /// The tokens since [`Self::count_loads`], of all ranks.
    ///
    /// # Errors
    /// Those of the collective.
    pub(super) fn take_loads(&mut self) -> Result<ExpertLoads> {
        let loads = self.loads.take().expect("loads are counted");
        let mut loads = loads.into_inner().expect("no pass panicked");
        loads.all_reduce(&*self.world)?;
        Ok(loads)
    }

    /// A forward pass. It keeps what a backward by `plan` reads; without a plan, nothing.
    pub fn forward(
        &self,
        inputs: &Inputs<B>,
        plan: Option<&GradPlan>,
        end: PassEnd,
        mut observer: Option<Observer<'_, B>>,
    ) -> Forward<B> {
        let layers = self.model.config.layers.len();
        let lowest = plan.and_then(GradPlan::lowest_layer).unwrap_or(layers);
        let options = ForwardOptions { lowest, keep_from: self.kept.keep_from(layers, lowest), end };
        let Some(loads) = &self.loads else { return self.model.forward(inputs, options, observer) };
        let (b, layers) = (&*self.model.backend, self.moe_layers());
        let mut count = |routed: Routed<'_, B>| {
            let tokens = b.tokens_per_expert(routed.dispatch);
            loads.lock().expect("no pass panicked").add_layer(layers.index_of(routed.layer), &tokens);
            if let Some(observe) = &mut observer {
                observe(routed);
            }
        };
        self.model.forward(inputs, options, Some(&mut count))
    }

    // --- agreement between ranks ---------------------------------------------------------------------------------

    /// Sums the tokens of a step's micro-batches over all ranks, and the stop flags.
    pub(super) fn sum_step_totals<'m>(&self, own: impl IntoIterator<Item = &'m MicroBatch>) -> Result<StepTotals> {
        let mut sums = [0.0, 0.0, f64::from(u8::from(self.stop.is_set()))];
        for batch in own {
            sums[0] += batch.targets.len() as f64;
            sums[1] += batch.ids.len() as f64;
        }
        self.world.all_reduce_f64(&mut sums)?;
        Ok(StepTotals { loss_tokens: sums[0], tokens: sums[1] as usize, stop: sums[2] > 0.0 })
    }

    /// The logical OR of each condition over all ranks.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn any<const N: usize>(&self, conditions: [bool; N]) -> Result<[bool; N]> {
        let mut counts = conditions.map(|condition| f64::from(u8::from(condition)));
        self.world.all_reduce_f64(&mut counts)?;
        Ok(counts.map(|count| count > 0.0))
    }

    /// `n` values, each from the one rank that has it: `own` holds (index, value) of this rank. Every rank gets all of them; an
    /// index that no rank has is 0.
    pub(super) fn gather_by_index(&self, n: usize, own: &[(usize, f64)]) -> Result<Vec<f64>> {
        let mut all = vec![0.0; n];
        for &(index, value) in own {
            all[index] = value;
        }
        self.world.all_reduce_f64(&mut all)?;
        Ok(all)
    }

    // --- fault injection -----------------------------------------------------------------------------------------

    /// Visits a point where a fault may be injected.
    ///
    /// # Errors
    /// The injected error.
    pub fn visit(&mut self, point: Point) -> Result<()> {
        let Some(fault) = &self.fault else { return Ok(()) };
        match fault.visit(point)? {
            Some(Corruption::NanGradient) => self.inject_nan = true,
            Some(Corruption::FlippedBit) => self.flip_bit(),
            None => {}
        }
        Ok(())
    }

    /// Visits a point where no fault changes this rank's data.
    ///
    /// # Errors
    /// The injected error.
    pub fn visit_unchanged(&self, point: Point) -> Result<()> {
        self.fault.as_ref().map_or(Ok(()), |fault| fault.visit(point).map(drop))
    }
}
