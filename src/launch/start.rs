//! From the launcher's environment and the options to the ranks of a run and their devices.

use std::sync::Arc;
use std::time::Duration;

use super::{Device, Launch, Ranks};
use crate::collective::{self, Collective};
use crate::config::RunConfig;
use crate::exit::Result;
use crate::train::StopFlag;
use crate::train::fault::Fault;
use crate::ui::Ui;

/// The ranks of a run, and the devices of this process.
pub struct Started {
    /// The ranks.
    pub ranks: Ranks,
    /// The devices of this process's ranks.
    pub device: Arc<Device>,
}

impl Started {
    /// Joins the other processes that the launcher started, and finds the devices. `stop` is the flag that signals set,
    /// `fault` the fault to inject.
    ///
    /// # Errors
    /// A launcher that contradicts the options or MPI, or that this build cannot join; a device that does not exist.
    pub fn new(config: &RunConfig, launch: &Launch, stop: StopFlag, fault: Option<Fault>, ui: &Ui) -> Result<Self> {
        launch.check_ranks(config.ranks)?;
        launch.check_build(cfg!(feature = "mpi"))?;
        let timeout = Duration::from_secs(config.timeout);
        let (ranks, device) = if launch.world_size == 1 {
            let device = Device::find(config, ui)?;
            (Ranks::threads(config.ranks.unwrap_or_else(|| device.ranks()), timeout), device)
        } else {
            // Join the ranks first: then a missing device on one rank is reported to all.
            let world = join(launch, timeout, &stop)?;
            let device = collective::all_ok(&*world, Device::find(config, ui))?;
            (Ranks::process(world, launch.local_rank, launch.local_size), device)
        };
        Ok(Self { ranks: ranks.with(stop, fault)?, device: Arc::new(device) })
    }

    /// This process alone, on the CPU.
    pub fn single() -> Self {
        Self { ranks: Ranks::single(), device: Arc::new(Device::Cpu(None)) }
    }
}

/// Joins the processes that the launcher started, by MPI.
#[cfg(feature = "mpi")]
fn join(launch: &Launch, timeout: Duration, stop: &StopFlag) -> Result<Arc<dyn Collective>> {
    let world = collective::mpi::init(timeout, stop.shared())?;
    launch.check_mpi(world.world_size())?;
    Ok(Arc::new(world))
}

#[cfg(not(feature = "mpi"))]
fn join(_: &Launch, _: Duration, _: &StopFlag) -> Result<Arc<dyn Collective>> {
    unreachable!("a build without MPI has refused such a launch")
}
