//! A progress bar with the throughput in tokens a second.

use std::fmt::Display;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::ui::{Bar, Ui};

/// Progress through the micro-batches or steps of one phase.
pub struct Progress<'a> {
    bar: Bar<'a>,
    ui: &'a Ui,
    started: Instant,
    tokens: AtomicUsize,
}

impl<'a> Progress<'a> {
    /// Over `len` micro-batches or steps.
    pub fn new(ui: &'a Ui, len: usize, label: impl Into<String>) -> Self {
        Self { bar: ui.bar(len as u64, label), ui, started: Instant::now(), tokens: AtomicUsize::new(0) }
    }

    /// Advances by one micro-batch or step with `tokens` tokens.
    pub fn step(&self, tokens: usize, message: impl AsRef<str>) {
        let tokens = self.tokens.fetch_add(tokens, Ordering::Relaxed) + tokens;
        let rate = tokens as f64 / self.started.elapsed().as_secs_f64().max(1e-9);
        let gap = if message.as_ref().is_empty() { "" } else { ", " };
        self.bar.set_message(format!("{}{gap}{rate:.0} tokens/s", message.as_ref()));
        self.bar.inc(1);
    }

    /// Prints a warning next to the bar.
    pub fn warn(&self, text: impl Display) {
        self.ui.warn(text);
    }
}
