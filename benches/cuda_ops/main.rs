//! Median time and rate of each operation of the CUDA backend, next to the hardware's bound, at the shapes of one layer
//! of OLMoE-1B-7B, Qwen3-30B-A3B and Mixtral-8x7B: `cargo bench --bench cuda_ops`.
//!
//! Options: `-- NAME` runs the operations whose line contains it, `--markdown` prints tables, `--gpu N` selects another
//! GPU, `--open` only prints the GPU and the libraries. `--emulate` runs everything once in tiny shapes on an emulated
//! GPU, only to test this program.
//!
//! Grouped products and gradient magnitudes are timed in all forms; the end lists the shapes for which
//! `backend::cuda::plan` chooses a slower one.

#[path = "../../tests/emulator/mod.rs"]
#[allow(dead_code)] // the tests use more of it
mod emulator;
mod layer;
mod report;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Arc;

use layer::Shape;
use moewarden::backend::DeviceFault;
use moewarden::backend::cuda::gpu::Gpu;
use moewarden::backend::cuda::nvidia::Nvidia;
use moewarden::backend::cuda::nvidia::library::Surroundings;
use moewarden::exit::Coded;
use report::Report;

/// From the models' public config.json.
const MODELS: [Shape; 3] = [
    Shape { model: "OLMoE-1B-7B", d: 2048, heads: 16, kv: 16, dim: 128, f: 1024, experts: 64, top_k: 8, v: 50304 },
    Shape { model: "Qwen3-30B-A3B", d: 2048, heads: 32, kv: 4, dim: 128, f: 768, experts: 128, top_k: 8, v: 151_936 },
    Shape { model: "Mixtral-8x7B", d: 4096, heads: 32, kv: 8, dim: 128, f: 14336, experts: 8, top_k: 2, v: 32000 },
];
const TINY: [Shape; 1] = [Shape { model: "tiny", d: 16, heads: 4, kv: 2, dim: 8, f: 24, experts: 5, top_k: 2, v: 40 }];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let flag = |name: &str| args.iter().any(|a| a == name);
    let at = args.iter().position(|a| a == "--gpu").map(|i| i + 1);
    let index = at.map_or(0, |i| args.get(i).and_then(|a| a.parse().ok()).expect("--gpu takes a number"));
    let named = args.iter().enumerate().find(|(i, a)| Some(*i) != at && !a.starts_with("--"));
    let filter = named.map(|(_, name)| name.clone()).unwrap_or_default();

    let gpu: Arc<dyn Gpu> = if flag("--emulate") {
        Arc::new(emulator::Emulated::new())
    } else {
        let cache = std::env::temp_dir().join("moewarden-bench-kernels");
        match Nvidia::open(index, &Surroundings::read(|name| std::env::var_os(name)), Some(&cache)) {
            Ok(gpu) => {
                println!("{}: {}", gpu.name(), gpu.software());
                Arc::new(gpu)
            }
            Err(error) => {
                eprintln!("{error}");
                return ExitCode::from(error.exit_code());
            }
        }
    };
    if flag("--open") {
        return ExitCode::SUCCESS;
    }
    let mut report = Report::new(gpu.clone(), filter, flag("--markdown"));
    let (models, batches): (&[Shape], &[(usize, usize)]) =
        if flag("--emulate") { (&TINY, &[(2, 9)]) } else { (&MODELS, &[(8, 512), (16, 2048)]) };
    let mut code = ExitCode::SUCCESS;
    for shape in models {
        for &(rows, length) in batches {
            report.title(&format!("{}, {rows} x {length} tokens", shape.model));
            // Full memory unwinds as a device fault; the next shape may fit.
            let run = AssertUnwindSafe(|| layer::run(&mut report, &gpu, shape, &vec![length; rows]));
            if let Err(payload) = catch_unwind(run) {
                match payload.downcast::<DeviceFault>() {
                    Ok(fault) => println!("\ngave up: {fault}"),
                    Err(payload) => std::panic::resume_unwind(payload),
                }
                code = ExitCode::FAILURE;
            }
        }
    }
    report.judge_choices();
    code
}
