//! The ranks of a run: threads of this process, or processes that a launcher started.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use crate::backend::DeviceFault;
use crate::collective::threads::{self, RankOutcome};
use crate::collective::{self, Collective, with_heartbeat};
use crate::exit::{self, Failure, Result};
use crate::train::StopFlag;
use crate::train::fault::Fault;
use crate::ui::Ui;

/// All ranks of a run, and how those of this process reach the others.
pub struct Ranks {
    kind: Kind,
    /// Set when this process is asked to save and stop.
    stop: StopFlag,
    /// The fault to inject, in tests.
    fault: Option<Fault>,
}

enum Kind {
    /// All ranks are threads of this process.
    Threads { world_size: usize, timeout: Duration },
    /// This process is one rank.
    Process { world: Arc<dyn Collective>, local_rank: usize, local_world_size: usize },
}

/// One rank.
pub struct Rank {
    /// The communicator of all ranks.
    pub world: Arc<dyn Collective>,
    /// The number of this rank among those of its machine, from 0.
    pub local_rank: usize,
    /// Ranks on this machine, this one included.
    pub local_world_size: usize,
    /// Output to the user: of rank 0 only.
    pub ui: Ui,
    /// Set when this process is asked to save and stop.
    pub stop: StopFlag,
    /// The fault to inject on this rank, in tests.
    pub fault: Option<Fault>,
}

impl Rank {
    /// One of the ranks of `world`, all of them on this machine.
    pub fn new(world: Arc<dyn Collective>, ui: Ui) -> Self {
        let (local_rank, local_world_size) = (world.rank(), world.world_size());
        Self { world, local_rank, local_world_size, ui, stop: StopFlag::default(), fault: None }
    }

    /// The only rank of a run.
    pub fn single(ui: Ui) -> Self {
        Self::new(Arc::new(threads::single()), ui)
    }
}

impl Ranks {
    /// Threads of this process; one is the process itself.
    pub fn threads(world_size: usize, timeout: Duration) -> Self {
        Self { kind: Kind::Threads { world_size, timeout }, stop: StopFlag::default(), fault: None }
    }

    /// This process alone.
    pub fn single() -> Self {
        Self::threads(1, Duration::MAX)
    }

    /// This process as one rank of `world`.
    pub(super) fn process(world: Arc<dyn Collective>, local_rank: usize, local_world_size: usize) -> Self {
        let kind = Kind::Process { world, local_rank, local_world_size };
        Self { kind, stop: StopFlag::default(), fault: None }
    }

    /// The same ranks with this stop flag and this injected fault.
    ///
    /// # Errors
    /// A fault on a rank that does not exist.
    pub(super) fn with(self, stop: StopFlag, fault: Option<Fault>) -> Result<Self> {
        let world_size = self.world_size();
        if let Some(fault) = fault.as_ref().filter(|fault| fault.rank() >= world_size) {
            let message = format!("MOEWARDEN_FAULT names rank {}, but the world size is {world_size}", fault.rank());
            return Err(Failure::new(exit::CONFIG, message));
        }
        Ok(Self { stop, fault, ..self })
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        match &self.kind {
            Kind::Threads { world_size, .. } => *world_size,
            Kind::Process { world, .. } => world.world_size(),
        }
    }

    /// Number of ranks on this machine.
    pub fn local_world_size(&self) -> usize {
        match &self.kind {
            Kind::Threads { world_size, .. } => *world_size,
            Kind::Process { local_world_size, .. } => *local_world_size,
        }
    }

    /// The communicator of the other processes of the run; `None` if all ranks are threads of this one.
    pub fn other_processes(&self) -> Option<&dyn Collective> {
        match &self.kind {
            Kind::Threads { .. } => None,
            Kind::Process { world, .. } => Some(&**world),
        }
    }

    /// Whether this process holds rank 0, which writes all outputs.
    pub fn leads(&self) -> bool {
        self.other_processes().is_none_or(|world| world.rank() == 0)
    }

    /// Combines the results of work that each process did independently, such as opening its files: Ok only if all processes
    /// succeeded.
    ///
    /// # Errors
    /// This process's own failure, or that of the first other one.
    pub fn all_ok<T>(&self, own: Result<T>) -> Result<T> {
        match &self.kind {
            Kind::Threads { .. } => own,
            Kind::Process { world, .. } => {
                let who = format!("rank {} of {}", world.rank(), world.world_size());
                collective::all_ok(&**world, own).map_err(|failure| failure.context(who))
            }
        }
    }

