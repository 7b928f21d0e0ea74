//! One rank at work: a model, its share of the micro-batches, and the passes that all phases are made of.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::alignment::MoeLayers;
use super::direct::Direct;
use super::fault::{Action, Fault, Point};
use super::memory::{Activations, Place};
use super::ranks::Rank;
use super::session::passes_at_once;
use super::stop::Stop;
use crate::backend::{Backend, HostTensor};
use crate::collective::Collective;
use crate::config::RunConfig;
use crate::data::{Dataset, MicroBatch};
use crate::exit::{self, Context, Failure, Result};
use crate::model::{
    Forward, ForwardOptions, GradPlan, Inputs, LayerKind, Model, NotFinite, Observer, ParamId, PassEnd, find_non_finite,
};
use crate::optim::LossMeter;

/// Everything a phase works with on one rank.
pub struct Engine<'a, B: Backend> {
    /// The weights, on this rank's device.
    pub model: Model<B>,
    /// The other ranks.
    pub world: Arc<dyn Collective>,
    /// The way from this rank's device to those of the others; `None`: by way of the host.
    pub direct: Option<Arc<dyn Direct<B>>>,
    /// Ranks on this machine, this one included: they share its memory.
    pub ranks_here: usize,
    /// Ranks for whose number the steps are made. A run that goes on with another number of ranks takes the same steps.
    pub step_ranks: usize,
    /// Whether this process was asked to save and leave.
    pub stop: Stop,
    /// What is to go wrong on this rank, in tests.
    pub fault: Option<Fault>,
    /// What was asked for.
    pub config: &'a RunConfig,
    /// The training rows.
    pub data: &'a Dataset,
    /// Parameters that an optimizer has written.
    pub touched: BTreeSet<ParamId>,
    /// The next gradient is to be NaN, in tests.
    pub poisoned: bool,
}

