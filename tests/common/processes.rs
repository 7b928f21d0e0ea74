//! Processes that tests start: ranks under `mpirun`, and proof that none outlives its test.

use std::fs;
use std::process::Command;

/// The environment variable that marks all processes of one launch.
pub const MARK: &str = "MOEWARDEN_TEST_MARK";

/// `mpirun` on this machine; the caller adds the number of processes and the program.
pub fn mpirun() -> Command {
    let version = Command::new("mpirun").arg("--version").output();
    let version =
        version.expect("mpirun is on the PATH: the feature `mpi` is tested with the MPI that it was built for");
    let mut mpirun = Command::new("mpirun");
    if String::from_utf8_lossy(&version.stdout).contains("Open MPI") {
        mpirun.args(["--oversubscribe", "--bind-to", "none"]);
        // SAFETY: has no preconditions.
        if unsafe { libc::getuid() } == 0 {
            mpirun.arg("--allow-run-as-root");
        }
        // No cross-memory attach: containers often forbid it.
        mpirun.env("OMPI_MCA_btl", "self,vader").env("OMPI_MCA_btl_vader_single_copy_mechanism", "none");
    }
    mpirun
}

/// A running process of a launch.
pub struct Marked {
    pub pid: i32,
    environ: String,
}

impl Marked {
    /// A variable of its environment.
    pub fn var(&self, name: &str) -> Option<&str> {
        self.environ.split('\0').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: signals a process that this test started.
        unsafe { libc::kill(self.pid, signal) };
    }
}

/// The processes whose environment holds this mark.
pub fn marked(mark: &str) -> Vec<Marked> {
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let read = |pid: i32| Marked {
        pid,
        environ: String::from_utf8_lossy(&fs::read(format!("/proc/{pid}/environ")).unwrap_or_default()).into_owned(),
    };
    processes.map(read).filter(|process| process.var(MARK) == Some(mark)).collect()
}
