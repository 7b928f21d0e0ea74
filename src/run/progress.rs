//! A progress bar that also says how many tokens a second go through the model.

use std::fmt::Display;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::ui::{Bar, Ui};

/// Progress through the micro-batches or steps of one phase.
pub struct Progress<'a> {
    bar: Option<Bar<'a>>,
    ui: Option<&'a Ui>,
    started: Instant,
    tokens: AtomicUsize,
}

impl<'a> Progress<'a> {
    /// Over `len` micro-batches or steps.
    pub fn new(ui: &'a Ui, len: usize, label: impl Into<String>) -> Self {
        Self {
            bar: Some(ui.bar(len as u64, label)),
            ui: Some(ui),
            started: Instant::now(),
            tokens: AtomicUsize::new(0),
        }
    }

    /// Shows nothing.
    pub fn hidden() -> Self {
        Self { bar: None, ui: None, started: Instant::now(), tokens: AtomicUsize::new(0) }
    }

    /// One unit more is done: `tokens` went through the model.
    pub fn step(&self, tokens: usize, message: impl AsRef<str>) {
        let tokens = self.tokens.fetch_add(tokens, Ordering::Relaxed) + tokens;
        if let Some(bar) = &self.bar {
            let rate = tokens as f64 / self.started.elapsed().as_secs_f64().max(1e-9);
            let gap = if message.as_ref().is_empty() { "" } else { ", " };
            bar.set_message(format!("{}{gap}{rate:.0} tokens/s", message.as_ref()));
            bar.inc(1);
        }
    }

    /// A warning beside the bar.
    pub fn warn(&self, text: impl Display) {
        if let Some(ui) = self.ui {
            ui.warn(text);
        }
    }
}
