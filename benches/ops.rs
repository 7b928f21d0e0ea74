//! Median time, median rate and best rate of each CPU operation at the sizes of an identification pass, and the best rate
//! for each core that worked on it: `cargo bench --bench ops`. The last counts CPU time, so on a machine shared with other
//! work it is the most reliable one.
//!
//! Options: `-- NAME` runs the operations whose name contains NAME; the environment variable `THREADS` sets the number
//! of threads (0 or unset: one per core). PRECISION=bf16 computes products of bf16 values, by the fastest instructions of the
//! processor or by INSTRUCTIONS. The percentage is the share of a bound that is measured first: for GFLOP/s the rate of the
//! innermost loop on all threads, with operands in the caches; for the weights that a step of generation reads (`decoding`),
//! the rate at which all threads add up a buffer larger than the caches. Nothing is asserted, because machines differ.

use std::collections::BTreeSet;
use std::time::Instant;

use moewarden::backend::cpu::{Caches, Cpu, Instructions, Processor, Products, Tensor, Weight};
use moewarden::backend::{AdamwStep, Backend, Dtype, ExpertGrad, GradReduction, Heads, HostTensor, Packing, Rope};

/// Model width.
const D: usize = 1024;
/// Expert width.
const F: usize = 512;
/// Experts.
const E: usize = 64;
/// Experts per token.
const K: usize = 8;
/// Vocabulary size.
const V: usize = 50304;
/// Head width.
const DIM: usize = 64;

/// The amount of work of one run, in the unit of the rate.
enum Work {
    /// Floating-point operations.
    Flops(usize),
    /// Values read or written, counted as f32 in GB/s, also where the rows of experts are bf16.
    Values(usize),
    /// Bytes of weights.
    Weights(usize),
}

struct Bench {
    filter: String,
    /// FLOP/s of the innermost loop on all threads.
    bound: f64,
    /// Bytes a second that all threads read from memory.
    memory: f64,
}

impl Bench {
    /// Prints the median of as many runs as fit in about a second, at least three and at most 200.
    fn time<R>(&self, name: &str, work: Work, mut f: impl FnMut() -> R) {
        if !name.contains(&self.filter) {
            return;
        }
        drop(f());
        let (start, mut times, mut least_cpu) = (Instant::now(), Vec::new(), f64::INFINITY);
        while times.len() < 3 || (start.elapsed().as_secs_f64() < 1.0 && times.len() < 200) {
            let (one, cpu) = (Instant::now(), cpu_seconds());
            let result = f();
            times.push(one.elapsed().as_secs_f64());
            least_cpu = least_cpu.min(cpu_seconds() - cpu);
            drop(result);
        }
        times.sort_by(f64::total_cmp);
        let (median, best) = (times[times.len() / 2], times[0]);
        let (amount, unit, bound) = match work {
            Work::Flops(n) => (n as f64, "GFLOP/s", Some(self.bound)),
            Work::Values(n) => (4.0 * n as f64, "GB/s", None),
            Work::Weights(bytes) => (bytes as f64, "GB/s", Some(self.memory)),
        };
        let rate = |t: f64| amount / t / 1e9;
        let share = bound.map_or_else(String::new, |bound| format!(", {:.0} %", 1e11 * rate(best) / bound));
        let (per_core, best) = (rate(least_cpu), rate(best));
        println!(
            "{name:32} {:9.3} ms {:7.1} {unit:7} (best {best:7.1}{share}, per core {per_core:7.1})",
            median * 1e3,
            rate(median)
        );
    }
}

/// CPU time of this process so far, all threads together.
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes the plain struct that it is given.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}

/// Deterministic pseudorandom values in [-scale, scale).
fn noise(n: usize, scale: f32) -> Vec<f32> {
    let mut state = 1u32;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale
        })
        .collect()
}

/// Bytes a second that `threads` threads read from memory: the best of several sums over 1 GiB.
fn memory_rate(threads: usize) -> f64 {
    let values = vec![1u64; 1 << 27];
    let rate = |_| {
        let clock = Instant::now();
        std::thread::scope(|scope| {
            for part in values.chunks(values.len().div_ceil(threads)) {
                scope.spawn(|| std::hint::black_box(part.iter().fold(0u64, |sum, &value| sum.wrapping_add(value))));
            }
        });
        size_of_val(&*values) as f64 / clock.elapsed().as_secs_f64()
    };
    (0..5).map(rate).fold(0.0, f64::max)
}

