//! Which routed experts lie in the host's memory, and what that costs on the bus. Decided from shapes and free memory, before the
//! weights are loaded.

use std::collections::BTreeMap;

use super::time::duration;
use crate::backend::cuda::SLOTS;
use crate::config::Offload;
use crate::exit::{self, Failure, Result};
use crate::launch::memory::human;
use crate::model::{OffloadedBelow, ParamKind, ParamTable};
use crate::train::memory::MemoryBudget;

/// The place of the routed experts of one rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExpertPlacement {
    /// Those of decoder layers below this one are in the host's memory.
    pub below: OffloadedBelow,
    /// Layers with routed experts.
    pub moe_layers: usize,
    /// Those of them whose experts are in the host's memory.
    pub offloaded: usize,
    /// Their bytes, of one model.
    pub bytes: u64,
    /// Bytes of the largest layer's experts.
    pub layer: u64,
    /// Models that lie there: two, where another model decides the routing.
    pub models: u64,
}

impl ExpertPlacement {
    /// As `--offload` says. `needs`: bytes of a device that are for other things than weights. Without a device all is in the host's
    /// memory already, and nothing is offloaded.
    pub fn plan(option: Offload, table: &ParamTable, models: u64, needs: u64, budget: &MemoryBudget) -> Self {
        let experts = experts_by_layer(table);
        if !budget.device || option == Offload::None {
            return Self::with(&experts, 0, models);
        }
        let total = table.total().bytes as u64;
        let fits = |placement: &Self| placement.on_device(total).saturating_add(needs) <= budget.free;
        let first = if option == Offload::Host { experts.len() } else { 0 };
        let mut placements = (first..=experts.len()).map(|offloaded| Self::with(&experts, offloaded, models));
        placements.find(fits).unwrap_or_else(|| Self::with(&experts, experts.len(), models))
    }

    /// With at least the experts below this layer in the host's memory.
    pub fn at_least(self, below: OffloadedBelow, table: &ParamTable) -> Self {
        let experts = experts_by_layer(table);
        let offloaded = experts.keys().filter(|layer| **layer < below.0).count();
        Self::with(&experts, offloaded.max(self.offloaded), self.models)
    }

    fn with(experts: &BTreeMap<usize, u64>, offloaded: usize, models: u64) -> Self {
        let lower = || experts.iter().take(offloaded);
        Self {
            below: OffloadedBelow(lower().next_back().map_or(0, |(layer, _)| layer + 1)),
            moe_layers: experts.len(),
            offloaded,
            bytes: lower().map(|(_, bytes)| bytes).sum(),
            layer: lower().map(|(_, bytes)| *bytes).max().unwrap_or(0),
            models,
        }
    }

    /// Bytes of the host's memory.
    pub fn on_host(&self) -> u64 {
        self.models * self.bytes
    }

    /// Bytes of a device for the weights of models of `total` bytes each, and for the slots through which experts pass.
    pub fn on_device(&self, total: u64) -> u64 {
        self.models * (total - self.bytes) + self.slots()
    }

    fn slots(&self) -> u64 {
        SLOTS as u64 * self.layer
    }

    /// Refuses to pin more of the host's memory than is free.
    ///
    /// # Errors
    /// What is needed, what is free, and what helps.
    pub fn check(&self, budget: &MemoryBudget, force: bool) -> Result<()> {
        if force || self.on_host() <= budget.host {
            return Ok(());
        }
        let message = format!(
            "the experts of {} layers, which do not stay on the GPU, need {} of host memory a rank, and {} are free: use a machine \
             with more memory, fewer --ranks on it, or a GPU with more memory; with --offload none all of them must fit on the GPU; \
             --force starts the run all the same",
            self.offloaded,
            human(self.on_host()),
            human(budget.host),
        );
        Err(Failure::new(exit::LAUNCHER, message))
    }

    /// Where the experts lie; `None` if all are on the device, or there is none.
    pub fn describe(&self) -> Option<String> {
        (self.offloaded > 0).then(|| {
            format!(
                "experts: those of the top {} of {} MoE layers stay on the GPU; {} of the others are in pinned host memory, {} a layer, \
                 and pass through {SLOTS} slots ({}) on the GPU",
                self.moe_layers - self.offloaded,
                self.moe_layers,
                human(self.on_host()),
                human(self.layer),
                human(self.slots()),
            )
        })
    }

    /// What the bus carries, at so many bytes per second; `None` if it carries no experts.
    pub fn describe_bus(&self, bytes_per_second: f64) -> Option<String> {
        (self.offloaded > 0).then(|| {
            let seconds = |bytes: u64| duration(bytes as f64 / bytes_per_second);
            format!(
                "bus: a forward pass copies {} of experts to the GPU, a backward pass at most as much again; at the {}/s just \
                 measured that is {} a pass and {} a layer, and is hidden where a layer's computation takes longer",
                human(self.on_host()),
                human(bytes_per_second as u64),
                seconds(self.on_host()),
                seconds(self.layer),
            )
        })
    }
}

/// Bytes of the routed experts of each layer that has some.
fn experts_by_layer(table: &ParamTable) -> BTreeMap<usize, u64> {
    let mut experts = BTreeMap::new();
    for spec in &table.params {
        if let ParamKind::Expert(layer, ..) = spec.kind {
            *experts.entry(layer).or_default() += spec.byte_range.len() as u64;
        }
    }
    experts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_top_layers_stay_on_the_gpu_as_far_as_they_fit() {
        let budget = MemoryBudget {
            activation_size: 4,
            routed_size: 4,
            logit_rows: 0,
            vocab_size: 8,
            free: 0,
            host: 300,
            device: true,
        };
        // Layers 1, 2 and 4 have experts; 50 bytes are for other weights.
        let experts: BTreeMap<usize, u64> = [(1, 100), (2, 100), (4, 100)].into();
        let with = |offloaded| ExpertPlacement::with(&experts, offloaded, 1);
        let below: Vec<usize> = (0..4).map(|n| with(n).below.0).collect();
        assert_eq!(below, [0, 2, 3, 5]);
        // One or two layers in the host's memory take no less of the GPU: the slots have room for two.
        let on_device: Vec<u64> = (0..4).map(|n| with(n).on_device(350)).collect();
        assert_eq!(on_device, [350, 450, 350, 250]);
        assert_eq!(ExpertPlacement::with(&experts, 3, 2).on_device(350), 300);
        assert!(with(3).check(&budget, false).is_ok());
        let full = MemoryBudget { host: 299, ..budget };
        let refused = with(3).check(&full, false).unwrap_err().to_string();
        for part in ["3 layers", "300 B", "299 B", "--offload none", "--force"] {
            assert!(refused.contains(part), "{part} is not in: {refused}");
        }
        assert!(with(3).check(&full, true).is_ok());
        assert_eq!(with(0).describe(), None);
        let described = with(2).describe().unwrap();
        assert!(described.contains("the top 1 of 3 MoE layers") && described.contains("200 B"), "{described}");
        let bus = with(2).describe_bus(50.0).unwrap();
        assert!(bus.contains("4.00 s a pass and 2.00 s a layer"), "{bus}");
    }
}
