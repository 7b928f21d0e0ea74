//! Runs of the binary within limits, and what counts as a fault.

use std::fs::File;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::Duration;

use moewarden::exit;

/// Seconds of processor time of one run; the tiny model needs less than one, in a build without optimisation.
const PROCESSOR_SECONDS: libc::rlim_t = 60;

/// A run that waits forever uses no processor time. Counted in looks, since both may be stopped for a while.
const PATIENCE: Duration = Duration::from_secs(180);

/// Time between two looks at a run.
const LOOK: Duration = Duration::from_millis(2);

/// Virtual memory: far more than a run needs, far less than a number from a file can ask for.
const MEMORY: libc::rlim_t = 24 << 30;

/// The exit codes that the documentation lists, besides that of a bug.
const CODES: [u8; 11] = [
    exit::OK,
    exit::USAGE,
    exit::DATA,
    exit::NO_INPUT,
    exit::LAUNCHER,
    exit::CANNOT_CREATE,
    exit::IO,
    exit::CONFIG,
    exit::NOT_FINITE,
    exit::RANKS_DIFFER,
    exit::HANG,
];

/// How a run ended.
pub struct Ended {
    pub code: Option<i32>,
    status: Option<ExitStatus>,
    said: String,
}

/// Runs the binary in `folder`.
pub fn run(folder: &Path, words: &[String]) -> Ended {
    let [out, err] = ["stdout", "stderr"].map(|name| folder.join(name));
    let open = |path: &Path| File::create(path).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_moewarden"));
    command.args(words).current_dir(folder).stdin(Stdio::null()).stdout(open(&out)).stderr(open(&err));
    command.env("RUST_BACKTRACE", "1").env("HF_HOME", folder.join("hub")).env("HF_HUB_OFFLINE", "1");
    // SAFETY: setrlimit may be called between fork and exec.
    unsafe { command.pre_exec(limit) };
    let mut child = command.spawn().unwrap();
    let mut waited = Duration::ZERO;
    let status = loop {
        match child.try_wait().unwrap() {
            Some(status) => break Some(status),
            None if waited > PATIENCE => {
                child.kill().unwrap();
                child.wait().unwrap();
                break None;
            }
            None => {
                sleep(LOOK);
                waited += LOOK;
            }
        }
    };
    let said = [out, err].map(|path| String::from_utf8_lossy(&std::fs::read(path).unwrap()).into_owned()).concat();
    Ended { code: status.and_then(|status| status.code()), status, said }
}

fn limit() -> std::io::Result<()> {
    for (what, most) in [(libc::RLIMIT_CPU, PROCESSOR_SECONDS), (libc::RLIMIT_AS, MEMORY), (libc::RLIMIT_CORE, 0)] {
        let limit = libc::rlimit { rlim_cur: most, rlim_max: most };
        // SAFETY: the struct is complete.
        if unsafe { libc::setrlimit(what, &raw const limit) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(())
}

impl Ended {
    /// For the table: the exit code, or why there is none.
    pub fn label(&self) -> String {
        match (self.code, self.status) {
            (Some(code), _) => code.to_string(),
            (None, Some(status)) => format!("signal {}", status.signal().unwrap_or(0)),
            (None, None) => "no end".into(),
        }
    }

    /// What is wrong with it, if anything is; its files aside.
    pub fn fault(&self) -> Option<String> {
        let code = match (self.code, self.status.and_then(|status| status.signal())) {
            (Some(code), _) => code,
            (None, Some(libc::SIGKILL | libc::SIGXCPU)) => return Some("it used too much processor time".into()),
            (None, Some(signal)) => return Some(format!("signal {signal} ended it")),
            (None, None) => return Some(format!("it had not ended after {} s", PATIENCE.as_secs())),
        };
        if !CODES.iter().any(|known| i32::from(*known) == code) {
            return Some(format!("exit code {code}"));
        }
        for phrase in ["panicked", "itself is at fault", "please report"] {
            if self.said.contains(phrase) {
                return Some(format!("it says {phrase:?}"));
            }
        }
        let raw = self.said.chars().find(|c| c.is_control() && !matches!(c, '\n' | '\t'));
        if let Some(raw) = raw {
            return Some(format!("it prints the control character {raw:?}"));
        }
        (code != 0 && !self.said.lines().any(|line| line.starts_with("error:")))
            .then(|| format!("exit code {code} without a line `error: …`"))
    }

    /// The first lines of what it printed as an error.
    pub fn error(&self) -> String {
        let lines = self.said.lines().skip_while(|line| !line.starts_with("error"));
        lines.take(4).collect::<Vec<_>>().join("\n").chars().take(600).collect()
    }
}
