//! What the ranks compute on: the processors, or the machine's GPUs.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread::available_parallelism;

use super::direct::{BetweenGpus, Direct};
use super::memory::human;
use super::ranks::Rank;
use super::session::Session;
use crate::backend::Dtype;
use crate::backend::cpu::Cpu;
use crate::backend::cuda::Cuda;
use crate::backend::cuda::gpu::Gpu;
use crate::backend::cuda::nvidia::library::{self, Library, Surroundings};
use crate::backend::cuda::nvidia::{Driver, Error, Nvidia};
use crate::backend::cuda::plan::Grouped;
use crate::backend::cuda::pool::Reuse;
use crate::backend::cuda::profile::{Profiled, Times};
use crate::collective::nccl::{Communicator, Nccl};
use crate::collective::{all_agree, all_ok};
use crate::config::{self, Precision, RunConfig, Transport};
use crate::exit::{self, Failure, Result};
use crate::launch;
use crate::ui::Ui;

/// What this process computes on.
pub enum Device {
    /// The processors, and why there is no GPU, if one was wanted.
    Cpu(Option<String>),
    /// NVIDIA's GPUs.
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
    /// Threads.
    Cpu(Arc<Cpu>),
    /// A GPU, and the way to those of the other ranks, unless it leads over the host.
    Cuda(Arc<Cuda>, Option<Arc<dyn Direct<Cuda>>>),
}

impl Device {
    /// What the options ask for.
    ///
    /// # Errors
    /// GPUs are asked for, and there is none or no driver for it.
    pub fn find(config: &RunConfig, ui: &Ui) -> Result<Self> {
        if config.device == config::Device::Cpu {
            return Ok(Device::Cpu(None));
        }
        let surroundings = launch::cuda_search_paths();
        let found = Driver::start(&surroundings).and_then(|driver| driver.check_age().map(|()| driver));
        let error = match found {
            Ok(driver) => return Ok(Device::Gpus(Gpus { driver, surroundings, kernel_cache: launch::kernel_cache() })),
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
        if config.precision == Precision::Bf16 {
            ui.warn("--precision bf16 does nothing: the CPU computes in f32");
        }
        if config.transport != Transport::Auto {
            ui.warn("--transport does nothing: it is for GPUs");
        }
        Ok(Device::Cpu(Some(why)))
    }

    /// Ranks that a single process makes where nobody says how many.
    pub fn ranks(&self) -> usize {
        match self {
            Device::Cpu(_) => 1,
            Device::Gpus(gpus) => gpus.driver.devices,
        }
    }

    /// Refuses what [`Self::open`] would refuse on `ranks` ranks of this machine, but for GPUs that do not open.
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

    /// Ranks that share one device, of `ranks` ranks on this machine.
    pub fn sharing(&self, ranks: usize) -> usize {
        match self {
            Device::Cpu(_) => ranks,
            Device::Gpus(gpus) => ranks.div_ceil(gpus.driver.devices),
        }
    }

    /// Takes this rank's part of it. All ranks come here.
    ///
    /// # Errors
    /// Ranks on different kinds of device; a GPU or a library that is missing or refuses.
    pub fn open(&self, config: &RunConfig, session: &Session, rank: &Rank) -> Result<Opened> {
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
                "rank {with} has a GPU, and rank {without} has none: {why}; mend that, or give all ranks --device cpu"
            );
            return Err(Failure::new(exit::LAUNCHER, message));
        }
        match self {
            Device::Cpu(_) => Ok(Opened::Cpu(processors(config, rank))),
            Device::Gpus(gpus) => gpus.open(config, session, rank),
        }
    }
}

/// A rank's share of the cores.
fn processors(config: &RunConfig, rank: &Rank) -> Arc<Cpu> {
    let cores = available_parallelism().map_or(1, usize::from);
    let cpu = Cpu::new(if config.threads == 0 { (cores / rank.here).max(1) } else { config.threads });
    rank.ui.line(format_args!("device: cpu, {} threads{}", cpu.threads(), if rank.here > 1 { " a rank" } else { "" }));
    Arc::new(cpu)
}

impl Gpus {
    fn open(&self, config: &RunConfig, session: &Session, rank: &Rank) -> Result<Opened> {
        let (world, ui) = (&rank.world, &rank.ui);
        // Where each process sees GPUs of its own, the modulus brings it to one of them.
        let opened = Nvidia::open(rank.local % self.driver.devices, &self.surroundings, self.kernel_cache.as_deref());
        let uuid = opened.map_err(Failure::from).and_then(|gpu| Ok((gpu.uuid()?, gpu)));
        let (uuid, gpu) = all_ok(&**world, uuid)?;
        all_agree(&**world, "--transport", format!("{:?}", config.transport).as_bytes())?;
        let uuids = world.all_gather(&uuid)?;
        let sharing = uuids.iter().filter(|other| **other == uuid).count();
        // All have their contexts by now, and none has tensors.
        let memory = all_ok(&**world, gpu.memory().map_err(Failure::from))?;
        let compute = match config.precision {
            Precision::F32 => Dtype::F32,
            Precision::Auto if session.stored_dtype() == Dtype::F32 => Dtype::F32,
            Precision::Auto | Precision::Bf16 => Dtype::Bf16,
        };
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
        let room = memory.free / sharing;
        let cuda = Arc::new(if config.profile {
            let times = Arc::<Times>::default();
            let profiled = Arc::new(Profiled::new(gpu.clone(), times.clone()));
            Cuda::with_room(profiled, compute, Reuse::Segments, room).with_times(times)
        } else {
            Cuda::with_room(gpu.clone(), compute, Reuse::Segments, room)
        });
        let model = &session.model;
        let shape = Grouped {
            rows: session.longest_batch(config.batch_size) * model.num_experts_per_tok,
            groups: model.num_experts,
            inputs: model.hidden_size,
            outputs: model.expert_width,
            dtype: compute,
        };
        ui.line(cuda.choices(&shape, model.heads.first().map_or(0, |heads| heads.dim)));
        let mut distinct = uuids.clone();
        distinct.sort();
        distinct.dedup();
        let twins = distinct.len() < uuids.len();
        let direct = match config.transport {
            Transport::Host => None,
            Transport::Auto if twins || world.world_size() == 1 => None,
            Transport::Auto | Transport::Nccl => Some(self.nccl(config, rank, &gpu, &cuda)?),
        };
        if world.world_size() > 1 && direct.is_none() {
            let why = if twins { ": ranks share a GPU" } else { "" };
            ui.line(format_args!("gradients and new weights go from GPU to GPU by way of the host{why}"));
        }
        Ok(Opened::Cuda(cuda, direct))
    }

    /// Joins the ranks' GPUs.
    fn nccl(&self, config: &RunConfig, rank: &Rank, gpu: &Nvidia, cuda: &Arc<Cuda>) -> Result<Arc<dyn Direct<Cuda>>> {
        let load = || -> Result<Nccl> {
            gpu.bind()?;
            let found = library::open(Library::Nccl, self.driver.version.0, &self.surroundings)?;
            Ok(Nccl::load(&found.path, rank.world.rank())?)
        };
        let nccl = all_ok(&*rank.world, load())?;
        let timeout = std::time::Duration::from_secs(config.timeout);
        let joined = Communicator::new(nccl, &*rank.world, gpu.stream(), timeout)?;
        rank.ui.line(format_args!("gradients and new weights go from GPU to GPU by {}", joined.library()));
        Ok(Arc::new(BetweenGpus::new(Box::new(joined), rank.world.clone(), cuda.clone())))
    }
}
