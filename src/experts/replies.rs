//! How many of the model's own replies comply and how many refuse.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The model's own replies by side and verdict, and how many of them are counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplyCounts {
    /// Replies to unsafe prompts that comply.
    pub unsafe_complied: usize,
    /// Replies to unsafe prompts that refuse.
    pub unsafe_refused: usize,
    /// Replies to unsafe prompts on whose tokens routing is counted.
    pub unsafe_counted: usize,
    /// Replies to safe prompts that comply.
    pub safe_complied: usize,
    /// Replies to safe prompts that refuse.
    pub safe_refused: usize,
    /// Replies to safe prompts on whose tokens routing is counted.
    pub safe_counted: usize,
}

impl fmt::Display for ReplyCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} to unsafe prompts comply and {} refuse, {} of {} to safe prompts comply and {} refuse; counted are {} and {}",
            self.unsafe_complied,
            self.unsafe_complied + self.unsafe_refused,
            self.unsafe_refused,
            self.safe_complied,
            self.safe_complied + self.safe_refused,
            self.safe_refused,
            self.unsafe_counted,
            self.safe_counted,
        )
    }
}