    /// Lets each process do work whose result the others on its machine, or on all machines, then find done, such as a download into
    /// a cache: rank 0 first, then the first rank of each other machine, then the others. The first failure ends all of them, before
    /// the others try the same. The work may take longer than the collective timeout.
    ///
    /// # Errors
    /// Those of [`Self::all_ok`] and of the collective.
    pub fn in_turns(&self, activity: &str, work: impl Fn() -> Result<()> + Send + Sync) -> Result<()> {
        let Kind::Process { world, local_rank, .. } = &self.kind else { return work() };
        let turn = match (world.rank(), local_rank) {
            (0, _) => 0,
            (_, 0) => 1,
            _ => 2,
        };
        let before = world.activity();
        world.set_activity(activity);
        for now in 0..3 {
            let own = with_heartbeat(&**world, || if now == turn { work() } else { Ok(()) })?;
            self.all_ok(own)?;
        }
        world.set_activity(&before);
        Ok(())
    }

    /// Lets the process with rank 0 do work, such as writing a file, and returns its result there. All processes fail if it fails.
    ///
    /// # Errors
    /// Those of the work and of [`Self::all_ok`].
    pub fn first<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
        self.all_ok(if self.leads() { work().map(Some) } else { Ok(None) })
    }

    /// What the process with rank 0 decides, in all processes.
    ///
    /// # Errors
    /// Those of the decision, of [`Self::all_ok`] and of the collective.
    pub fn decide(&self, decision: impl FnOnce() -> Result<bool>) -> Result<bool> {
        let own = self.first(decision)?.unwrap_or(false);
        let Some(world) = self.other_processes() else { return Ok(own) };
        Ok(world.all_gather(&[u8::from(own)])?.swap_remove(0) == [1])
    }

    /// Makes the ranks usable again after a run that failed in all processes ([`Collective::renew`]).
    ///
    /// # Errors
    /// A process that has died or hangs.
    pub fn renew(&self) -> Result<()> {
        Ok(self.other_processes().map_or(Ok(()), Collective::renew)?)
    }

    /// The flag that is set when this process is asked to save and stop.
    pub fn stop(&self) -> &StopFlag {
        &self.stop
    }

    /// Runs `main` on every rank of this process and returns the result of the lowest one. If a rank fails or panics, the
    /// others leave at their next collective operation.
    ///
    /// # Errors
    /// The failure that was the first cause, with its rank.
    pub fn run<T: Send + 'static>(
        &self,
        ui: &Ui,
        main: impl Fn(&Rank) -> Result<T> + Send + Sync + 'static,
    ) -> Result<T> {
        let (stop, fault, ui) = (self.stop.clone(), self.fault.clone(), ui.clone());
        let guarded = move |world: Arc<dyn Collective>, local_rank: usize, local_world_size: usize| {
            let fault = fault.clone().filter(|fault| fault.rank() == world.rank());
            let world = match &fault {
                Some(fault) => fault.wrap(world),
                None => world,
            };
            let ui = if world.rank() == 0 { ui.clone() } else { Ui::silent() };
            let rank = Rank { world, local_rank, local_world_size, ui, stop: stop.clone(), fault };
            catch_panic(|| main(&rank)).map_err(|failure| report_failure(&*rank.world, failure))
        };
        match &self.kind {
            Kind::Process { world, local_rank, local_world_size } => {
                guarded(world.clone(), *local_rank, *local_world_size)
            }
            Kind::Threads { world_size: 1, .. } => guarded(Arc::new(threads::single()), 0, 1),
            Kind::Threads { world_size, timeout } => {
                let local_world_size = *world_size;
                first_of(threads::run(*world_size, *timeout, move |world| {
                    let local_rank = world.rank();
                    guarded(Arc::new(world), local_rank, local_world_size)
                }))
            }
        }
    }
}

/// Runs `main` and turns a panic into a failure: the operations of a backend return no errors, but panic with a device fault, or with
/// the error of the collective in which they waited for other ranks.
///
/// # Errors
/// Those of `main`, device faults ([`DeviceFault`]), those of the collective, and other panics.
pub fn catch_panic<T>(main: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(main)).unwrap_or_else(|panic| {
        let failure = match panic.downcast::<DeviceFault>().map_err(|panic| panic.downcast::<collective::Error>()) {
            Ok(fault) => (*fault).into(),
            Err(Ok(error)) => (*error).into(),
            Err(Err(panic)) => Failure::new(exit::INTERNAL, format!("panicked: {}", threads::panic_message(&*panic))),
        };
        Err(failure)
    })
}

