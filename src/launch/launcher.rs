//! Detects the launcher of this process (mpirun, mpiexec, srun), its rank and the world size.

use super::LaunchError;

/// A program that starts the processes of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Launcher {
    /// No known launcher.
    None,
    /// `mpirun` of Open MPI.
    OpenMpi,
    /// `mpiexec` of MPICH and its derivatives, such as Intel MPI.
    Hydra,
    /// `srun`.
    Slurm,
}

/// This process among the processes of the run. Without a launcher: rank 0 of 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Launch {
    /// The launcher.
    pub launcher: Launcher,
    /// Rank of this process, from 0.
    pub rank: usize,
    /// Number of processes of the run.
    pub world_size: usize,
    /// Rank of this process among those on its machine, from 0.
    pub local_rank: usize,
    /// Number of processes of the run on its machine.
    pub local_size: usize,
}

/// From this number on, Slurm's step ids are special: the batch script, the shell of `salloc`.
const SLURM_SPECIAL_STEPS: u32 = 0xffff_fff0;

impl Launch {
    /// Detects the launcher from environment variables, which `var` looks up.
    ///
    /// The innermost launcher counts: Slurm starts the daemons of an `mpirun` in a Slurm job, and its variables then
    /// describe those daemons.
    ///
    /// # Errors
    /// [`LaunchError::Launcher`] for invalid values, and if torchrun started several processes.
    pub fn detect(var: impl Fn(&str) -> Option<String>) -> Result<Self, LaunchError> {
        let is_set = |name| var(name).is_some();
        let slurm_step = match var("SLURM_STEP_ID") {
            // Without a step, SLURM_PROCID and SLURM_NTASKS describe the job, not this process.
            None => false,
            Some(step) => step.parse::<u32>().map_err(|_| garbage("SLURM_STEP_ID", &step))? < SLURM_SPECIAL_STEPS,
        };
        let launch = if is_set("OMPI_COMM_WORLD_RANK") {
            let local = ["OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"];
            from_pairs(&var, Launcher::OpenMpi, ["OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"], local)?
        } else if is_set("PMI_RANK") && (is_set("MPI_LOCALNRANKS") || !slurm_step) {
            // `srun --mpi=pmi2` sets PMI_RANK too, and only that.
            from_pairs(&var, Launcher::Hydra, ["PMI_RANK", "PMI_SIZE"], ["MPI_LOCALRANKID", "MPI_LOCALNRANKS"])?
        } else if is_set("TORCHELASTIC_RUN_ID") || (is_set("RANK") && !slurm_step) {
            return torchrun(&var);
        } else if slurm_step {
            slurm(&var)?
        } else {
            return Ok(ALONE);
        };
        Ok(launch)
    }

    /// Checks that `--ranks` (threads) and a launcher (processes) are not combined.
    ///
    /// # Errors
    /// [`LaunchError::Launcher`] if both give more than one rank.
    pub fn check_ranks(&self, ranks: Option<usize>) -> Result<(), LaunchError> {
        let Some(ranks) = ranks.filter(|ranks| *ranks > 1 && self.world_size > 1) else { return Ok(()) };
        let Self { launcher, world_size, .. } = self;
        Err(LaunchError::Launcher(format!(
            "--ranks {ranks} asks for threads of one process, but {launcher} started {world_size} processes: leave out \
             --ranks, or start one process"
        )))
    }

    /// Checks that a command without ranks runs as one process.
    ///
    /// # Errors
    /// [`LaunchError::Launcher`] if the launcher started several.
    pub fn check_single(&self) -> Result<(), LaunchError> {
        if self.world_size == 1 {
            return Ok(());
        }
        let Self { launcher, world_size, .. } = self;
        Err(LaunchError::Launcher(format!(
            "{launcher} started {world_size} processes, but this command runs as one process (`train`, \
             `identify`, `eval`, `ablate` and `compare` run as several): start it without {launcher}, or as one process"
        )))
    }

    /// Checks that several processes run with a build that has MPI.
    ///
    /// # Errors
    /// [`LaunchError::Launcher`] if the build has no MPI.
    pub fn check_build(&self, with_mpi: bool) -> Result<(), LaunchError> {
        if with_mpi || self.world_size == 1 {
            return Ok(());
        }
        let Self { launcher, world_size, .. } = self;
        Err(LaunchError::Launcher(format!(
            "{launcher} started {world_size} processes, but this moewarden was built without MPI, so that each process \
             would be a run of its own in the same output folder: cargo build --release --features mpi"
        )))
    }