fn weight(cpu: &Cpu, dtype: Dtype, rows: usize, cols: usize) -> Weight {
    cpu.weight(HostTensor::encode(dtype, vec![rows, cols], &noise(rows * cols, 0.05)))
}

fn main() {
    let filter = std::env::args().skip(1).find(|a| !a.starts_with('-')).unwrap_or_default();
    let threads = std::env::var("THREADS").ok().and_then(|t| t.parse().ok()).unwrap_or(0);
    let cpu = Cpu::new(threads);
    let processor = Processor::detect();
    let forced = std::env::var("INSTRUCTIONS").ok().map(|name| name.parse::<Instructions>().expect("INSTRUCTIONS"));
    let bf16 = std::env::var("PRECISION").is_ok_and(|p| p == "bf16");
    let instructions = if bf16 { processor.choose(forced) } else { processor.choose(None) }.expect("INSTRUCTIONS");
    // In f32 the bound is that of the widest vectors.
    let widest = if processor.has(Instructions::Avx512) { Instructions::Avx512 } else { Instructions::Portable };
    let products = Products::new(if bf16 { instructions } else { widest }, Caches::detect());
    let bound = std::thread::scope(|scope| {
        let all: Vec<_> = (0..cpu.threads()).map(|_| scope.spawn(|| products.kernel_rate())).collect();
        all.into_iter().map(|one| one.join().expect("no panic")).sum::<f64>()
    });
    let cpu = if bf16 { cpu.with_products(products) } else { cpu };
    println!(
        "{} threads, {:?}, bound {:.0} GFLOP/s by {}",
        cpu.threads(),
        cpu.precision(),
        bound / 1e9,
        products.instructions()
    );
    let memory = memory_rate(cpu.threads());
    println!("memory {:.1} GB/s", memory / 1e9);
    let bench = Bench { filter, bound, memory };
    if "decoding".contains(&*bench.filter) || bench.filter.starts_with("decoding") {
        decoding(&bench, &cpu);
    }
    let lengths = [60, 400, 230, 310, 120, 270, 350, 100];
    let packing = Packing::of_lengths(lengths);
    let t = packing.rows();
    let inv_freq = (0..DIM / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / DIM as f32)).collect();
    let seqs = cpu.sequences(&packing, &Rope { inv_freq, scale: 1.0 });
    let tensor = |rows: usize, cols: usize| -> Tensor { cpu.upload(rows, cols, &noise(rows * cols, 1.0)) };
    let (x, dy) = (tensor(t, D), tensor(t, D));

    for dtype in [Dtype::F32, Dtype::Bf16] {
        let w = weight(&cpu, dtype, D, D);
        let flops = 2 * t * D * D;
        bench.time(&format!("linear {dtype:?}"), Work::Flops(flops), || cpu.linear(&x, &w, None));
        bench.time(&format!("linear backward input {dtype:?}"), Work::Flops(flops), || {
            cpu.linear_backward_input(&dy, &w)
        });
    }
    let mut dw = cpu.buffer(E * D * F * 2);
    bench
        .time("linear backward weight", Work::Flops(2 * t * D * D), || cpu.linear_backward_weight(&dy, &x, &mut dw, 0));
    let router = weight(&cpu, Dtype::F32, E, D);
    bench.time("linear router", Work::Flops(2 * t * D * E), || cpu.linear(&x, &router, None));
    let one = tensor(1, D);
    let square = weight(&cpu, Dtype::F32, D, D);
    bench.time("linear of one row", Work::Flops(2 * D * D), || cpu.linear(&one, &square, None));

    let norm = cpu.weight(HostTensor::from_f32(vec![D], &vec![1.0; D]));
    bench.time("rms_norm", Work::Values(2 * t * D), || cpu.rms_norm(&x, &norm, 1e-5));
    bench.time("rms_norm backward", Work::Values(3 * t * D), || cpu.rms_norm_backward(&dy, &x, &norm, 1e-5, None));
    let mut sum = tensor(t, D);
    bench.time("add_assign", Work::Values(3 * t * D), || cpu.add_assign(&mut sum, &x));
    bench.time("rope", Work::Values(2 * t * D), || cpu.rope(&mut sum, DIM, &seqs));

    let heads = Heads { queries: D / DIM, keys: D / DIM, dim: DIM, window: None };
    let causal: usize = lengths.iter().map(|n| n * (n + 1) / 2).sum();
    let (k, v) = (tensor(t, D), tensor(t, D));
    let (y, ()) = cpu.attention(&x, &k, &v, &seqs, &heads);
    bench.time("attention", Work::Flops(4 * causal * D), || cpu.attention(&x, &k, &v, &seqs, &heads));
    bench.time("attention backward", Work::Flops(10 * causal * D), || {
        cpu.attention_backward(&dy, &x, &k, &v, (&y, &()), &seqs, &heads)
    });

    let logits = tensor(t, E);
    bench.time("route", Work::Values(2 * t * E), || cpu.route(&logits, K, false));
    let few = cpu.indices(&[0, 1, 2, 3]);
    let mut changed = tensor(t, E);
    bench.time("fill_columns", Work::Values(4 * t), || cpu.fill_columns(&mut changed, &few, 0.0));
    let mut silenced = cpu.route(&logits, K, false);
    bench.time("zero_routing_weights", Work::Values(t * K), || cpu.zero_routing_weights(&mut silenced, &few));
    let routing = cpu.route(&logits, K, false);
    bench.time("dispatch", Work::Values(t * K), || cpu.dispatch(&routing, E));
    let dispatch = cpu.dispatch(&routing, E);
    bench.time("dispatch_rows", Work::Values(2 * t * K * D), || cpu.dispatch_rows(&x, &dispatch));
    let rows = cpu.dispatch_rows(&x, &dispatch);
    bench.time("combine_rows", Work::Values(t * (K + 1) * D), || cpu.combine_rows(&rows, &dispatch));

    for dtype in [Dtype::F32, Dtype::Bf16] {
        let make = |n: usize, k: usize| -> Vec<Weight> { (0..E).map(|_| weight(&cpu, dtype, n, k)).collect() };
        let (gate, up, down) = (make(F, D), make(F, D), make(D, F));
        let gate_up: Vec<Vec<&Weight>> = gate.iter().zip(&up).map(|(g, u)| vec![g, u]).collect();
        let down: Vec<Vec<&Weight>> = down.iter().map(|w| vec![w]).collect();
        let (big, small) = (2 * t * K * D * 2 * F, 2 * t * K * D * F);
        let name = |what: &str| format!("experts {what} {dtype:?}");
        bench.time(&name("gate+up"), Work::Flops(big), || cpu.grouped_linear(&rows, &gate_up, &dispatch));
        let h = cpu.grouped_linear(&rows, &gate_up, &dispatch);
        bench.time("swiglu", Work::Values(t * K * 3 * F), || cpu.weighted_swiglu(&h, &routing, &dispatch));
        let a = cpu.swiglu(&h);
        bench.time("swiglu and its backward", Work::Values(t * K * 8 * F), || {
            cpu.weighted_swiglu_backward(cpu.swiglu(&h), &h, &routing, &dispatch)
        });
        bench.time(&name("down"), Work::Flops(small), || cpu.grouped_linear(&a, &down, &dispatch));
        bench.time(&name("down dx"), Work::Flops(small), || cpu.grouped_linear_backward_input(&rows, &down, &dispatch));
        bench
            .time(&name("gate+up dx"), Work::Flops(big), || cpu.grouped_linear_backward_input(&h, &gate_up, &dispatch));
        let mut scores = cpu.scores(E);
        let score: Vec<ExpertGrad> = (0..E).map(|e| ExpertGrad::Score(GradReduction::Abs, e)).collect();
        bench.time(&name("gate+up score"), Work::Flops(big), || {
            cpu.grouped_linear_backward_weight(&h, &rows, &gate_up, &dispatch, &score, &mut dw, &mut scores)
        });
        bench.time(&name("down score"), Work::Flops(small), || {
            cpu.grouped_linear_backward_weight(&rows, &a, &down, &dispatch, &score, &mut dw, &mut scores)
        });
        let add: Vec<ExpertGrad> = (0..E).map(|e| ExpertGrad::Accumulate(vec![e * D * F])).collect();
        bench.time(&name("down accumulate"), Work::Flops(small), || {
            cpu.grouped_linear_backward_weight(&rows, &a, &down, &dispatch, &add, &mut dw, &mut scores)
        });
    }

    for dtype in [Dtype::F32, Dtype::Bf16] {
        if !format!("cross-entropy {dtype:?}").contains(&bench.filter) {
            continue;
        }
        let head = weight(&cpu, dtype, V, D);
        let targets = cpu.indices(&(0..t as u32).collect::<Vec<_>>());
        bench.time(&format!("cross-entropy {dtype:?}"), Work::Flops(2 * t * D * V), || {
            cpu.linear_cross_entropy(&x, &head, &targets)
        });
        bench.time(&format!("cross-entropy {dtype:?} by row"), Work::Flops(2 * t * D * V), || {
            cpu.linear_cross_entropy_rows(&x, &head, &targets)
        });
        bench.time(&format!("cross-entropy {dtype:?} backward"), Work::Flops(4 * t * D * V), || {
            cpu.linear_cross_entropy_backward(&x, &head, &targets, 1.0, None)
        });
        bench.time(&format!("KL {dtype:?}"), Work::Flops(4 * t * D * V), || cpu.linear_kl(&x, &head, &x, &head));
        bench.time(&format!("KL {dtype:?} backward"), Work::Flops(6 * t * D * V), || {
            cpu.linear_kl_backward(&x, &head, &x, &head, 1.0, None)
        });
        let ids = cpu.indices(&(0..t as u32).map(|i| i * 27).collect::<Vec<_>>());
        bench.time(&format!("embedding {dtype:?}"), Work::Values(2 * t * D), || cpu.embedding(&ids, &head));
    }

    let n = E * D * F;
    let (mut master, mut m, mut v) = (cpu.buffer(n), cpu.buffer(n), cpu.buffer(n));
    let step = AdamwStep { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, step: 1, grad_scale: 1.0 };
    bench.time("adamw", Work::Values(7 * n), || cpu.adamw(&mut master, &mut m, &mut v, 0..n, &dw, 0, &step));
    bench.time("sum_squares", Work::Values(n), || cpu.sum_squares(&dw, 0..n));
}