/// Tells the other ranks that this one failed; the failure then names this rank and what it was doing.
fn report_failure(world: &dyn Collective, failure: Failure) -> Failure {
    let (rank, world_size) = (world.rank(), world.world_size());
    let activity = match world.activity() {
        // An error of a collective operation names the activity itself.
        _ if failure.is::<collective::Error>() => String::new(),
        activity if activity.is_empty() => String::new(),
        activity => format!("in {activity}"),
    };
    let reason = if activity.is_empty() { failure.to_string() } else { format!("{activity}: {failure}") };
    world.abort(failure.code(), &reason);
    match (world_size, &*activity) {
        (1, "") => failure,
        (1, _) => failure.context(activity),
        (_, "") => failure.context(format!("rank {rank} of {world_size}")),
        _ => failure.context(format!("rank {rank} of {world_size}, {activity}")),
    }
}

/// The result of rank 0, or the failure to report: a rank's own failure rather than what others heard of it.
fn first_of<T>(outcomes: Vec<RankOutcome<Result<T>>>) -> Result<T> {
    let mut heard = None;
    let mut first = None;
    let mut lost = Vec::new();
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        match outcome {
            RankOutcome::Done(Ok(value)) => _ = first.get_or_insert(value),
            RankOutcome::Done(Err(failure)) if failure.is::<collective::Error>() => _ = heard.get_or_insert(failure),
            RankOutcome::Done(Err(failure)) => return Err(failure),
            RankOutcome::Panicked(message) => {
                return Err(Failure::new(exit::INTERNAL, format!("rank {rank} panicked: {message}")));
            }
            RankOutcome::Lost => lost.push(rank),
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
        for unwinds in [false, true] {
            let failed = three().run(&Ui::silent(), move |rank| {
                if rank.world.rank() == 2 {
                    return Err(Failure::new(exit::IO, "the disk is full"));
                }
                let met = rank.world.barrier();
                if unwinds {
                    // As a backend does that waits for other ranks.
                    met.unwrap_or_else(|error| std::panic::panic_any(error));
                } else {
                    met?;
                }
                Ok(())
            });
            let failure = failed.unwrap_err();
            assert_eq!(failure.code(), exit::IO);
            assert_eq!(failure.to_string(), "rank 2 of 3: the disk is full");
        }

        let panicked = three().run(&Ui::silent(), |rank| {
            rank.world.set_activity("expert step 7");
            assert!(rank.world.rank() != 1, "on purpose");
            rank.world.barrier()?;
            Ok(())
        });
        let failure = panicked.unwrap_err();
        assert_eq!(failure.code(), exit::INTERNAL);
        assert_eq!(failure.to_string(), "rank 1 of 3, in expert step 7: panicked: on purpose");
    }

    #[test]
    fn work_in_turns_is_tried_once_where_it_fails() {
        let done = Arc::new(std::sync::Mutex::new(Vec::new()));
        let heard = done.clone();
        let in_turns = move |fails: usize| {
            let done = heard.clone();
            three().run(&Ui::silent(), move |rank| {
                // Two machines: ranks 0 and 1, and rank 2.
                let machine = if rank.world.rank() < 2 { (rank.world.rank(), 2) } else { (0, 1) };
                let ranks = Ranks::process(rank.world.clone(), machine.0, machine.1);
                ranks.in_turns("downloading", || {
                    done.lock().unwrap().push(rank.world.rank());
                    if rank.world.rank() == fails { Err(Failure::new(exit::NO_INPUT, "gated")) } else { Ok(()) }
                })
            })
        };
        in_turns(3).unwrap();
        assert_eq!(std::mem::take(&mut *done.lock().unwrap()), [0, 2, 1]);
        for (fails, tried) in [(0, &[0][..]), (2, &[0, 2]), (1, &[0, 2, 1])] {
            let failure = in_turns(fails).unwrap_err();
            assert_eq!(failure.code(), exit::NO_INPUT);
            assert!(failure.to_string().contains("gated"), "{failure}");
            assert_eq!(std::mem::take(&mut *done.lock().unwrap()), tried);
        }
    }

    #[test]
    fn a_rank_that_hangs_is_left_behind() {
        let ranks = Ranks::threads(2, Duration::from_millis(200));
        let hung = ranks.run(&Ui::silent(), |rank| {
            while rank.world.rank() == 1 {
                std::thread::park();
            }
            rank.world.set_activity("expert step 7");
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