    /// Checks MPI's world size against the launcher's. (An MPI library that does not belong to the launcher silently
    /// starts runs of one process each.)
    ///
    /// # Errors
    /// [`LaunchError::Launcher`] if they differ.
    pub fn check_mpi(&self, mpi_size: usize) -> Result<(), LaunchError> {
        let Self { launcher, world_size, .. } = *self;
        if mpi_size == world_size {
            return Ok(());
        }
        let hint = match launcher {
            Launcher::None => return Ok(()),
            Launcher::Slurm => {
                "srun needs --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH (srun --mpi=list shows what it has)"
            }
            Launcher::OpenMpi | Launcher::Hydra => {
                "this mpirun does not belong to the MPI that moewarden was built with: compare `mpirun --version` with \
                 `ldd moewarden | grep mpi`, and rebuild with that MPI's mpicc first on PATH"
            }
        };
        Err(LaunchError::Launcher(format!(
            "{launcher} started {world_size} processes, but MPI joined {mpi_size} of them: {hint}"
        )))
    }
}

impl std::fmt::Display for Launcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Launcher::None => "no launcher",
            Launcher::OpenMpi => "Open MPI's mpirun",
            Launcher::Hydra => "MPICH's or Intel MPI's mpiexec",
            Launcher::Slurm => "srun",
        })
    }
}

const ALONE: Launch = Launch { launcher: Launcher::None, rank: 0, world_size: 1, local_rank: 0, local_size: 1 };

/// A lookup of environment variables.
trait Var: Fn(&str) -> Option<String> {}
impl<F: Fn(&str) -> Option<String>> Var for F {}

fn garbage(name: &str, value: &str) -> LaunchError {
    LaunchError::Launcher(format!("the environment variable {name} is {value:?}, which is not a valid value"))
}

fn number(var: &impl Var, name: &str) -> Result<Option<usize>, LaunchError> {
    var(name).map(|value| value.trim().parse().map_err(|_| garbage(name, &value))).transpose()
}

/// Reads a pair of variables, rank and size. Both must be set, or neither.
fn pair(var: &impl Var, [rank, size]: [&str; 2]) -> Result<Option<(usize, usize)>, LaunchError> {
    match (number(var, rank)?, number(var, size)?) {
        (None, None) => Ok(None),
        (Some(r), Some(n)) if r < n => Ok(Some((r, n))),
        (Some(r), Some(n)) => {
            Err(LaunchError::Launcher(format!("the environment variable {rank} is {r}, but {size} is {n}")))
        }
        (r, _) => {
            let (there, absent) = if r.is_some() { (rank, size) } else { (size, rank) };
            Err(LaunchError::Launcher(format!("the environment variable {there} is set, but {absent} is not")))
        }
    }
}

/// The launch by the variables of a launcher: rank and size, local rank and local size. Without the local pair, all
/// processes are on one machine.
fn from_pairs(var: &impl Var, launcher: Launcher, global: [&str; 2], local: [&str; 2]) -> Result<Launch, LaunchError> {
    let (rank, world_size) = pair(var, global)?.expect("the launcher was detected by this rank variable");
    let (local_rank, local_size) = pair(var, local)?.unwrap_or((rank, world_size));
    if local_size > world_size {
        let message =
            format!("the environment variable {} is {local_size}, but {} is {world_size}", local[1], global[1]);
        return Err(LaunchError::Launcher(message));
    }
    Ok(Launch { launcher, rank, world_size, local_rank, local_size })
}

fn slurm(var: &impl Var) -> Result<Launch, LaunchError> {
    let size = if var("SLURM_STEP_NUM_TASKS").is_some() { "SLURM_STEP_NUM_TASKS" } else { "SLURM_NTASKS" };
    let Some((rank, world_size)) = pair(var, ["SLURM_PROCID", size])? else {
        let message =
            "the environment variable SLURM_STEP_ID is set, but SLURM_PROCID is not: do not unset Slurm's variables";
        return Err(LaunchError::Launcher(message.to_owned()));
    };
    let node = number(var, "SLURM_NODEID")?.unwrap_or(0);
    let local_size = match var("SLURM_STEP_TASKS_PER_NODE") {
        None => world_size,
        Some(list) => tasks_of_node(&list, node).ok_or_else(|| garbage("SLURM_STEP_TASKS_PER_NODE", &list))?,
    };
    let local_rank = number(var, "SLURM_LOCALID")?.unwrap_or(rank);
    if local_rank >= local_size || local_size > world_size {
        return Err(LaunchError::Launcher(format!(
            "the environment variable SLURM_LOCALID is {local_rank}, but this node has {local_size} of {world_size} tasks"
        )));
    }
    // Variables of PMIx, PMI-1 and PMI-2. Without any, Open MPI ends the process, and other MPIs start runs of one
    // process.
    let connected = ["PMIX_RANK", "PMI_RANK", "PMI_CONTROL_PORT"].iter().any(|name| var(name).is_some());
    if world_size > 1 && !connected {
        return Err(LaunchError::Launcher(format!(
            "srun started {world_size} processes without PMI or PMIx (--mpi=none), so that MPI cannot connect them: \
             srun needs --mpi=pmix for Open MPI, --mpi=pmi2 for MPICH (srun --mpi=list shows what it has)"
        )));
    }
    Ok(Launch { launcher: Launcher::Slurm, rank, world_size, local_rank, local_size })
}

