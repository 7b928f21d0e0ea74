//! The device of each rank: the CPU, or one of the machine's GPUs.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::available_parallelism;

use super::env;
use super::memory::human;
use super::peers::MachinePeers;
use super::ranks::Rank;
use crate::backend::Dtype;
use crate::backend::cpu::{Caches, Cpu, Instructions, Processor, Products};
use crate::backend::cuda::Cuda;
use crate::backend::cuda::gpu::Gpu;
use crate::backend::cuda::nvidia::library::{self, Library, Surroundings};
use crate::backend::cuda::nvidia::{Driver, Error, Nvidia};
use crate::backend::cuda::plan::{Grouped, Operation};
use crate::backend::cuda::pool::Reuse;
use crate::backend::cuda::profile::{Profiled, Times};
use crate::collective::nccl::{Communicator, Nccl};
use crate::collective::{all_agree, all_ok};
use crate::config::{self, Offload, Precision, RunConfig, Transport};
use crate::exit::{self, Failure, Result};
use crate::train::{DeviceTransport, GpuTransport};
use crate::ui::Ui;

/// The devices of this process.
pub enum Device {
    /// The CPU; with the reason, if a GPU was wanted and none is usable.
    Cpu(Option<String>),
    /// NVIDIA GPUs.
    Gpus(Gpus),
}

/// The GPUs that this process sees.
pub struct Gpus {
    driver: Driver,
    surroundings: Surroundings,
    kernel_cache: Option<PathBuf>,
}

/// The backend of one rank.
pub enum Opened {
    /// The CPU.
    Cpu(Arc<Cpu>),
    /// A GPU, and its transport to the GPUs of the other ranks; without one, gradients go through the host.
    Cuda(Arc<Cuda>, Option<Arc<dyn DeviceTransport<Cuda>>>),
}

/// The sizes of a run by which a device chooses its kernels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Workload {
    /// Tokens of the largest micro-batch.
    pub rows: usize,
    /// Experts per token, K.
    pub num_experts_per_tok: usize,
    /// Experts per MoE layer, E.
    pub num_experts: usize,
    /// Model width, D.
    pub hidden_size: usize,
    /// Expert width, F.
    pub expert_width: usize,
    /// Width of one attention head.
    pub head_dim: usize,
    /// The number format of the weights: F32 only if none is narrower.
    pub stored: Dtype,
}

/// Ranks and threads a core that are still started, where there are few cores.
const LEAST_LIMIT: usize = 64;
const PER_CORE: usize = 16;

/// Holds `--ranks` and `--threads` against the cores, before anything is allocated by them.
fn check_counts(config: &RunConfig) -> Result<()> {
    let cores = available_parallelism().map_or(1, usize::from);
    let most = LEAST_LIMIT.max(PER_CORE.saturating_mul(cores));
    for (option, count) in [("--ranks", config.ranks.unwrap_or(1)), ("--threads", config.threads)] {
        if count > most {
            let message = format!(
                "{option} {count} is too many: this machine has {cores} cores, and at most {most} are started on it"
            );
            return Err(Failure::new(exit::CONFIG, message));
        }
    }
    Ok(())
}

impl Device {
    /// The device that the options ask for.
    ///
    /// # Errors
    /// `--device cuda` without a GPU or a driver for it; far more ranks or threads than the machine has cores.
    pub fn find(config: &RunConfig, ui: &Ui) -> Result<Self> {
        check_counts(config)?;
        if config.device == config::Device::Cpu {
            return Ok(Device::Cpu(None));
        }
        let surroundings = env::cuda_search_paths();
        let found = Driver::start(&surroundings).and_then(|driver| driver.check_age().map(|()| driver));
        let error = match found {
            Ok(driver) => return Ok(Device::Gpus(Gpus { driver, surroundings, kernel_cache: env::kernel_cache() })),
            Err(error) if config.device == config::Device::Cuda => return Err(error.into()),
            Err(error) => error,
        };
        let why = match &error {
            Error::Missing { .. } => "there is no NVIDIA driver".to_owned(),
            Error::NoDevice => "the NVIDIA driver shows none".to_owned(),
            error => error.to_string(),
        };
        if matches!(error, Error::Missing { .. } | Error::NoDevice) {
            ui.line(format_args!("no GPU: {why}"));
        } else {
            ui.warn(format_args!("the GPU cannot be used: {why}"));
        }
        if config.transport != Transport::Auto {
            ui.warn("--transport does nothing: it is for GPUs");
        }
        let placed = [("--offload", config.offload != Offload::Auto), ("--shard-frozen", config.shard_frozen)];
        for (option, _) in placed.into_iter().filter(|(_, given)| *given) {
            ui.warn(format_args!("{option} does nothing: without a GPU all weights are in host memory"));
        }
        Ok(Device::Cpu(Some(why)))
    }

