//! The ranks of a run: threads of this process, or processes that a launcher started.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use super::device::Device;
use super::fault::{Fault, Faulty};
use super::stop::Stop;
use crate::backend::DeviceFault;
use crate::collective::threads::{self, Outcome};
use crate::collective::{self, Collective};
use crate::config::{Launch, RunConfig};
use crate::exit::{self, Failure, Result};
use crate::ui::Ui;

/// Who takes part in a run, and how the ranks of this process find the others.
pub struct Ranks {
    kind: Kind,
    device: Arc<Device>,
    /// Whether this process was asked to save and leave.
    pub stop: Stop,
    /// What is to go wrong, in tests.
    pub fault: Option<Fault>,
}

enum Kind {
    /// All of them are threads of this process.
    Threads { world_size: usize, timeout: Duration },
    /// This process is one of them.
    Process { world: Arc<dyn Collective>, local: usize, here: usize },
}

/// One rank.
pub struct Rank {
    /// The others.
    pub world: Arc<dyn Collective>,
    /// This one among those on its machine.
    pub local: usize,
    /// Ranks on this machine, this one included.
    pub here: usize,
    /// What it computes on.
    pub device: Arc<Device>,
    /// The user's side of rank 0; silence on the others.
    pub ui: Ui,
    /// Whether this process was asked to save and leave.
    pub stop: Stop,
    /// What is to go wrong on this rank, in tests.
    pub fault: Option<Fault>,
}

impl Rank {
    /// One of the ranks of `world`, all of which share this machine's processors.
    pub fn new(world: Arc<dyn Collective>, ui: Ui) -> Self {
        let (local, here, device) = (world.rank(), world.world_size(), Arc::new(Device::Cpu(None)));
        Self { world, local, here, device, ui, stop: Stop::default(), fault: None }
    }

    /// The only rank there is.
    pub fn single(ui: Ui) -> Self {
        Self::new(Arc::new(threads::single()), ui)
    }
}

impl Ranks {
    /// Those that a launcher started and the options ask for. `stop` is what signals raise, `fault` what is to go wrong.
    ///
    /// # Errors
    /// A launcher that the options or MPI contradict, or that this build cannot join; a device that is not there.
    pub fn of(config: &RunConfig, launch: &Launch, stop: Stop, fault: Option<Fault>, ui: &Ui) -> Result<Self> {
        launch.check_ranks(config.ranks)?;
        launch.check_build(cfg!(feature = "mpi"))?;
        let timeout = Duration::from_secs(config.timeout);
        let (kind, device) = match launch.world_size {
            1 => {
                let device = Device::find(config, ui)?;
                let world_size = config.ranks.unwrap_or_else(|| device.ranks());
                (Kind::Threads { world_size, timeout }, device)
            }
            // First the ranks, so that what one of them lacks is known to all.
            _ => {
                let (world, local, here) = (join(launch, timeout, &stop)?, launch.local_rank, launch.local_size);
                let device = collective::all_ok(&*world, Device::find(config, ui))?;
                (Kind::Process { world, local, here }, device)
            }
        };
        let ranks = Self { kind, device: Arc::new(device), stop, fault };
        let world_size = ranks.world_size();
        if let Some(fault) = ranks.fault.as_ref().filter(|fault| fault.rank >= world_size) {
            let message = format!("MOEWARDEN_FAULT strikes rank {}, but there are {world_size}", fault.rank);
            return Err(Failure::new(exit::CONFIG, message));
        }
        Ok(ranks)
    }

    /// Threads of this process, on its processors; one is the process itself.
    pub fn threads(world_size: usize, timeout: Duration) -> Self {
        let (kind, device) = (Kind::Threads { world_size, timeout }, Arc::new(Device::Cpu(None)));
        Self { kind, device, stop: Stop::default(), fault: None }
    }

    /// This process alone.
    pub fn single() -> Self {
        Self::threads(1, Duration::MAX)
    }

