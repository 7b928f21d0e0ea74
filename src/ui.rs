//! Terminal output: result and progress lines on stdout, warnings and progress bars on stderr.
//!
//! A bar is drawn only on a terminal; otherwise progress is a plain line at every 10 % of the steps of a phase, and some seconds
//! apart where bytes, rows or tokens are counted. Write errors, such as a closed
//! pipe (`| head`), never end a run.

use std::fmt::{self, Display};
use std::io::{self, IsTerminal, Write};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use indicatif::{
    BinaryBytes, HumanDuration, MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle,
};

use crate::meter::{self, Unit};
use crate::quote::message;

/// The terminal output of a process. Clones share the bars. Ranks other than 0 use [`Ui::silent`].
#[derive(Clone)]
pub struct Ui {
    level: Level,
    /// Whether results are printed at this level.
    results: bool,
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
        let color = colors_errors();
        let bars = (terminal && !quiet).then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr()));
        Self { level: if quiet { Level::Quiet } else { Level::Full }, results: true, bars, color }
    }

    /// No output: for ranks other than 0, and for tests.
    pub fn silent() -> Self {
        Self { level: Level::Silent, results: true, bars: None, color: false }
    }

    /// The same output without results: for a part of a command whose results come in the command's own.
    pub fn without_results(&self) -> Self {
        Self { results: false, ..self.clone() }
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
        if self.level != Level::Silent && self.results {
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
        self.start(len, label.into(), Counted::Items)
    }

    /// Starts a progress bar for `len` bytes that are read, written or fetched. Without a terminal it prints nothing in its
    /// first seconds: most files are done sooner.
    pub fn bytes(&self, len: u64, label: impl Into<String>) -> Bar<'_> {
        self.start(len, label.into(), Counted::Units(Unit::Bytes))
    }

    fn start(&self, len: u64, label: String, counted: Counted) -> Bar<'_> {
        let shown = match &self.bars {
            Some(bars) => Shown::Drawn(bars.add(ProgressBar::new(len).with_prefix(label).with_style(counted.style()))),
            None => Shown::Lines { label, state: Mutex::new(Lines::new(len, counted)) },
        };
        Bar { ui: self, shown }
    }

    /// From now on shows the activities of [`crate::meter`] that take more than a second.
    pub fn show_meters(&self) {
        if self.level == Level::Full {
            let ui = self.clone();
            thread::spawn(move || ui.watch_meters());
        }
    }

    fn watch_meters(&self) {
        loop {
            thread::sleep(BETWEEN_LOOKS);
            let Some(activity) = meter::current().filter(|activity| activity.started.elapsed() > SHOWN_AFTER) else {
                continue;
            };
            let bar = self.start(activity.total, activity.what.clone(), Counted::Units(activity.unit));
            if let Shown::Drawn(bar) = &bar.shown {
                // Since the bar is later than the work.
                bar.set_elapsed(activity.started.elapsed());
                let bar = bar.clone();
                activity.on_end(move || bar.finish_and_clear());
            }
            while meter::current().is_some_and(|current| Arc::ptr_eq(&current, &activity)) {
                bar.set_since(activity.done(), activity.started);
                thread::sleep(BETWEEN_LOOKS);
            }
        }
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

/// Whether errors may be coloured: stderr is a terminal, and the environment allows colours.
pub fn colors_errors() -> bool {
    io::stderr().is_terminal() && color_wanted()
}

/// Whether the environment allows colours: `NO_COLOR` is not set (<https://no-color.org>), and the terminal shows them.
fn color_wanted() -> bool {
    let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty()) && !is_dumb
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
enum Counted {
    /// Micro-batches, steps or answers: the message has the rate.
    Items,
    Units(Unit),
}

impl Counted {
    fn template(self) -> &'static str {
        match self {
            Self::Units(Unit::Bytes) => {
                "{prefix} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {msg} [{elapsed}, {eta} left]"
            }
            Self::Units(Unit::Rows) => "{prefix} {wide_bar} {pos}/{len} {rate} rows/s [{elapsed}, {eta} left]",
            Self::Units(Unit::Tokens) => "{prefix} {wide_bar} {pos}/{len} {rate} tokens/s [{elapsed}, {eta} left]",
            Self::Items => "{prefix} {wide_bar} {pos}/{len} {msg} [{elapsed}, {eta} left]",
        }
    }

    fn style(self) -> ProgressStyle {
        let style = ProgressStyle::with_template(self.template()).expect("the template is constant and valid");
        style.with_key("rate", |state: &ProgressState, out: &mut dyn fmt::Write| {
            _ = write!(out, "{:.0}", state.per_sec());
        })
    }

    /// A number of units as text.
    fn text(self, n: f64) -> String {
        match self {
            Self::Units(Unit::Bytes) => BinaryBytes(n as u64).to_string(),
            _ => format!("{n:.0}"),
        }
    }

    /// What follows a rate.
    fn per_second(self) -> &'static str {
        match self {
            Self::Items => "",
            Self::Units(Unit::Bytes) => "/s",
            Self::Units(Unit::Rows) => " rows/s",
            Self::Units(Unit::Tokens) => " tokens/s",
        }
    }
}