    /// Its name in `--device`.
    pub fn kind(&self) -> &'static str {
        match self {
            Device::Cpu(_) => "cpu",
            Device::Gpus(_) => "cuda",
        }
    }

    /// The number format of matrix products with `--precision` and weights of which `stored` is the narrowest format: what `auto` becomes
    /// on this machine.
    ///
    /// # Errors
    /// Instructions of `MOEWARDEN_CPU_INSTRUCTIONS` that the processor lacks.
    pub fn number_format(&self, precision: Precision, stored: Dtype) -> Result<String> {
        match self {
            Device::Cpu(_) => {
                let chosen = products(precision, stored, &Processor::detect(), env::cpu_instructions());
                let (instructions, _) = chosen.map_err(|message| Failure::new(exit::USAGE, message))?;
                // The instructions differ in the order of their sums.
                Ok(instructions.map_or_else(|| "f32".into(), |instructions| format!("bf16 by {instructions}")))
            }
            Device::Gpus(_) => Ok(format!("{:?}", on_gpu(precision, stored)).to_lowercase()),
        }
    }

    /// The default world size: one rank, or one a visible GPU.
    pub fn ranks(&self) -> usize {
        match self {
            Device::Cpu(_) => 1,
            Device::Gpus(gpus) => gpus.driver.devices,
        }
    }

    /// Checks what [`Self::open`] needs on `ranks` ranks of this machine, without opening a GPU.
    ///
    /// # Errors
    /// NCCL is missing.
    pub fn check(&self, config: &RunConfig, ranks: usize) -> Result<()> {
        match self {
            Device::Gpus(gpus) if ranks > 1 && ranks <= gpus.driver.devices && config.transport != Transport::Host => {
                library::open(Library::Nccl, gpus.driver.version.0, &gpus.surroundings)?;
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// How many of `ranks` ranks on this machine share one device.
    pub fn sharing(&self, ranks: usize) -> usize {
        match self {
            Device::Cpu(_) => ranks,
            Device::Gpus(gpus) => ranks.div_ceil(gpus.driver.devices),
        }
    }

    /// Opens the backend of this rank. All ranks call it together.
    ///
    /// # Errors
    /// Ranks on different kinds of device; a GPU or a library that is missing or fails.
    pub fn open(&self, config: &RunConfig, workload: Workload, rank: &Rank) -> Result<Opened> {
        let has: &[u8] = match self {
            Device::Cpu(None) => b"the CPU (--device cpu)",
            Device::Cpu(Some(why)) => why.as_bytes(),
            Device::Gpus(_) => b"",
        };
        let all = rank.world.all_gather(has)?;
        let with = all.iter().position(|why| why.is_empty());
        let without = all.iter().position(|why| !why.is_empty());
        if let (Some(with), Some(without)) = (with, without) {
            let why = String::from_utf8_lossy(&all[without]);
            let message = format!(
                "rank {with} uses a GPU, but rank {without} has none: {why}; fix this, or give all ranks --device cpu"
            );
            return Err(Failure::new(exit::LAUNCHER, message));
        }
        match self {
            Device::Cpu(_) => open_cpu(config, workload.stored, rank).map(Opened::Cpu),
            Device::Gpus(gpus) => gpus.open(config, workload, rank),
        }
    }
}

/// The CPU backend of a rank, with its share of the cores. All ranks call it together.
fn open_cpu(config: &RunConfig, stored: Dtype, rank: &Rank) -> Result<Arc<Cpu>> {
    let cores = available_parallelism().map_or(1, usize::from);
    let cpu = Cpu::new(if config.threads == 0 { (cores / rank.local_world_size).max(1) } else { config.threads });
    let processor = Processor::detect();
    let chosen = products(config.precision, stored, &processor, env::cpu_instructions());
    let (instructions, what) = all_ok(&*rank.world, chosen.map_err(|message| Failure::new(exit::USAGE, message)))?;
    all_agree(&*rank.world, "the number format of products on the CPU", what.as_bytes())?;
    rank.ui.line(format_args!(
        "device: cpu, {} threads{}; {what}",
        cpu.threads(),
        if rank.local_world_size > 1 { " a rank" } else { "" }
    ));
    Ok(Arc::new(cpu.with_products(instructions.map(|i| Products::new(i, Caches::detect())))))
}

/// The instructions of bf16 products on the CPU, or `None` for products in f32. And the same in words.
fn products(
    precision: Precision,
    stored: Dtype,
    processor: &Processor,
    forced: Option<String>,
) -> std::result::Result<(Option<Instructions>, String), String> {
    let f32 = |why: &str| Ok((None, format!("products in f32{why}")));
    match precision {
        Precision::F32 => return f32(""),
        Precision::Auto if stored == Dtype::F32 => return f32(", as the weights"),
        Precision::Auto if !processor.gains_from_bf16() => {
            return f32(", which this processor multiplies faster than bf16");
        }
        Precision::Auto | Precision::Bf16 => {}
    }
    let in_variable = |message| format!("{}: {message}", env::CPU_INSTRUCTIONS);
    let forced = forced.map(|name| name.parse::<Instructions>()).transpose().map_err(in_variable)?;
    let instructions = processor.choose(forced).map_err(in_variable)?;
    let what = format!("products in bf16 with sums in f32, by {instructions} instructions");
    Ok((Some(instructions), what))
}

/// The number format of activations on a GPU.
fn on_gpu(precision: Precision, stored: Dtype) -> Dtype {
    match precision {
        Precision::F32 => Dtype::F32,
        Precision::Auto if stored == Dtype::F32 => Dtype::F32,
        Precision::Auto | Precision::Bf16 => Dtype::Bf16,
    }
}

impl Gpus {
    fn open(&self, config: &RunConfig, workload: Workload, rank: &Rank) -> Result<Opened> {
        let (world, ui) = (&rank.world, &rank.ui);
        // Where each process sees only its own GPUs, the modulus maps it to one of them.
        let opened =
            Nvidia::open(rank.local_rank % self.driver.devices, &self.surroundings, self.kernel_cache.as_deref());
        let uuid = opened.map_err(Failure::from).and_then(|gpu| Ok((gpu.uuid()?, gpu)));
        let (uuid, gpu) = all_ok(&**world, uuid)?;
        all_agree(&**world, "--transport", format!("{:?}", config.transport).as_bytes())?;
        all_agree(&**world, "--shard-frozen", &[u8::from(config.shard_frozen)])?;
        let uuids = world.all_gather(&uuid)?;
        let sharing = uuids.iter().filter(|other| **other == uuid).count();
        // By now all ranks have a CUDA context and none has tensors: free memory is comparable.
        let memory = all_ok(&**world, gpu.memory().map_err(Failure::from))?;
        let compute = on_gpu(config.precision, workload.stored);
        let kind = gpu.architecture();
        ui.line(format_args!(
            "device: cuda, {} (compute capability {}.{}, {} multiprocessors, {}, of which {} free{}); activations {compute:?}; {}",
            gpu.name(),
            kind.sm / 10,
            kind.sm % 10,
            kind.processors,
            human(memory.total as u64),
            human(memory.free as u64),
            if sharing > 1 { format!(", shared by {sharing} ranks") } else { String::new() },
            gpu.software(),
        ));
        let gpu = Arc::new(gpu);
        let mut distinct = uuids.clone();
        distinct.sort();
        distinct.dedup();
        let ranks_share_a_gpu = distinct.len() < uuids.len();
        let nccl = match config.transport {
            Transport::Host => None,
            Transport::Auto if ranks_share_a_gpu || world.world_size() == 1 => None,
            Transport::Auto | Transport::Nccl => Some(self.nccl(config, rank, &gpu)?),
        };
        // NCCL's buffers, which may have hundreds of megabytes, are on the GPU, too.
        let memory = match &nccl {
            Some(_) => all_ok(&**world, gpu.memory().map_err(Failure::from))?,
            None => memory,
        };
        let room = memory.free / sharing;
        let cuda = if config.profile {
            let times = Arc::<Times>::default();
            let profiled = Arc::new(Profiled::new(gpu.clone(), times.clone()));
            Cuda::with_room(profiled, compute, Reuse::Segments, room).with_times(times)
        } else {
            Cuda::with_room(gpu.clone(), compute, Reuse::Segments, room)
        };
        let cuda = Arc::new(match config.shard_frozen {
            true => match MachinePeers::find(rank)? {
                Some(peers) => cuda.with_peers(Arc::new(peers)),
                None => {
                    ui.warn("--shard-frozen does nothing: no machine has more than one rank");
                    cuda
                }
            },
            false => cuda,
        });
        let shape = Grouped {
            operation: Operation::Product,
            rows: workload.rows * workload.num_experts_per_tok,
            groups: workload.num_experts,
            inputs: workload.hidden_size,
            outputs: workload.expert_width,
            dtype: compute,
        };
        ui.line(cuda.choices(&shape, workload.head_dim));
        let transport = nccl.map(|nccl| -> Arc<dyn DeviceTransport<Cuda>> {
            Arc::new(GpuTransport::new(Box::new(nccl), world.clone(), cuda.clone()))
        });
        if world.world_size() > 1 && transport.is_none() {
            let why = if ranks_share_a_gpu { ": ranks share a GPU" } else { "" };
            ui.line(format_args!("gradients and new weights go through the host{why}"));
        }
        Ok(Opened::Cuda(cuda, transport))
    }

    /// Connects the GPUs of all ranks by NCCL.
    fn nccl(&self, config: &RunConfig, rank: &Rank, gpu: &Nvidia) -> Result<Communicator> {
        let load = || -> Result<Nccl> {
            gpu.bind()?;
            let found = library::open(Library::Nccl, self.driver.version.0, &self.surroundings)?;
            Ok(Nccl::load(&found.path, rank.world.rank())?)
        };
        let library = all_ok(&*rank.world, load())?;
        let timeout = std::time::Duration::from_secs(config.timeout);
        let nccl = Communicator::new(library, &*rank.world, gpu.stream(), timeout)?;
        rank.ui.line(format_args!("gradients and new weights go from GPU to GPU by {}", nccl.library()));
        Ok(nccl)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_format_is_that_of_the_weights_unless_it_is_given() {
        let format = |precision, stored| Device::Cpu(None).number_format(precision, stored).unwrap();
        assert_eq!(format(Precision::F32, Dtype::Bf16), "f32");
        assert_eq!(format(Precision::Auto, Dtype::F32), "f32");
        assert!(format(Precision::Bf16, Dtype::F32).starts_with("bf16 by "));
        // What `auto` is says the processor; it is one of the formats that can be given.
        let auto = format(Precision::Auto, Dtype::Bf16);
        assert!([Precision::F32, Precision::Bf16].map(|given| format(given, Dtype::Bf16)).contains(&auto), "{auto}");
        assert_eq!([Dtype::F32, Dtype::F16].map(|stored| on_gpu(Precision::Auto, stored)), [Dtype::F32, Dtype::Bf16]);
    }

    #[test]
    fn products_on_the_cpu_are_chosen_by_precision_weights_and_processor() {
        let plain = Processor { amx: false, avx512_bf16: false, avx512: true, intel: true };
        let intel = Processor { avx512_bf16: true, ..plain };
        let amd = Processor { intel: false, ..intel };
        let choose = |precision, stored, processor: Processor, forced: Option<&str>| {
            products(precision, stored, &processor, forced.map(str::to_owned)).map(|(instructions, _)| instructions)
        };
        use Dtype::{Bf16, F16, F32};
        assert_eq!(choose(Precision::F32, Bf16, amd, None), Ok(None));
        assert_eq!(choose(Precision::Auto, F32, amd, None), Ok(None));
        assert_eq!(choose(Precision::Auto, Bf16, intel, None), Ok(None));
        assert_eq!(choose(Precision::Auto, Bf16, plain, None), Ok(None));
        assert_eq!(choose(Precision::Auto, F16, amd, None), Ok(Some(Instructions::Avx512Bf16)));
        assert_eq!(choose(Precision::Auto, Bf16, Processor { amx: true, ..intel }, None), Ok(Some(Instructions::Amx)));
        assert_eq!(choose(Precision::Bf16, F32, plain, None), Ok(Some(Instructions::Avx512)));
        assert_eq!(choose(Precision::Bf16, F32, plain, Some("portable")), Ok(Some(Instructions::Portable)));
        let error = choose(Precision::Bf16, Bf16, plain, Some("amx")).unwrap_err();
        assert!(error.starts_with("MOEWARDEN_CPU_INSTRUCTIONS: ") && error.contains("no amx instructions"), "{error}");
    }
}
