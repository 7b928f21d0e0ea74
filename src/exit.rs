//! Exit codes, and the error type above the modules: [`Failure`].
//!
//! Modules define their own `thiserror` enums, and map them to exit codes through [`Coded`]. Code above the modules collects
//! them in a [`Failure`], which keeps the chain of causes.

use std::fmt;

/// Success.
pub const OK: u8 = 0;
/// The command line is invalid.
pub const USAGE: u8 = 2;
/// A data row, a checkpoint or a tokenizer is invalid.
pub const DATA: u8 = 65;
/// An input file or folder does not exist.
pub const NO_INPUT: u8 = 66;
/// The launcher or the device is missing or misconfigured.
pub const LAUNCHER: u8 = 69;
/// A bug of moewarden.
pub const INTERNAL: u8 = 70;
/// An output cannot be created (exists, not empty, not writable).
pub const CANNOT_CREATE: u8 = 73;
/// Reading or writing failed midway (full disk, I/O error).
pub const IO: u8 = 74;
/// The options contradict each other, the model or the data.
pub const CONFIG: u8 = 78;
/// A loss, gradient or weight is not finite.
pub const NOT_FINITE: u8 = 80;
/// Ranks hold different values that must be equal.
pub const RANKS_DIFFER: u8 = 81;
/// A rank timed out.
pub const HANG: u8 = 82;
/// Stopped by a signal, after a checkpoint was saved: the launcher should requeue the job.
pub const REQUEUE: u8 = 85;
/// Ended by a signal, without a checkpoint: 128 + SIGTERM, as in a shell.
pub const TERMINATED: u8 = 143;

/// An error with an exit code.
pub trait Coded {
    /// The exit code of the process if it ends with this error: a constant of [`crate::exit`].
    fn exit_code(&self) -> u8;
}

/// An error above the modules: a chain of causes, and the exit code of its root.
pub struct Failure {
    code: u8,
    error: anyhow::Error,
}

/// The result type above the modules.
pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// A failure without a typed cause.
    pub fn new(code: u8, message: impl fmt::Display) -> Self {
        Self { code, error: anyhow::anyhow!("{message}") }
    }

    /// The exit code: one of the constants of [`crate::exit`].
    pub fn code(&self) -> u8 {
        self.code
    }

    /// Adds the activity during which the failure occurred.
    pub fn context(self, what: impl fmt::Display + Send + Sync + 'static) -> Self {
        Self { code: self.code, error: self.error.context(what) }
    }

    /// Whether one of the causes is an error of this type.
    pub fn is<E: std::error::Error + Send + Sync + 'static>(&self) -> bool {
        self.find::<E>().is_some()
    }

    /// The first cause that is an error of this type.
    pub fn find<E: std::error::Error + Send + Sync + 'static>(&self) -> Option<&E> {
        self.error.chain().find_map(|cause| cause.downcast_ref::<E>())
    }

    /// The causes, outermost first.
    pub fn chain(&self) -> impl Iterator<Item = String> + '_ {
        self.error.chain().map(ToString::to_string)
    }
}

/// How a command ended that a signal can stop. Stopping on request is not an error.
#[derive(Debug)]
#[must_use]
pub enum Ended<T> {
    /// It ran to its end, with this result.
    Done(T),
    /// A signal stopped it.
    Stopped(Stopped),
}

/// Whether a stopped run can be resumed, with the message for the user.
#[derive(Debug)]
pub enum Stopped {
    /// A checkpoint was saved: the run can be resumed ([`REQUEUE`]).
    Saved(String),
    /// Nothing was saved ([`TERMINATED`]).
    Lost(String),
}

impl<E: Coded + std::error::Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self { code: error.exit_code(), error: error.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.error)
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "exit {}: {:?}", self.code, self.error)
    }
}

/// `.context(..)` on results whose error becomes a [`Failure`].
pub trait Context<T> {
    /// Adds the activity during which the failure occurred.
    fn context(self, what: impl fmt::Display + Send + Sync + 'static) -> Result<T>;
}

impl<T, E: Into<Failure>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl fmt::Display + Send + Sync + 'static) -> Result<T> {
        self.map_err(|e| e.into().context(what))
    }
}
