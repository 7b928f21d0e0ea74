//! Terminal output: result and progress lines on stdout, warnings and progress bars on stderr.
//!
//! A bar is drawn only on a terminal; otherwise progress is a plain line at every 10 %. Write errors, such as a closed
//! pipe (`| head`), never end a run.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{BinaryBytes, HumanDuration, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

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
        self.start(len, label.into(), Unit::Items)
    }

    /// Starts a progress bar for `len` bytes that are read, written or fetched. Without a terminal it prints nothing in its
    /// first seconds: most files are done sooner.
    pub fn bytes(&self, len: u64, label: impl Into<String>) -> Bar<'_> {
        self.start(len, label.into(), Unit::Bytes)
    }

    fn start(&self, len: u64, label: String, unit: Unit) -> Bar<'_> {
        let shown = match &self.bars {
            Some(bars) => {
                let style = ProgressStyle::with_template(unit.template()).expect("the template is constant and valid");
                Shown::Drawn(bars.add(ProgressBar::new(len).with_prefix(label).with_style(style)))
            }
            None => Shown::Lines { label, state: Mutex::new(Lines::new(len, unit)) },
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

/// What a bar counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    Items,
    Bytes,
}

impl Unit {
    fn template(self) -> &'static str {
        match self {
            Unit::Items => "{prefix} {wide_bar} {pos}/{len} {msg} [{elapsed}, {eta} left]",
            Unit::Bytes => "{prefix} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {msg} [{elapsed}, {eta} left]",
        }
    }
}

/// Seconds between two lines about bytes, and before the first.
const BETWEEN_LINES: f64 = 5.0;

/// Seconds after which lines forecast the time left.
const FORECAST_AFTER: f64 = 1.0;

/// Progress that is printed as lines instead of drawn.
struct Lines {
    done: u64,
    len: u64,
    message: String,
    unit: Unit,
    started: Instant,
    /// Seconds from the start to the last line.
    last: f64,
}

impl Lines {
    fn new(len: u64, unit: Unit) -> Self {
        Self { done: 0, len, message: String::new(), unit, started: Instant::now(), last: 0.0 }
    }

    /// Sets the number of units that are done, `seconds` after the start. Returns whether a line is due: that reached another
    /// tenth of `len`, and for bytes the last line is some seconds old.
    fn reach(&mut self, done: u64, seconds: f64) -> bool {
        let tenth = |done: u64| u128::from(done) * 10 / u128::from(self.len.max(1));
        let (before, after) = (tenth(self.done), tenth(done));
        let due = match self.unit {
            Unit::Items => after > before,
            Unit::Bytes => seconds - self.last >= BETWEEN_LINES,
        };
        self.done = done;
        self.last = if due { seconds } else { self.last };
        due
    }

    /// The line, `seconds` after the start.
    fn text(&self, label: &str, seconds: f64) -> String {
        let Self { done, len, message, .. } = self;
        let mut parts = vec![match self.unit {
            Unit::Items => format!("{label} {done}/{len}"),
            Unit::Bytes => format!("{label} {}/{}", BinaryBytes(*done), BinaryBytes(*len)),
        }];
        match self.unit {
            Unit::Items if message.is_empty() => {}
            Unit::Items => parts[0] += &format!(" {message}"),
            Unit::Bytes => parts.push(format!("{}/s", BinaryBytes((*done as f64 / seconds.max(1e-9)) as u64))),
        }
        if seconds >= FORECAST_AFTER && *done > 0 && done < len {
            let left = seconds / *done as f64 * (len - done) as f64;
            parts.push(format!("{} left", HumanDuration(Duration::from_secs_f64(left.min(1e9)))));
        }
        parts.join(", ")
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
                let done = state.done + n;
                self.reach(&mut state, label, done);
            }
        }
    }

    /// Sets the number of units that are done.
    pub fn set(&self, done: u64) {
        match &self.shown {
            Shown::Drawn(bar) => bar.set_position(done),
            Shown::Lines { label, state } => self.reach(&mut lock(state), label, done),
        }
    }

    fn reach(&self, state: &mut Lines, label: &str, done: u64) {
        let seconds = state.started.elapsed().as_secs_f64();
        if state.reach(done, seconds) {
            self.ui.line(state.text(label, seconds));
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
            let mut lines = Lines::new(len, Unit::Items);
            let mut done = 0;
            let mut next = || {
                done += step;
                done
            };
            let shown = (0..len.div_ceil(step)).filter(|_| lines.reach(next(), 0.0)).count() as u64;
            assert_eq!(shown, len.min(10), "{len} by {step}");
        }
    }

    #[test]
    fn lines_about_bytes_are_seconds_apart() {
        let mut lines = Lines::new(1 << 30, Unit::Bytes);
        let due: Vec<u64> = (1..=16).filter(|second| lines.reach(second << 26, *second as f64)).collect();
        assert_eq!(due, [5, 10, 15]);
        lines.reach(1 << 28, 16.0);
        assert_eq!(lines.text("hashing", 16.0), "hashing 256.00 MiB/1.00 GiB, 16.00 MiB/s, 48 seconds left");
    }

    #[test]
    fn a_line_forecasts_the_time_left_after_a_second() {
        let mut lines = Lines::new(10, Unit::Items);
        lines.message = "loss 1.0".into();
        lines.reach(5, 0.0);
        assert_eq!(lines.text("step", 0.5), "step 5/10 loss 1.0");
        assert_eq!(lines.text("step", 60.0), "step 5/10 loss 1.0, 60 seconds left");
    }

    #[test]
    fn an_empty_bar_does_not_divide_by_zero() {
        Ui::silent().bar(0, "nothing").inc(0);
        assert_eq!(Lines::new(0, Unit::Bytes).text("nothing", 0.0), "nothing 0 B/0 B, 0 B/s");
    }
}
