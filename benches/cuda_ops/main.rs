//! Median time and rate of each operation of the CUDA backend, next to the rates that the GPU reaches at best (measured
//! first: a large product, a copy), at the shapes of one layer of OLMoE-1B-7B, Qwen3-30B-A3B and Mixtral-8x7B:
//! `cargo bench --bench cuda_ops`.
//!
//! Options: `-- PART ..` runs the operations whose line contains all parts (`"OLMoE-1B-7B, 8 x 512 tokens"` is a whole
//! shape), `--markdown` prints tables, `--gpu N` selects another GPU, `--define NAME` compiles the kernels with a macro,
//! to compare variants (`NO_ASYNC_FENCE`: kernels/wgmma.cuh). `--open` only prints the GPU and the libraries,
//! `--ceilings FILE` only writes the rates of the GPU, as JSON. `--emulate` runs everything once in tiny shapes on an
//! emulated GPU, only to test this program.
//!
//! Grouped products and gradient magnitudes are timed in all forms; the end lists the shapes for which
//! `backend::cuda::plan` chooses a slower one.

mod ceilings;
#[path = "../../tests/emulator/mod.rs"]
#[allow(dead_code)] // the tests use more of it
mod emulator;
mod layer;
mod report;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use ceilings::Ceilings;
use layer::Shape;
use moewarden::backend::DeviceFault;
use moewarden::backend::cuda::gpu::Gpu;
use moewarden::backend::cuda::nvidia::library::Surroundings;
use moewarden::backend::cuda::nvidia::{Nvidia, Opening};
use moewarden::exit::Coded;
use moewarden::launch::kernel_cache;
use report::Report;

/// From the models' public config.json.
const MODELS: [Shape; 3] = [
    Shape { model: "OLMoE-1B-7B", d: 2048, heads: 16, kv: 16, dim: 128, f: 1024, experts: 64, top_k: 8, v: 50304 },
    Shape { model: "Qwen3-30B-A3B", d: 2048, heads: 32, kv: 4, dim: 128, f: 768, experts: 128, top_k: 8, v: 151_936 },
    Shape { model: "Mixtral-8x7B", d: 4096, heads: 32, kv: 8, dim: 128, f: 14336, experts: 8, top_k: 2, v: 32000 },
];
const TINY: [Shape; 1] = [Shape { model: "tiny", d: 16, heads: 4, kv: 2, dim: 8, f: 24, experts: 5, top_k: 2, v: 40 }];

/// Rows and columns of the product, and bytes of the copy, by which the GPU's rates are measured.
const SIDE: usize = 8192;
const COPY: usize = 1 << 30;

/// The command line.
#[derive(Default)]
struct Options {
    gpu: usize,
    open: bool,
    emulate: bool,
    markdown: bool,
    ceilings: Option<PathBuf>,
    defines: Vec<String>,
    parts: Vec<String>,
}

impl Options {
    fn read(mut args: impl Iterator<Item = String>) -> Self {
        let mut options = Self::default();
        while let Some(arg) = args.next() {
            let mut value = || args.next().unwrap_or_else(|| panic!("{arg} takes a value"));
            match arg.as_str() {
                "--bench" => {} // from cargo
                "--open" => options.open = true,
                "--emulate" => options.emulate = true,
                "--markdown" => options.markdown = true,
                "--gpu" => options.gpu = value().parse().expect("--gpu takes a number"),
                "--ceilings" => options.ceilings = Some(value().into()),
                "--define" => options.defines.push(value()),
                _ if arg.starts_with("--") => panic!("there is no option {arg}"),
                _ => options.parts.push(arg),
            }
        }
        options
    }

    fn open_gpu(&self) -> Result<Arc<dyn Gpu>, ExitCode> {
        if self.emulate {
            return Ok(Arc::new(emulator::Emulated::new()));
        }
        let cache = kernel_cache().unwrap_or_else(|| std::env::temp_dir().join("moewarden-kernels"));
        let opening = Opening { kernel_cache: Some(&cache), defines: &self.defines };
        match Nvidia::open_with(self.gpu, &Surroundings::read(|name| std::env::var_os(name)), &opening) {
            Ok(gpu) => {
                println!("{}: {}", gpu.name(), gpu.software());
                Ok(Arc::new(gpu))
            }
            Err(error) => {
                eprintln!("{error}");
                Err(ExitCode::from(error.exit_code()))
            }
        }
    }
}

fn main() -> ExitCode {
    let options = Options::read(std::env::args().skip(1));
    let gpu = match options.open_gpu() {
        Ok(gpu) => gpu,
        Err(code) => return code,
    };
    if options.open {
        return ExitCode::SUCCESS;
    }
    let (side, copy) = if options.emulate { (64, 1 << 20) } else { (SIDE, COPY) };
    // Full memory unwinds as a device fault, or is an error of the copies.
    let measured = match catch_unwind(AssertUnwindSafe(|| Ceilings::measure(&gpu, side, copy))) {
        Ok(measured) => measured.map_err(|error| error.to_string()),
        Err(payload) => Err(fault(payload).to_string()),
    };
    let ceilings = match measured {
        Ok(ceilings) => ceilings,
        Err(error) => {
            eprintln!("the rates of {} cannot be measured: {error}", gpu.name());
            return ExitCode::FAILURE;
        }
    };
    println!("at best {:.2} TB/s, {:.0} TFLOP/s", ceilings.bytes / 1e12, ceilings.flops / 1e12);
    if let Some(path) = &options.ceilings {
        let text = serde_json::to_string(&ceilings).expect("numbers and a name");
        if let Err(error) = std::fs::write(path, text) {
            eprintln!("{}: {error}", path.display());
            return ExitCode::FAILURE;
        }
        return ExitCode::SUCCESS;
    }
    let mut report = Report::new(gpu.clone(), ceilings, options.parts.clone(), options.markdown);
    let (models, batches): (&[Shape], &[(usize, usize)]) =
        if options.emulate { (&TINY, &[(2, 9)]) } else { (&MODELS, &[(8, 512), (16, 2048)]) };
    let titles = models.iter().flat_map(|shape| batches.iter().map(move |batch| title(shape, batch)));
    let whole: Vec<String> = titles.filter(|title| options.parts.iter().any(|part| title.contains(part))).collect();
    let mut code = ExitCode::SUCCESS;
    for shape in models {
        for batch in batches {
            let title = title(shape, batch);
            // A shape that a part names is not built for others to be left out.
            if !whole.is_empty() && !whole.contains(&title) {
                continue;
            }
            report.title(&title);
            let &(rows, length) = batch;
            // Full memory unwinds as a device fault; the next shape may fit.
            let run = AssertUnwindSafe(|| layer::run(&mut report, &gpu, shape, &vec![length; rows]));
            if let Err(payload) = catch_unwind(run) {
                println!("\ngave up: {}", fault(payload));
                code = ExitCode::FAILURE;
            }
        }
    }
    report.judge_choices();
    code
}

fn title(shape: &Shape, &(rows, length): &(usize, usize)) -> String {
    format!("{}, {rows} x {length} tokens", shape.model)
}

/// The device fault of a panic; any other panic goes on.
fn fault(payload: Box<dyn std::any::Any + Send>) -> Box<DeviceFault> {
    payload.downcast().unwrap_or_else(|payload| std::panic::resume_unwind(payload))
}