/// The micro-batches of the global order that belong to this rank, each with its place in that order: number i belongs to
/// rank i mod world.
pub fn share<'a, M>(
    micro_batches: &'a [M],
    world: &dyn Collective,
) -> impl Iterator<Item = (usize, &'a M)> + use<'a, M> {
    let (rank, size) = (world.rank(), world.world_size());
    micro_batches.iter().enumerate().filter(move |(i, _)| i % size == rank)
}

impl<'a, B: Backend> Engine<'a, B> {
    /// Puts a model at the disposal of one rank.
    pub fn new(model: Model<B>, rank: &Rank, config: &'a RunConfig, data: &'a Dataset) -> Self {
        Self {
            model,
            world: rank.world.clone(),
            direct: None,
            ranks_here: rank.here,
            step_ranks: rank.world.world_size(),
            stop: rank.stop.clone(),
            fault: rank.fault.clone(),
            config,
            data,
            touched: BTreeSet::new(),
            poisoned: false,
        }
    }

    /// Passes a point at which a fault may have been asked for.
    ///
    /// # Errors
    /// The error on purpose.
    pub(super) fn pass(&mut self, point: Point) -> Result<()> {
        let Some(fault) = &self.fault else { return Ok(()) };
        match fault.pass(point)? {
            Some(Action::Nan) => self.poisoned = true,
            Some(Action::Perturb) => {
                let id = *self.touched.first().expect("a weight is perturbed after it was trained");
                let value = self.model.weight_host(id);
                let mut bytes = value.bytes.to_vec();
                bytes[0] ^= 1;
                self.model.set_weight_host(id, HostTensor::new(value.dtype, value.shape.clone(), bytes.into()));
            }
            _ => {}
        }
        Ok(())
    }

    /// Passes a stage of saving a checkpoint.
    ///
    /// # Errors
    /// The error on purpose.
    pub(super) fn pass_save(&self) -> Result<()> {
        self.fault.as_ref().map_or(Ok(()), |fault| fault.pass(Point::Save).map(drop))
    }

    /// Puts a micro-batch on the device.
    pub fn inputs(&self, batch: &MicroBatch) -> Inputs<B> {
        Inputs::new(&self.model, &batch.ids, &batch.packing, &batch.loss_rows, &batch.targets)
    }

    /// A forward pass that keeps what a backward by `plan` reads (`None`: nothing).
    pub fn forward(
        &self,
        inputs: &Inputs<B>,
        plan: Option<&GradPlan>,
        end: PassEnd,
        observer: Option<Observer<'_, B>>,
    ) -> Forward<B> {
        let layers = self.model.config.layers.len();
        let lowest = plan.and_then(GradPlan::lowest_layer).unwrap_or(layers);
        let place = Place::of(&*self.model.backend, self.ranks_here, self.model.config.vocab_size);
        let keep_from = Activations::predict(&self.model.config, inputs.rows(), &place).keep_from(
            self.config.recompute,
            layers,
            lowest,
            &place,
            passes_at_once(self.config),
        );
        self.model.forward(inputs, ForwardOptions { lowest, keep_from, end }, observer)
    }

    /// Mean cross-entropy over the loss tokens of these micro-batches, without gradient; all ranks get the same.
    pub fn measure(&self, batches: &[MicroBatch]) -> Result<Option<f64>> {
        let mut losses = LossMeter::default();
        for batch in batches.iter().skip(self.world.rank()).step_by(self.world.world_size()) {
            if batch.targets.is_empty() {
                continue;
            }
            let inputs = self.inputs(batch);
            let forward = self.forward(&inputs, None, PassEnd::Loss { all_rows: false }, None);
            losses.add(self.model.loss(&inputs, &forward), batch.targets.len());
        }
        losses.merge(&*self.world)?;
        Ok(losses.mean())
    }

    /// The present values of the parameters that an optimizer wrote.
    pub fn changed(&self) -> BTreeMap<ParamId, HostTensor> {
        self.touched.iter().map(|&id| (id, self.model.weight_host(id))).collect()
    }

    /// An error if a weight that an optimizer wrote is not finite: in a 16-bit format it may have overflowed.
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

    /// Decoder layers that route.
    pub fn moe_layers(&self) -> MoeLayers {
        let kinds = &self.model.config.layers;
        let layers = (0..kinds.len()).filter(|&l| kinds[l] == LayerKind::Moe).collect();
        MoeLayers { layers, depth: kinds.len() }
    }

    /// Records that have an unsafe prompt with a reply, in file order.
    pub fn unsafe_replies(&self) -> Vec<usize> {
        (0..self.data.records.len()).filter(|&i| self.data.records[i].unsafe_reply.is_some()).collect()
    }

    /// Packs the unsafe replies of these records.
    pub fn pack_unsafe(&self, records: &[usize]) -> MicroBatch {
        MicroBatch::of_examples(records.iter().filter_map(|&i| self.data.records[i].unsafe_reply.as_ref()))
    }

    /// Packs the safe replies of these records.
    pub fn pack_safe(&self, records: &[usize]) -> MicroBatch {
        MicroBatch::of_examples(records.iter().filter_map(|&i| self.data.records[i].safe_reply.as_ref()))
    }

    /// Puts each rank's values (by place in the global order) together: every rank gets all `n`.
    pub fn gather_by_index(&self, n: usize, own: &[(usize, f64)]) -> Result<Vec<f64>> {
        let mut all = vec![0.0; n];
        for &(index, value) in own {
            all[index] = value;
        }
        self.world.all_reduce_f64(&mut all)?;
        Ok(all)
    }

    /// An error unless a value that all ranks hold is finite.
    pub fn check_finite(&self, value: f64, what: &str, records: &[usize]) -> Result<()> {
        if value.is_finite() { Ok(()) } else { Err(self.not_finite(value, what, records)) }
    }

    /// The error of a value that is not finite, with the rows that it came from.
    pub fn not_finite(&self, value: f64, what: &str, records: &[usize]) -> Failure {
        let mut lines: Vec<_> = records.iter().map(|&i| self.data.records[i].line.to_string()).collect();
        lines.truncate(16);
        Failure::new(
            exit::NOT_FINITE,
            format!(
                "{what} is {value} (rows at lines {} of {}); nothing was updated with it. Lower the learning rate, set \
                 --max-grad-norm, or look at these rows with `moewarden check`",
                lines.join(", "),
                self.config.dataset_path.display()
            ),
        )
    }
}
