//! What the user sees while the program works: lines on stdout, warnings and a progress bar on stderr.
//!
//! The bar is drawn only on a terminal; elsewhere it becomes a plain line at each tenth of the way. A reader that went
//! away (`| head`) never stops a run.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

/// The user's side of the program. One a process, and its clones; ranks other than 0 get [`Ui::silent`].
#[derive(Clone)]
pub struct Ui {
    level: Level,
    bars: Option<MultiProgress>,
    color: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Level {
    /// Nothing at all.
    Silent,
    /// Results and warnings.
    Quiet,
    /// Progress too.
    Full,
}

impl Ui {
    /// For this process's stdout and stderr. `quiet` leaves out progress. `NO_COLOR` (set and not empty) is honoured.
    pub fn new(quiet: bool) -> Self {
        let terminal = io::stderr().is_terminal();
        let color = terminal && color_wanted();
        let bars = (terminal && !quiet).then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
        Self { level: if quiet { Level::Quiet } else { Level::Full }, bars, color }
    }

    /// Shows nothing: for ranks other than 0, and for tests.
    pub fn silent() -> Self {
        Self { level: Level::Silent, bars: None, color: false }
    }

    /// Whether results may hold colours: stdout is a terminal, and `NO_COLOR` does not forbid them.
    pub fn colors_results(&self) -> bool {
        self.level != Level::Silent && io::stdout().is_terminal() && color_wanted()
    }

    /// A line of progress, on stdout. Left out by `--quiet`.
    pub fn line(&self, text: impl Display) {
        if self.level == Level::Full {
            self.write(&mut io::stdout(), &text);
        }
    }

    /// A line of the result, what a command was called for, on stdout.
    pub fn result(&self, text: impl Display) {
        if self.level != Level::Silent {
            self.write(&mut io::stdout(), &text);
        }
    }

    /// A warning, on stderr.
    pub fn warn(&self, text: impl Display) {
        if self.level != Level::Silent {
            let word = if self.color { "\x1b[33mwarning:\x1b[0m" } else { "warning:" };
            self.write(&mut io::stderr(), &format_args!("{word} {text}"));
        }
    }

    /// Starts a progress bar over `len` units of work.
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

    /// Writes a line above the bars. Errors are dropped: a closed pipe must not end a run.
    fn write(&self, to: &mut dyn Write, text: &dyn Display) {
        let mut write = || drop(writeln!(to, "{text}").and_then(|()| to.flush()));
        match &self.bars {
            Some(bars) => bars.suspend(write),
            None => write(),
        }
    }
}

/// Whether the environment lets colours be (<https://no-color.org>).
fn color_wanted() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty())
}

/// Progress through a known amount of work. Dropped, it disappears from the terminal.
pub struct Bar<'a> {
    ui: &'a Ui,
    shown: Shown,
}

enum Shown {
    Drawn(ProgressBar),
    Lines { label: String, state: Mutex<Lines> },
}

/// Where a bar that is not drawn stands.
struct Lines {
    done: u64,
    len: u64,
    message: String,
}

impl Lines {
    /// Counts `n` more units; true where that enters another tenth of the whole.
    fn advance(&mut self, n: u64) -> bool {
        let tenth = |done: u64| u128::from(done) * 10 / u128::from(self.len.max(1));
        let (before, after) = (tenth(self.done), tenth(self.done + n));
        self.done += n;
        after > before
    }
}

impl Bar<'_> {
    /// Shows this beside the bar: loss, tokens a second.
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

    /// Takes the bar away.
    pub fn finish(self) {}
}

impl Drop for Bar<'_> {
    fn drop(&mut self) {
        if let Shown::Drawn(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

/// The state behind the lock is whole even where another holder panicked.
fn lock<T>(state: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_for_each_tenth_and_no_more() {
        for (len, step) in [(10, 1), (1000, 1), (1000, 7), (3, 1), (1, 1)] {
            let mut lines = Lines { done: 0, len, message: String::new() };
            let shown = (0..len.div_ceil(step)).filter(|_| lines.advance(step)).count() as u64;
            assert_eq!(shown, len.min(10), "{len} by {step}");
        }
    }

    #[test]
    fn an_empty_bar_divides_by_nothing() {
        Ui::silent().bar(0, "nothing").inc(0);
    }
}
