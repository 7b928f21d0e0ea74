//! The failure of a device during an operation.

use crate::exit::{self, Coded};

/// A device failed while it ran an operation: its memory is full, a kernel faulted, or the device was lost.
///
/// The operations of a [`Backend`](super::Backend) return no errors. They unwind with this as the panic's payload, and
/// it is the only payload that a backend raises on purpose.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct DeviceFault(Box<dyn std::error::Error + Send + Sync>);

impl DeviceFault {
    /// The fault with this cause.
    pub fn new(cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        Self(Box::new(cause))
    }

    /// Unwinds with this fault.
    pub fn raise(self) -> ! {
        std::panic::panic_any(self)
    }
}

impl Coded for DeviceFault {
    fn exit_code(&self) -> u8 {
        exit::LAUNCHER
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Failure;

    #[test]
    fn the_message_is_that_of_the_cause() {
        let panic = std::panic::catch_unwind(|| DeviceFault::new(std::fmt::Error).raise()).unwrap_err();
        let failure = Failure::from(*panic.downcast::<DeviceFault>().expect("a device fault"));
        assert_eq!(failure.chain().collect::<Vec<_>>(), [std::fmt::Error.to_string()]);
        assert_eq!(failure.code(), exit::LAUNCHER);
    }
}