/// Seconds between two lines about bytes, rows or tokens, and before the first.
const BETWEEN_LINES: f64 = 5.0;

/// An activity that takes longer than this is shown.
const SHOWN_AFTER: Duration = Duration::from_secs(1);

/// Time between two looks at an activity.
const BETWEEN_LOOKS: Duration = Duration::from_millis(100);

/// Seconds after which lines forecast the time left.
const FORECAST_AFTER: f64 = 1.0;

/// Progress that is printed as lines instead of drawn.
struct Lines {
    done: u64,
    len: u64,
    message: String,
    counted: Counted,
    started: Instant,
    /// Seconds from the start to the last line.
    last: f64,
}

impl Lines {
    fn new(len: u64, counted: Counted) -> Self {
        Self { done: 0, len, message: String::new(), counted, started: Instant::now(), last: 0.0 }
    }

    /// Sets the number of units that are done, `seconds` after the start. Returns whether a line is due: that reached another
    /// tenth of `len` or, unless items are counted, that the last line is some seconds old.
    fn reach(&mut self, done: u64, seconds: f64) -> bool {
        let tenth = |done: u64| u128::from(done) * 10 / u128::from(self.len.max(1));
        let (before, after) = (tenth(self.done), tenth(done));
        let due = match self.counted {
            Counted::Items => after > before,
            Counted::Units(_) => seconds - self.last >= BETWEEN_LINES,
        };
        self.done = done;
        self.last = if due { seconds } else { self.last };
        due
    }

    /// The line, `seconds` after the start.
    fn text(&self, label: &str, seconds: f64) -> String {
        let Self { done, len, message, counted, .. } = self;
        let mut text = format!("{label} {}/{}", counted.text(*done as f64), counted.text(*len as f64));
        match counted {
            Counted::Items if message.is_empty() => {}
            Counted::Items => text += &format!(" {message}"),
            Counted::Units(_) => {
                text += &format!(", {}{}", counted.text(*done as f64 / seconds.max(1e-9)), counted.per_second());
            }
        }
        if seconds >= FORECAST_AFTER && *done > 0 && done < len {
            let left = seconds / *done as f64 * (len - done) as f64;
            text += &format!(", {} left", HumanDuration(Duration::from_secs_f64(left.min(1e9))));
        }
        text
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

    /// [`Self::set`] of work that began at `started`.
    fn set_since(&self, done: u64, started: Instant) {
        if let Shown::Lines { state, .. } = &self.shown {
            lock(state).started = started;
        }
        self.set(done);
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
            let mut lines = Lines::new(len, Counted::Items);
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
        let mut lines = Lines::new(1 << 30, Counted::Units(Unit::Bytes));
        let due: Vec<u64> = (1..=16).filter(|second| lines.reach(second << 26, *second as f64)).collect();
        assert_eq!(due, [5, 10, 15]);
        lines.reach(1 << 28, 16.0);
        assert_eq!(lines.text("hashing", 16.0), "hashing 256.00 MiB/1.00 GiB, 16.00 MiB/s, 48 seconds left");
    }

    #[test]
    fn a_line_forecasts_the_time_left_after_a_second() {
        let mut lines = Lines::new(10, Counted::Items);
        lines.message = "loss 1.0".into();
        lines.reach(5, 0.0);
        assert_eq!(lines.text("step", 0.5), "step 5/10 loss 1.0");
        assert_eq!(lines.text("step", 60.0), "step 5/10 loss 1.0, 60 seconds left");
    }

    #[test]
    fn an_empty_bar_does_not_divide_by_zero() {
        Ui::silent().bar(0, "nothing").inc(0);
        assert_eq!(Lines::new(0, Counted::Units(Unit::Bytes)).text("nothing", 0.0), "nothing 0 B/0 B, 0 B/s");
    }
}
