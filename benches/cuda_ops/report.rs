//! Timing, and rates next to the hardware's bound.

use std::sync::Arc;
use std::time::Instant;

use moewarden::backend::cuda::gpu::Gpu;
use moewarden::backend::cuda::plan::Form;

/// Peak rates by a part of the GPU's name: memory bandwidth in bytes/s, and dense BF16 FLOP/s. From NVIDIA's data
/// sheets.
const BOUNDS: [(&str, f64, f64); 7] = [
    ("H200", 4.8e12, 989e12),
    ("H100 80GB HBM3", 3.35e12, 989e12),
    ("H100 PCIe", 2.0e12, 756e12),
    ("A100-SXM4-80GB", 2.039e12, 312e12),
    ("A100-SXM4-40GB", 1.555e12, 312e12),
    ("L40S", 0.864e12, 362e12),
    ("RTX 4090", 1.008e12, 165e12),
];

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
    bounds: Option<(f64, f64)>,
    filter: String,
    markdown: bool,
    title: String,
    choices: Vec<Choice>,
}

impl Report {
    pub fn new(gpu: Arc<dyn Gpu>, filter: String, markdown: bool) -> Self {
        let name = gpu.name();
        let bounds = BOUNDS.iter().find(|(part, ..)| name.contains(part)).map(|&(_, bytes, flops)| (bytes, flops));
        match bounds {
            Some((bytes, flops)) => println!("bounds: {:.2} TB/s, {:.0} TFLOP/s", bytes / 1e12, flops / 1e12),
            None => println!("bounds of {name} unknown"),
        }
        Self { gpu, bounds, filter, markdown, title: String::new(), choices: Vec::new() }
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
        if !format!("{}: {name}", self.title).contains(&self.filter) {
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
        let (rate, share) = match self.bounds {
            None => (if work.flops > 0.0 { by_flops } else { by_bytes }, "bound unknown".to_owned()),
            Some((bytes, flops)) => {
                let (moving, computing) = (work.bytes / bytes, work.flops / flops);
                let rate = if computing > moving { by_flops } else { by_bytes };
                (rate, format!("{:.0} %", 100.0 * moving.max(computing) / seconds))
            }
        };
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
