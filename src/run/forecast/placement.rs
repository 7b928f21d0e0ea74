//! Which routed experts lie in the host's memory or are divided among GPUs, and what that costs on the bus. Decided from shapes and free memory, before the
//! weights are loaded.

use std::collections::BTreeMap;

use super::time::duration;
use crate::backend::cuda::SLOTS;
use crate::config::Offload;
use crate::exit::{self, Failure, Result};
use crate::launch::memory::{far_beyond, human};
use crate::model::{OffloadedBelow, ParamKind, ParamTable};
use crate::train::memory::MemoryBudget;

/// The place of the routed experts of one rank.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ExpertPlacement {
    /// Those of decoder layers below this one are offloaded.
    pub below: OffloadedBelow,
    /// Layers with routed experts.
    pub moe_layers: usize,
    /// Those of them whose experts are offloaded.
    pub offloaded: usize,
    /// Their bytes, of one model.
    pub bytes: u64,
    /// Bytes of the largest layer's experts.
    pub layer: u64,
    /// Models of which that is so: two, where another model decides the routing.
    pub models: u64,
    /// Where they lie.
    pub away: Away,
    /// Whether all experts may stay on the device: `--offload auto`, and a forecast that exceeds its memory by no more than its
    /// error.
    pub may_stay: bool,
}

/// Where offloaded experts lie.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Away {
    /// In pinned memory of the host.
    #[default]
    Host,
    /// Divided among the GPUs of so many ranks of a machine.
    Ranks(usize),
}

/// Bytes of a device that are left for what comes after this: workspaces of cuBLAS, kernels that the driver loads at their first
/// use, buffers of NCCL. Of a very small memory, a small share.
fn left_on_device(free: u64) -> u64 {
    (512 << 20).max(free / 100).min(free / 32)
}

/// Bytes of the host's memory that are not pinned, of those that are free for a rank. The kernel cannot swap out pinned pages: if it
/// runs out of others, it kills the process, without a message. Of a very small memory, a quarter.
fn left_on_host(free: u64) -> u64 {
    (2 << 30).max(free / 16).min(free / 4)
}

impl ExpertPlacement {
    /// As `--offload` says, or all divided where the budget says so. `needs`: bytes of a device that are for other things than
    /// weights. Without a device all is in the host's memory already, and nothing is offloaded.
    pub fn plan(option: Offload, table: &ParamTable, models: u64, needs: u64, budget: &MemoryBudget) -> Self {
        let experts = experts_by_layer(table);
        match budget.divided {
            Some(ranks) => Self { away: Away::Ranks(ranks), ..Self::with(&experts, experts.len(), models) },
            None => Self::choose(option, &experts, table.total().bytes as u64, models, needs, budget),
        }
    }

    fn choose(
        option: Offload,
        experts: &BTreeMap<usize, u64>,
        total: u64,
        models: u64,
        needs: u64,
        budget: &MemoryBudget,
    ) -> Self {
        if !budget.device || option == Offload::None {
            return Self::with(experts, 0, models);
        }
        let needed = |placement: &Self| placement.on_device(total).saturating_add(needs);
        let fits = |placement: &Self| needed(placement) <= budget.free - left_on_device(budget.free);
        let first = if option == Offload::Host { experts.len() } else { 0 };
        let mut placements = (first..=experts.len()).map(|offloaded| Self::with(experts, offloaded, models));
        let placement = placements.find(fits).unwrap_or_else(|| Self::with(experts, experts.len(), models));
        let all_on_device = Self::with(experts, 0, models);
        let may_stay = option == Offload::Auto && !far_beyond(needed(&all_on_device), budget.free);
        Self { may_stay, ..placement }
    }

