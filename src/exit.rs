//! Exit codes, and the one error type of the program's edge.
//!
//! Modules define their own `thiserror` enums and say through [`Coded`] how the process ends;
//! everything above collects them in a [`Failure`], which keeps the chain of causes.

use std::fmt;

/// Everything done.
pub const OK: u8 = 0;
/// The command line cannot be understood.
pub const USAGE: u8 = 2;
/// A data row, a checkpoint or a tokenizer holds something that cannot be right.
pub const DATA: u8 = 65;
/// A file or folder that was named does not exist.
pub const NO_INPUT: u8 = 66;
/// The launcher or the device is missing or contradicts itself.
pub const LAUNCHER: u8 = 69;
/// A fault of moewarden itself.
pub const INTERNAL: u8 = 70;
/// An output cannot be created (exists, not empty, not writable).
pub const CANNOT_CREATE: u8 = 73;
/// Reading or writing failed midway (full disk, I/O error).
pub const IO: u8 = 74;
/// The configuration contradicts itself, the model or the data.
pub const CONFIG: u8 = 78;
/// A loss, gradient or weight is not finite.
pub const NOT_FINITE: u8 = 80;
/// Ranks that must agree do not.
pub const RANKS_DIFFER: u8 = 81;
/// A rank did not answer in time.
pub const HANG: u8 = 82;
/// A checkpoint was saved because a signal asked for it: please requeue.
pub const REQUEUE: u8 = 85;
/// A signal ended it: 128 and SIGTERM's number, as shells say it.
pub const TERMINATED: u8 = 143;

/// How the process ends when this error reaches its edge.
pub trait Coded {
    /// One of the constants of [`crate::exit`].
    fn exit_code(&self) -> u8;
}

/// An error on its way to the process's edge: a chain of causes and the exit code of its root.
pub struct Failure {
    code: u8,
    error: anyhow::Error,
}

/// The result of everything above the modules with typed errors.
pub type Result<T, E = Failure> = std::result::Result<T, E>;

impl Failure {
    /// A failure without a typed error behind it.
    pub fn new(code: u8, message: impl fmt::Display) -> Self {
        Self { code, error: anyhow::anyhow!("{message}") }
    }

    /// The exit code: one of the constants of [`crate::exit`].
    pub fn code(&self) -> u8 {
        self.code
    }

    /// Puts what was being done in front of the cause.
    pub fn context(self, what: impl fmt::Display + Send + Sync + 'static) -> Self {
        Self { code: self.code, error: self.error.context(what) }
    }

    /// Whether one of the causes is an error of this type.
    pub fn is<E: std::error::Error + Send + Sync + 'static>(&self) -> bool {
        self.error.chain().any(|cause| cause.is::<E>())
    }

    /// The causes, outermost first.
    pub fn chain(&self) -> impl Iterator<Item = String> + '_ {
        self.error.chain().map(ToString::to_string)
    }
}

/// How work ended that may be asked to stop. To stop on request is no error.
#[derive(Debug)]
#[must_use]
pub enum Ended<T> {
    /// It came to its end.
    Done(T),
    /// It stopped because a signal asked for it.
    Stopped(Stopped),
}

/// What is left of work that stopped on request: the message for the user.
#[derive(Debug)]
pub enum Stopped {
    /// A checkpoint: the work can be resumed ([`REQUEUE`]).
    Saved(String),
    /// Nothing ([`TERMINATED`]).
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
    /// Puts what was being done in front of the cause.
    fn context(self, what: impl fmt::Display + Send + Sync + 'static) -> Result<T>;
}

impl<T, E: Into<Failure>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl fmt::Display + Send + Sync + 'static) -> Result<T> {
        self.map_err(|e| e.into().context(what))
    }
}