/// A step of generation for batches of sequences: products with few rows, whose time is that of reading the weights.
fn decoding(bench: &Bench, cpu: &Cpu) {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let make = |n: usize, k: usize| -> Vec<Weight> { (0..E).map(|_| weight(cpu, dtype, n, k)).collect() };
        let (gate, up, down) = (make(F, D), make(F, D), make(D, F));
        let gate_up: Vec<Vec<&Weight>> = gate.iter().zip(&up).map(|(g, u)| vec![g, u]).collect();
        let down: Vec<Vec<&Weight>> = down.iter().map(|w| vec![w]).collect();
        let head = weight(cpu, dtype, V, D);
        for batch in [1, 8, 32] {
            let logits = noise(batch * E, 1.0);
            let experts = logits.chunks(E).flat_map(|row| {
                let mut ids: Vec<usize> = (0..E).collect();
                ids.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
                ids.truncate(K);
                ids
            });
            let read = experts.collect::<BTreeSet<_>>().len() * F * D * dtype.size();
            let x = cpu.upload(batch, D, &noise(batch * D, 1.0));
            let routing = cpu.route(&cpu.upload(batch, E, &logits), K, false);
            let dispatch = cpu.dispatch(&routing, E);
            let rows = cpu.dispatch_rows(&x, &dispatch);
            let name = |what: &str| format!("decoding {batch} {what} {dtype:?}");
            bench.time(&name("gate+up"), Work::Weights(2 * read), || cpu.grouped_linear(&rows, &gate_up, &dispatch));
            let a = cpu.swiglu(&cpu.grouped_linear(&rows, &gate_up, &dispatch));
            bench.time(&name("down"), Work::Weights(read), || cpu.grouped_linear(&a, &down, &dispatch));
            bench.time(&name("logits"), Work::Weights(V * D * dtype.size()), || cpu.linear(&x, &head, None));
        }
    }
}