    /// With at least the experts below this layer offloaded.
    pub fn at_least(self, below: OffloadedBelow, table: &ParamTable) -> Self {
        let experts = experts_by_layer(table);
        let offloaded = experts.keys().filter(|layer| **layer < below.0).count();
        let (may_stay, away) = (self.may_stay, self.away);
        Self { may_stay, away, ..Self::with(&experts, offloaded.max(self.offloaded), self.models) }
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
            away: Away::Host,
            may_stay: false,
        }
    }

    /// All experts on the device.
    pub fn all_on_device(self) -> Self {
        Self { moe_layers: self.moe_layers, models: self.models, may_stay: self.may_stay, ..Self::default() }
    }

    /// Bytes that are offloaded.
    pub fn offloaded_bytes(&self) -> u64 {
        self.models * self.bytes
    }

    /// Bytes of the host's memory.
    pub fn on_host(&self) -> u64 {
        match self.away {
            Away::Host => self.offloaded_bytes(),
            Away::Ranks(_) => 0,
        }
    }

    /// Bytes of a device for its share of the offloaded experts.
    fn share(&self) -> u64 {
        match self.away {
            Away::Host => 0,
            Away::Ranks(ranks) => self.offloaded_bytes().div_ceil(ranks as u64),
        }
    }

    /// Bytes of a device for the weights of models of `total` bytes each, and for the slots through which experts pass.
    pub fn on_device(&self, total: u64) -> u64 {
        self.models * (total - self.bytes) + self.share() + self.slots()
    }

    fn slots(&self) -> u64 {
        SLOTS as u64 * self.layer
    }

    /// Whether it pins more than the host has, less what must stay free.
    pub fn exceeds_host(&self, budget: &MemoryBudget) -> bool {
        self.on_host() > budget.host - left_on_host(budget.host)
    }

    /// Refuses to pin more of the host's memory than is free for each of `ranks` ranks, less what must stay free.
    ///
    /// # Errors
    /// What is needed, what is free, and what helps.
    pub fn check(&self, budget: &MemoryBudget, ranks: usize, force: bool) -> Result<()> {
        if force || !self.exceeds_host(budget) {
            return Ok(());
        }
        let each = if ranks > 1 { format!(" for each of {ranks} ranks") } else { String::new() };
        let message = format!(
            "the experts of {} layers, which do not stay on the GPU, need {} of pinned host memory a rank; {} are free{each}, of which \
             {} must stay so: use a machine with more memory, fewer --ranks on it, a GPU with more memory, or --shard-frozen, which \
             divides them among the GPUs of several ranks; with --offload none all of them must fit on the GPU; --force starts the run all the same",
            self.offloaded,
            human(self.on_host()),
            human(budget.host),
            human(left_on_host(budget.host)),
        );
        Err(Failure::new(exit::LAUNCHER, message))
    }

    /// Where the experts lie; `None` if all are on the device, or there is none.
    pub fn describe(&self) -> Option<String> {
        let stay = self.moe_layers - self.offloaded;
        let which = match stay {
            0 => format!("experts: those of all {} MoE layers, {},", self.moe_layers, human(self.offloaded_bytes())),
            _ => format!(
                "experts: those of the top {stay} of {} MoE layers stay on the GPU; {} of the others",
                self.moe_layers,
                human(self.offloaded_bytes())
            ),
        };
        (self.offloaded > 0).then(|| {
            let place = match self.away {
                Away::Host => "are in pinned host memory".into(),
                Away::Ranks(ranks) => {
                    format!(
                        "are divided among the GPUs of this machine's {ranks} ranks, {} on each",
                        human(self.share())
                    )
                }
            };
            let (layer, slots) = (human(self.layer), human(self.slots()));
            format!("{which} {place}, {layer} a layer, and pass through {SLOTS} slots ({slots}) on the GPU")
        })
    }

    /// What the bus carries from the host for each of `ranks` ranks, at so many bytes per second; `None` if it carries no experts.
    pub fn describe_bus(&self, bytes_per_second: f64, ranks: usize) -> Option<String> {
        let alone = match ranks {
            1 => String::new(),
            _ => format!(
                " with one GPU alone ({ranks} ranks share the host's memory, GPUs often a bus: they may be slower)"
            ),
        };
        (self.on_host() > 0).then(|| {
            let seconds = |bytes: u64| duration(bytes as f64 / bytes_per_second);
            format!(
                "bus: a forward pass copies {} of experts to the GPU, a backward pass at most as much again; at the {}/s just \
                 measured{alone} that is {} a pass and {} a layer, and is hidden where a layer's computation takes longer",
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
            host: 400,
            divided: None,
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
        // A quarter of so little memory is not pinned.
        assert!(with(3).check(&budget, 1, false).is_ok());
        let full = MemoryBudget { host: 396, ..budget };
        let refused = with(3).check(&full, 2, false).unwrap_err().to_string();
        for part in
            ["3 layers", "300 B", "396 B are free for each of 2 ranks", "99 B must stay", "--offload none", "--force"]
        {
            assert!(refused.contains(part), "{part} is not in: {refused}");
        }
        assert!(with(3).check(&full, 2, true).is_ok());
        assert_eq!(with(0).describe(), None);
        let described = with(2).describe().unwrap();
        assert!(described.contains("the top 1 of 3 MoE layers") && described.contains("200 B"), "{described}");
        let described = with(3).describe().unwrap();
        assert!(
            described.contains("all 3 MoE layers, 300 B, are in pinned") && !described.contains("top"),
            "{described}"
        );
        let bus = with(2).describe_bus(50.0, 1).unwrap();
        assert!(bus.contains("measured that is 4.00 s a pass and 2.00 s a layer"), "{bus}");
        let bus = with(2).describe_bus(50.0, 3).unwrap();
        assert!(bus.contains("one GPU alone (3 ranks"), "{bus}");
    }

    #[test]
    fn all_may_stay_within_the_error_of_the_forecast() {
        let experts: BTreeMap<usize, u64> = (0..10).map(|layer| (layer, 100)).collect();
        let choose = |option, free| {
            let budget = MemoryBudget {
                activation_size: 4,
                routed_size: 4,
                logit_rows: 0,
                vocab_size: 8,
                free,
                host: 0,
                divided: None,
                device: true,
            };
            let chosen = ExpertPlacement::choose(option, &experts, 1000, 1, 200, &budget);
            (chosen.offloaded, chosen.may_stay, chosen.exceeds_host(&budget))
        };
        // 1200 bytes are needed; 1/32 of so few are left for what comes later.
        assert_eq!(choose(Offload::Auto, 1240), (0, true, false));
        assert_eq!(choose(Offload::Auto, 1200), (3, true, true));
        assert_eq!(choose(Offload::Auto, 960), (5, true, true));
        assert_eq!(choose(Offload::Auto, 950), (5, false, true));
        assert_eq!(choose(Offload::Host, 1200), (10, false, true));
        assert_eq!(choose(Offload::None, 950), (0, false, false));
        let stays = ExpertPlacement { may_stay: true, ..ExpertPlacement::with(&experts, 3, 1) }.all_on_device();
        assert_eq!((stays.offloaded, stays.on_host(), stays.below), (0, 0, OffloadedBelow(0)));
    }

    #[test]
    fn some_memory_is_left_free() {
        let gib = 1 << 30;
        let host: Vec<u64> = [4, 16, 64, 1600].map(|n| left_on_host(n * gib) / gib).into();
        assert_eq!(host, [1, 2, 4, 100]);
        let device: Vec<u64> = [8, 24, 80].map(|n| left_on_device(n * gib) >> 20).into();
        assert_eq!(device, [256, 512, 819]);
        assert_eq!((left_on_host(0), left_on_device(0)), (0, 0));
        assert!(left_on_host(u64::MAX / 2) > 0, "an unknown limit");
    }
}