    /// All ranks of the run.
    pub fn world_size(&self) -> usize {
        match &self.kind {
            Kind::Threads { world_size, .. } => *world_size,
            Kind::Process { world, .. } => world.world_size(),
        }
    }

    /// Ranks on this machine.
    pub fn here(&self) -> usize {
        match &self.kind {
            Kind::Threads { world_size, .. } => *world_size,
            Kind::Process { here, .. } => *here,
        }
    }

    /// The processes that this one has to agree with.
    pub fn other_processes(&self) -> Option<&dyn Collective> {
        match &self.kind {
            Kind::Threads { .. } => None,
            Kind::Process { world, .. } => Some(&**world),
        }
    }

    /// Whether this process holds rank 0, which writes and speaks for all.
    pub fn leads(&self) -> bool {
        self.other_processes().is_none_or(|world| world.rank() == 0)
    }

    /// Does something that each process does by itself (opening its files, say): in the end, either all processes were
    /// able to, or none goes on.
    ///
    /// # Errors
    /// This process's own failure, or that of the first other.
    pub fn all_ok<T>(&self, own: Result<T>) -> Result<T> {
        match &self.kind {
            Kind::Threads { .. } => own,
            Kind::Process { world, .. } => {
                let who = format!("rank {} of {}", world.rank(), world.world_size());
                collective::all_ok(&**world, own).map_err(|failure| failure.context(who))
            }
        }
    }

    /// Runs `main` on every rank of this process; what the lowest of them returned. If one fails or panics, the others
    /// leave at their next collective operation.
    ///
    /// # Errors
    /// The failure that was the first cause, with its rank.
    pub fn run<T: Send + 'static>(
        &self,
        ui: &Ui,
        main: impl Fn(&Rank) -> Result<T> + Send + Sync + 'static,
    ) -> Result<T> {
        let (device, stop, fault, ui) = (self.device.clone(), self.stop.clone(), self.fault.clone(), ui.clone());
        let guarded = move |world: Arc<dyn Collective>, local: usize, here: usize| {
            let fault = fault.clone().filter(|fault| fault.rank == world.rank());
            let world: Arc<dyn Collective> = match &fault {
                Some(fault) => Arc::new(Faulty { inner: world, fault: fault.clone() }),
                None => world,
            };
            let ui = if world.rank() == 0 { ui.clone() } else { Ui::silent() };
            let rank = Rank { world, local, here, device: device.clone(), ui, stop: stop.clone(), fault };
            caught(|| main(&rank)).map_err(|failure| last_words(&*rank.world, failure))
        };
        match &self.kind {
            Kind::Process { world, local, here } => guarded(world.clone(), *local, *here),
            Kind::Threads { world_size: 1, .. } => guarded(Arc::new(threads::single()), 0, 1),
            Kind::Threads { world_size, timeout } => {
                let here = *world_size;
                first_of(threads::run(*world_size, *timeout, move |world| {
                    let local = world.rank();
                    guarded(Arc::new(world), local, here)
                }))
            }
        }
    }
}

/// Does something in which a GPU may fail: its operations return no errors, but panic with them.
///
/// # Errors
/// Those of `main`, those of the GPU, and panics.
pub fn caught<T>(main: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(main)).unwrap_or_else(|panic| match panic.downcast::<DeviceFault>() {
        Ok(fault) => Err((*fault).into()),
        Err(panic) => Err(Failure::new(exit::INTERNAL, format!("panicked: {}", threads::panic_message(&*panic)))),
    })
}

/// The processes that the launcher started, joined by MPI.
#[cfg(feature = "mpi")]
fn join(launch: &Launch, timeout: Duration, stop: &Stop) -> Result<Arc<dyn Collective>> {
    let world = collective::mpi::init(timeout, stop.flag())?;
    launch.check_mpi(world.world_size())?;
    Ok(Arc::new(world))
}

#[cfg(not(feature = "mpi"))]
fn join(_: &Launch, _: Duration, _: &Stop) -> Result<Arc<dyn Collective>> {
    unreachable!("a build without MPI has refused such a launch")
}

