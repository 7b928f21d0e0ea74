//! Terminal output: result and progress lines on stdout, warnings and progress bars on stderr.
//!
//! A bar is drawn only on a terminal; otherwise progress is a plain line at every 10 %. Write errors, such as a closed
//! pipe (`| head`), never end a run.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::quote::message;

/// The terminal output of a process. Clones share the bars. Ranks other than 0 use [`Ui::silent`].
#[derive(Clone)]
pub struct Ui {
    level: Level,
    bars: Option<MultiProgress>,
    color: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    /// No output.
    Silent,
    /// Results and warnings.
    Quiet,
    /// Results, warnings and progress.
    Full,
}

impl Ui {
    /// Output to this process's stdout and stderr; `quiet` suppresses progress. Honours `NO_COLOR` (if set and not
    /// empty).
    pub fn new(quiet: bool) -> Self {
        let terminal = io::stderr().is_terminal();
        let color = terminal && color_wanted();
        let bars = (terminal && !quiet).then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
        Self { level: if quiet { Level::Quiet } else { Level::Full }, bars, color }
    }

    /// No output: for ranks other than 0, and for tests.
    pub fn silent() -> Self {
        Self { level: Level::Silent, bars: None, color: false }
    }

    /// Whether results may be coloured: stdout is a terminal and `NO_COLOR` is not set.
    pub fn colors_results(&self) -> bool {
        self.level != Level::Silent && io::stdout().is_terminal() && color_wanted()
    }

    /// Prints a progress line on stdout. Suppressed by `--quiet`.
    pub fn line(&self, text: impl Display) {
        if self.level == Level::Full {
            self.write(&mut io::stdout(), &text);
        }
    }

    /// Prints a line of the command's result on stdout, also with `--quiet`.
    pub fn result(&self, text: impl Display) {
        if self.level != Level::Silent {
            self.write(&mut io::stdout(), &text);
        }
    }

    /// Prints a warning on stderr, also with `--quiet`.
    pub fn warn(&self, text: impl Display) {
        if self.level != Level::Silent {
            let word = if self.color { "\x1b[33mwarning:\x1b[0m" } else { "warning:" };
            self.write(&mut io::stderr(), &format_args!("{word} {}", message(&text.to_string())));
        }
    }

    /// Starts a progress bar for `len` units of work.
    pub fn bar(&self, len: u64, label: impl Into<String>) -> Bar<'_> {
        let label = label.into();
        let shown = match &self.bars {
            Some(bars) => {
                let style = "{prefix} {wide_bar} {pos}/{len} {msg} [{elapsed}, {eta} left]";
                let bar = bars.add(
                    ProgressBar::new(len)
                        .with_prefix(label)
                        .with_style(ProgressStyle::with_template(style).expect("the template is constant and valid")),
                );
                Shown::Drawn(bar)
            }
            None => Shown::Lines { label, state: Mutex::new(Lines { done: 0, len, message: String::new() }) },
        };
        Bar { ui: self, shown }
    }

    /// Writes a line above the bars. Ignores errors: a closed pipe must not end a run.
    fn write(&self, to: &mut dyn Write, text: &dyn Display) {
        let mut write = || drop(writeln!(to, "{text}").and_then(|()| to.flush()));
        match &self.bars {
            Some(bars) => bars.suspend(write),
            None => write(),
        }
    }
}

/// Whether the environment variable `NO_COLOR` allows colours (<https://no-color.org>).
fn color_wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// A progress bar. It is removed from the terminal when dropped.
pub struct Bar<'a> {
    ui: &'a Ui,
    shown: Shown,
}

enum Shown {
    Drawn(ProgressBar),
    Lines { label: String, state: Mutex<Lines> },
}

/// Progress that is printed as lines instead of drawn.
struct Lines {
    done: u64,
    len: u64,
    message: String,
}

impl Lines {
    /// Counts `n` more units. Returns whether that reached another tenth of `len`.
    fn advance(&mut self, n: u64) -> bool {
        let tenth = |done: u64| u128::from(done) * 10 / u128::from(self.len.max(1));
        let (before, after) = (tenth(self.done), tenth(self.done + n));
        self.done += n;
        after > before
    }
}

impl Bar<'_> {
    /// Sets the text beside the bar, such as loss and tokens per second.
    pub fn set_message(&self, message: impl Into<String>) {
        match &self.shown {
            Shown::Drawn(bar) => bar.set_message(message.into()),
            Shown::Lines { state, .. } => lock(state).message = message.into(),
        }
    }

    /// Counts `n` more units as done.
    pub fn inc(&self, n: u64) {
        match &self.shown {
            Shown::Drawn(bar) => bar.inc(n),
            Shown::Lines { label, state } => {
                let mut state = lock(state);
                if state.advance(n) {
                    let Lines { done, len, message } = &*state;
                    let space = if message.is_empty() { "" } else { " " };
                    self.ui.line(format_args!("{label} {done}/{len}{space}{message}"));
                }
            }
        }
    }

    /// Removes the bar from the terminal.
    pub fn finish(self) {}
}

impl Drop for Bar<'_> {
    fn drop(&mut self) {
        if let Shown::Drawn(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

/// Locks the state, even if another holder panicked: no panic can leave it inconsistent.
fn lock<T>(state: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_one_line_per_tenth() {
        for (len, step) in [(10, 1), (1000, 1), (1000, 7), (3, 1), (1, 1)] {
            let mut lines = Lines { done: 0, len, message: String::new() };
            let shown = (0..len.div_ceil(step)).filter(|_| lines.advance(step)).count() as u64;
            assert_eq!(shown, len.min(10), "{len} by {step}");
        }
    }

    #[test]
    fn an_empty_bar_does_not_divide_by_zero() {
        Ui::silent().bar(0, "nothing").inc(0);
    }
}
