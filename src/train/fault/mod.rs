//! Fault injection: how the tests show that a run survives faults. Only builds with debug assertions or the feature `faults`
//! contain it; in others [`Fault`] has no value, so that the compiler removes every visit.

#[cfg(not(any(debug_assertions, feature = "faults")))]
mod absent;
#[cfg(any(debug_assertions, feature = "faults"))]
mod inject;

#[cfg(not(any(debug_assertions, feature = "faults")))]
pub use absent::Fault;
#[cfg(any(debug_assertions, feature = "faults"))]
pub use inject::Fault;

use crate::exit::Failure;

/// A point of the program where a fault can be injected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// The start of a micro-batch of an identification.
    Batch,
    /// The start of a training step.
    Step,
    /// The start of a collective operation.
    Collective,
    /// A stage of saving a checkpoint.
    Save,
}

/// A fault in the data of the rank itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Corruption {
    /// The next gradient is NaN.
    NanGradient,
    /// One bit of a trained weight flips.
    FlippedBit,
}

impl Fault {
    /// The fault that `MOEWARDEN_FAULT` asks for; `None` in builds without fault injection.
    ///
    /// # Errors
    /// A value that cannot be parsed.
    pub fn from_variable(value: Option<&str>) -> Result<Option<Self>, Failure> {
        if cfg!(any(debug_assertions, feature = "faults")) { value.map(str::parse).transpose() } else { Ok(None) }
    }
}