/// Tells the other ranks that this one failed, and the user on which rank and where.
fn last_words(world: &dyn Collective, failure: Failure) -> Failure {
    if failure.code() == exit::REQUEUE {
        return failure; // they leave, too
    }
    let (rank, world_size) = (world.rank(), world.world_size());
    let place = match world.place() {
        // An error of the ranks together says itself where.
        _ if failure.is::<collective::Error>() => String::new(),
        place if place.is_empty() => String::new(),
        place => format!("in {place}"),
    };
    let reason = if place.is_empty() { failure.to_string() } else { format!("{place}: {failure}") };
    world.abort(failure.code(), &reason);
    match (world_size, &*place) {
        (1, "") => failure,
        (1, _) => failure.context(place),
        (_, "") => failure.context(format!("rank {rank} of {world_size}")),
        _ => failure.context(format!("rank {rank} of {world_size}, {place}")),
    }
}

/// What rank 0 returned, or why there is nothing to return: a rank's own failure comes before what others heard of it.
fn first_of<T>(outcomes: Vec<Outcome<Result<T>>>) -> Result<T> {
    let mut heard = None;
    let mut first = None;
    let mut lost = Vec::new();
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        match outcome {
            Outcome::Done(Ok(value)) => _ = first.get_or_insert(value),
            Outcome::Done(Err(failure)) if failure.is::<collective::Error>() => _ = heard.get_or_insert(failure),
            Outcome::Done(Err(failure)) => return Err(failure),
            Outcome::Panicked(message) => {
                return Err(Failure::new(exit::INTERNAL, format!("rank {rank} panicked: {message}")));
            }
            Outcome::Lost => lost.push(rank),
        }
    }
    match (heard, first) {
        (Some(failure), _) => Err(failure),
        (None, Some(value)) if lost.is_empty() => Ok(value),
        _ => Err(Failure::new(exit::HANG, format!("rank(s) {lost:?} did not end"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> Ranks {
        Ranks::threads(3, Duration::from_secs(20))
    }

    #[test]
    fn the_first_cause_is_reported_and_nobody_stays() {
        let failed = three().run(&Ui::silent(), |rank| {
            if rank.world.rank() == 2 {
                return Err(Failure::new(exit::IO, "the disk is full"));
            }
            rank.world.barrier()?;
            Ok(())
        });
        let failure = failed.unwrap_err();
        assert_eq!(failure.code(), exit::IO);
        assert_eq!(failure.to_string(), "rank 2 of 3: the disk is full");

        let panicked = three().run(&Ui::silent(), |rank| {
            rank.world.doing("expert step 7");
            assert!(rank.world.rank() != 1, "on purpose");
            rank.world.barrier()?;
            Ok(())
        });
        let failure = panicked.unwrap_err();
        assert_eq!(failure.code(), exit::INTERNAL);
        assert_eq!(failure.to_string(), "rank 1 of 3, in expert step 7: panicked: on purpose");
    }

    #[test]
    fn a_rank_that_hangs_is_left_behind() {
        let ranks = Ranks::threads(2, Duration::from_millis(200));
        let hung = ranks.run(&Ui::silent(), |rank| {
            while rank.world.rank() == 1 {
                std::thread::park();
            }
            rank.world.doing("expert step 7");
            rank.world.barrier()?;
            Ok(())
        });
        let failure = hung.unwrap_err();
        assert_eq!(failure.code(), exit::HANG);
        let text = failure.to_string();
        assert!(text.contains("[1]") && text.contains("barrier") && text.contains("expert step 7"), "{text}");
    }

    #[test]
    fn all_ranks_of_a_process_work_for_one_result() {
        let sum = three().run(&Ui::silent(), |rank| {
            let mut sum = [rank.world.rank() as f64];
            rank.world.all_reduce_f64(&mut sum)?;
            Ok((rank.world.rank(), sum[0]))
        });
        assert_eq!(sum.unwrap(), (0, 3.0));
    }
}
