//! Timing, and rates next to what the GPU reaches at best.

use std::sync::Arc;
use std::time::Instant;

use moewarden::backend::cuda::gpu::Gpu;
use moewarden::backend::cuda::plan::Form;

use crate::ceilings::Ceilings;

/// Seconds per measurement, and number of measurements.
const SPAN: f64 = 0.05;
const ROUNDS: usize = 5;

/// The minimum work of an operation.
#[derive(Clone, Copy)]
pub struct Work {
    pub flops: f64,
    /// Each operand read once, each result written once.
    pub bytes: f64,
}

/// A memory-bound operation.
pub fn bytes(n: usize) -> Work {
    Work { flops: 0.0, bytes: n as f64 }
}

/// A product.
pub fn product(flops: usize, bytes: usize) -> Work {
    Work { flops: flops as f64, bytes: bytes as f64 }
}

/// The seconds of a product in the chosen form, and in the best of the others.
struct Choice {
    what: String,
    chosen: (Form, f64),
    best: (Form, f64),
}

/// Prints each line immediately.
pub struct Report {
    gpu: Arc<dyn Gpu>,
    ceilings: Ceilings,
    /// Parts of an operation's line, all of which it must contain.
    filters: Vec<String>,
    markdown: bool,
    title: String,
    choices: Vec<Choice>,
}

impl Report {
    pub fn new(gpu: Arc<dyn Gpu>, ceilings: Ceilings, filters: Vec<String>, markdown: bool) -> Self {
        Self { gpu, ceilings, filters, markdown, title: String::new(), choices: Vec::new() }
    }

    pub fn title(&mut self, title: &str) {
        self.title = title.into();
        if self.markdown {
            println!("\n### {title}\n\n| operation | ms | rate | of the bound |\n|---|---|---|---|");
        } else {
            println!("\n{title}");
        }
    }

    /// The median of a few loops with a synchronization at the end, each long enough for launches to overlap with work;
    /// `None` if the filter excludes it.
    pub fn time<R>(&self, name: &str, work: Work, mut f: impl FnMut() -> R) -> Option<f64> {
        let line = format!("{}: {name}", self.title);
        if !self.filters.iter().all(|part| line.contains(part)) {
            return None;
        }
        let mut run = |n: usize| {
            let start = Instant::now();
            (0..n).for_each(|_| drop(f()));
            self.gpu.synchronize().expect("the queued work ends");
            start.elapsed().as_secs_f64()
        };
        run(1); // warm-up: allocates, loads the kernel
        let n = ((SPAN / run(2).max(1e-9) * 2.0) as usize).clamp(1, 5000);
        let mut times: Vec<f64> = (0..ROUNDS).map(|_| run(n) / n as f64).collect();
        times.sort_by(f64::total_cmp);
        let median = times[ROUNDS / 2];
        self.line(name, work, median);
        Some(median)
    }

    /// The same for all forms of a product, with the chosen form first.
    pub fn compare<R>(&mut self, name: &str, work: Work, forms: &[Form], mut f: impl FnMut(Form) -> R) {
        let mut timed = forms
            .iter()
            .filter_map(|&form| Some((form, self.time(&format!("{name}: {form}"), work, || f(form))?)))
            .collect::<Vec<_>>()
            .into_iter();
        let chosen = timed.next();
        if let Some((chosen, best)) = chosen.zip(timed.min_by(|a, b| a.1.total_cmp(&b.1))) {
            self.choices.push(Choice { what: format!("{}, {name}", self.title), chosen, best });
        }
    }

    fn line(&self, name: &str, work: Work, seconds: f64) {
        let (tera, giga) = (work.flops / seconds / 1e12, work.bytes / seconds / 1e9);
        let by_bytes = format!("{giga:.0} GB/s");
        let by_flops = format!("{tera:.1} TFLOP/s");
        let (moving, computing) = (work.bytes / self.ceilings.bytes, work.flops / self.ceilings.flops);
        let rate = if computing > moving { by_flops } else { by_bytes };
        let share = format!("{:.0} %", 100.0 * moving.max(computing) / seconds);
        let ms = 1e3 * seconds;
        if self.markdown {
            println!("| {name} | {ms:.3} | {rate} | {share} |");
        } else {
            println!("  {name:64} {ms:10.3} ms {rate:>16} {share:>14}");
        }
    }

    /// Prints where the chosen form is slower than another.
    pub fn judge_choices(&self) {
        if self.choices.is_empty() {
            return;
        }
        let slower: Vec<&Choice> = self.choices.iter().filter(|c| c.chosen.1 > c.best.1).collect();
        println!("\nThe form chosen was the slower one {} of {} times:\n", slower.len(), self.choices.len());
        for &Choice { ref what, chosen: (form, mine), best: (better, other) } in slower {
            let (ms, instead, times) = (1e3 * mine, 1e3 * other, mine / other);
            println!("- {what}: {form}, {ms:.3} ms instead of {instead:.3} by {better} ({times:.2} times)");
        }
    }
}