/// Number of tasks on `node` in a list like `4(x2),3`: 4 on each of two nodes, 3 on the next.
fn tasks_of_node(list: &str, node: usize) -> Option<usize> {
    let mut before = 0;
    for entry in list.split(',') {
        let (tasks, nodes) = match entry.split_once("(x") {
            Some((tasks, nodes)) => (tasks, nodes.strip_suffix(')')?.parse().ok()?),
            None => (entry, 1),
        };
        before += nodes;
        if node < before {
            return tasks.parse().ok();
        }
    }
    None
}

/// torchrun with one process is fine. Several processes cannot connect: they would need MPI.
fn torchrun(var: &impl Var) -> Result<Launch, LaunchError> {
    match pair(var, ["RANK", "WORLD_SIZE"])? {
        Some((_, world_size @ 2..)) => Err(LaunchError::Launcher(format!(
            "torchrun started {world_size} processes (RANK and WORLD_SIZE are set), which moewarden cannot connect: start \
             it by mpirun or srun, or as one process with --ranks {world_size}"
        ))),
        _ => Ok(ALONE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::{self, Coded};

    /// From "NAME=value NAME=value".
    fn detect(environment: &str) -> Result<Launch, LaunchError> {
        let pairs: Vec<_> = environment.split_whitespace().map(|pair| pair.split_once('=').unwrap()).collect();
        Launch::detect(|name| pairs.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned()))
    }

    const OPEN_MPI: &str = "OMPI_COMM_WORLD_RANK=5 OMPI_COMM_WORLD_SIZE=8 \
                            OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=4";
    const HYDRA: &str = "PMI_RANK=5 PMI_SIZE=8 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=4";
    const BATCH: &str = "SLURM_JOB_ID=7 SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_LOCALID=0 SLURM_NODEID=0";
    const STEP: &str = "SLURM_STEP_ID=0 SLURM_PROCID=6 SLURM_NTASKS=8 SLURM_STEP_NUM_TASKS=7 SLURM_LOCALID=2 \
                        SLURM_NODEID=1 SLURM_STEP_TASKS_PER_NODE=4,3 PMIX_RANK=6";
    /// Slurm's variables for the daemon that `mpirun` starts on each node.
    const HELPER: &str = "SLURM_STEP_ID=0 SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=0 \
                          SLURM_NODEID=1 SLURM_STEP_TASKS_PER_NODE=1(x2)";

    #[test]
    fn the_innermost_launcher_counts() {
        let of = |launcher, rank, world_size, local_rank, local_size| Launch {
            launcher,
            rank,
            world_size,
            local_rank,
            local_size,
        };
        let open_mpi = of(Launcher::OpenMpi, 5, 8, 1, 4);
        let hydra = of(Launcher::Hydra, 5, 8, 1, 4);
        let slurm = of(Launcher::Slurm, 6, 7, 2, 3);
        for (environment, expected) in [
            (String::new(), ALONE),
            ("HOME=/ PATH=/bin".into(), ALONE),
            (OPEN_MPI.into(), open_mpi),
            (HYDRA.into(), hydra),
            (STEP.into(), slurm),
            (BATCH.into(), ALONE),
            (format!("{BATCH} SLURM_STEP_ID=4294967291"), ALONE),
            (format!("{BATCH} SLURM_STEP_ID=4294967290"), ALONE),
            // MPI's launcher inside a job: on the node of the script, and on another.
            (format!("{BATCH} {OPEN_MPI}"), open_mpi),
            (format!("{HELPER} {OPEN_MPI}"), open_mpi),
            (format!("{HELPER} {HYDRA}"), hydra),
            // srun --mpi=pmi2
            (format!("{STEP} PMI_RANK=6 PMI_SIZE=7"), slurm),
            (format!("{OPEN_MPI} {HYDRA}"), open_mpi),
            // Without numbers per machine there is one machine.
            ("PMI_RANK=1 PMI_SIZE=2".into(), of(Launcher::Hydra, 1, 2, 1, 2)),
            ("SLURM_STEP_ID=3 SLURM_PROCID=1 SLURM_NTASKS=2 PMIX_RANK=1".into(), of(Launcher::Slurm, 1, 2, 1, 2)),
            // torchrun of one process, and its variables where another launcher started the process.
            ("RANK=0 WORLD_SIZE=1 LOCAL_RANK=0".into(), ALONE),
            (format!("{OPEN_MPI} RANK=5 WORLD_SIZE=8"), open_mpi),
            (format!("{STEP} RANK=6 WORLD_SIZE=7"), slurm),
        ] {
            assert_eq!(detect(&environment).unwrap(), expected, "{environment}");
        }
    }

    #[test]
    fn what_cannot_be_names_the_variable() {
        for (environment, named) in [
            ("OMPI_COMM_WORLD_RANK=one OMPI_COMM_WORLD_SIZE=2".to_owned(), "OMPI_COMM_WORLD_RANK is \"one\""),
            ("OMPI_COMM_WORLD_RANK=0".into(), "OMPI_COMM_WORLD_SIZE is not"),
            ("OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=2".into(), "OMPI_COMM_WORLD_RANK is 2"),
            (OPEN_MPI.replace("SIZE=8", "SIZE=-8"), "OMPI_COMM_WORLD_SIZE is \"-8\""),
            (OPEN_MPI.replace("LOCAL_SIZE=4", "LOCAL_SIZE=9"), "OMPI_COMM_WORLD_LOCAL_SIZE is 9"),
            (HYDRA.replace("MPI_LOCALRANKID=1", "MPI_LOCALRANKID=4"), "MPI_LOCALRANKID is 4"),
            (HYDRA.replace("PMI_SIZE=8", "PMI_SIZE="), "PMI_SIZE is \"\""),
            (STEP.replace("SLURM_PROCID=6", "SLURM_PROCID=7"), "SLURM_PROCID is 7"),
            (STEP.replace("SLURM_PROCID=6", ""), "SLURM_PROCID is not"),
            (STEP.replace("SLURM_LOCALID=2", "SLURM_LOCALID=3"), "SLURM_LOCALID is 3"),
            (STEP.replace("=4,3", "=4(x"), "SLURM_STEP_TASKS_PER_NODE is \"4(x\""),
            (STEP.replace("=4,3", "=7"), "SLURM_STEP_TASKS_PER_NODE is \"7\""),
            (STEP.replace("PMIX_RANK=6", ""), "--mpi=pmix for Open MPI"),
            ("SLURM_STEP_ID=x".into(), "SLURM_STEP_ID is \"x\""),
            ("SLURM_STEP_ID=0".into(), "SLURM_PROCID is not"),
            ("RANK=0 WORLD_SIZE=4".into(), "RANK and WORLD_SIZE are set"),
            (format!("{HELPER} TORCHELASTIC_RUN_ID=none RANK=0 WORLD_SIZE=4"), "mpirun or srun"),
        ] {
            let error = detect(&environment).unwrap_err();
            assert_eq!(error.exit_code(), exit::LAUNCHER);
            assert!(error.to_string().contains(named), "{environment}: {error}");
        }
    }

    #[test]
    fn lists_of_tasks_per_node() {
        for (list, of_nodes) in [("4", vec![4]), ("4(x2),3", vec![4, 4, 3]), ("1,2(x2)", vec![1, 2, 2])] {
            for (node, tasks) in of_nodes.iter().enumerate() {
                assert_eq!(tasks_of_node(list, node), Some(*tasks), "{list}");
            }
            assert_eq!(tasks_of_node(list, of_nodes.len()), None, "{list}");
        }
    }

    #[test]
    fn ranks_come_from_one_place() {
        let many = detect(OPEN_MPI).unwrap();
        assert!(
            many.check_ranks(None).is_ok() && many.check_ranks(Some(1)).is_ok() && ALONE.check_ranks(Some(4)).is_ok()
        );
        let error = many.check_ranks(Some(4)).unwrap_err().to_string();
        assert!(error.contains("--ranks 4") && error.contains("8 processes"), "{error}");
        assert!(many.check_build(true).is_ok() && ALONE.check_build(false).is_ok());
        let error = many.check_build(false).unwrap_err();
        assert_eq!(error.exit_code(), exit::LAUNCHER);
        assert!(error.to_string().ends_with("cargo build --release --features mpi"), "{error}");
    }

    #[test]
    fn a_foreign_mpi_is_found_out() {
        // A launcher that is not known may have started more.
        assert!(ALONE.check_mpi(1).is_ok() && ALONE.check_mpi(4).is_ok());
        for (environment, size, hint) in
            [(OPEN_MPI, 8, "ldd moewarden"), (HYDRA, 8, "mpirun --version"), (STEP, 7, "--mpi=pmix for Open MPI")]
        {
            let launch = detect(environment).unwrap();
            assert!(launch.check_mpi(size).is_ok());
            let error = launch.check_mpi(1).unwrap_err();
            assert_eq!(error.exit_code(), exit::LAUNCHER);
            let text = error.to_string();
            assert!(text.contains(hint) && text.contains(&format!("started {size} processes")), "{text}");
        }
    }
}
