//! Every kernel compiles for sm_80 and sm_90a. This needs NVRTC, but no GPU.

use crate::nvidia;
use moewarden::backend::cuda::gpu::{Module, SourceFile};
use moewarden::backend::cuda::kernels::MODULES;
use moewarden::backend::cuda::nvidia::library::Library;
use moewarden::backend::cuda::nvidia::{Nvrtc, options};
use rayon::prelude::*;

/// A100 and H100.
const ARCHITECTURES: [u32; 2] = [80, 90];

/// Bytes of register spills allowed per thread: a few values that are live across a loop.
const MOST_SPILLED: usize = 32;

fn nvrtc(what: &str) -> Option<Nvrtc> {
    let library = nvidia::library(Library::Nvrtc, what)?;
    Some(Nvrtc::new(&library).unwrap())
}

/// What the assembler reports about a kernel.
#[derive(Debug, Default, PartialEq)]
struct Usage {
    kernel: String,
    registers: usize,
    spilled: usize,
}

/// Parses the output of the assembler's `-v`: a line that names the kernel, then lines with its numbers.
fn usages(log: &str) -> Vec<Usage> {
    let number_before = |line: &str, unit: &str| -> Option<usize> {
        line[..line.find(unit)?].split_whitespace().next_back()?.parse().ok()
    };
    let mut found: Vec<Usage> = Vec::new();
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let kernel = rest.split('\'').next().unwrap_or_default().to_owned();
            found.push(Usage { kernel, ..Usage::default() });
        }
        let Some(usage) = found.last_mut() else { continue };
        usage.spilled += number_before(line, "bytes spill stores").unwrap_or(0);
        usage.registers = number_before(line, "registers").unwrap_or(usage.registers);
    }
    found
}

#[test]
fn every_kernel_compiles_for_a100_and_h100() {
    let Some(nvrtc) = nvrtc("the compilation of the kernels") else { return };
    let of = |sm| MODULES.iter().filter(move |module| module.runs_on(sm)).map(move |&module| (sm, module));
    let jobs: Vec<_> = ARCHITECTURES.into_iter().flat_map(of).collect();
    let compiled: Vec<_> = jobs
        .par_iter()
        .map(|&(sm, module)| {
            let options = [options(sm), vec!["--ptxas-options=-v".into()]].concat();
            nvrtc.compile(module, &options)
        })
        .collect();

    let mut wrong = Vec::new();
    for ((sm, module), compiled) in jobs.into_iter().zip(compiled) {
        let file = format!("kernels/{}.cu {}", module.stem, options(sm)[0]);
        let compiled = match compiled {
            Ok(compiled) => compiled,
            Err(error) => {
                wrong.push(format!("{file}: {error}"));
                continue;
            }
        };
        // The assembler reports serialized wgmma only as an "info".
        if ["warning", "serialized"].iter().any(|word| compiled.log.contains(word)) {
            wrong.push(format!("{file}: {}", compiled.log));
        }
        let usages = usages(&compiled.log);
        if usages.is_empty() || usages.iter().any(|usage| usage.registers == 0) {
            wrong.push(format!("{file}: the assembler tells nothing about registers: {}", compiled.log));
        }
        let spills = usages.iter().filter(|usage| usage.spilled > MOST_SPILLED);
        wrong.extend(spills.map(|usage| format!("{file}: {} spills {} bytes", usage.kernel, usage.spilled)));
        for usage in &usages {
            assert!(contains(&compiled.cubin, usage.kernel.as_bytes()), "{file}: {} is not in it", usage.kernel);
        }
        let registers = usages.iter().map(|usage| usage.registers).max().unwrap_or(0);
        let spilled = usages.iter().map(|usage| usage.spilled).max().unwrap_or(0);
        let most = format!("at most {registers} registers and {spilled} bytes spilled");
        nvidia::say(&format!("{file}: {} kernels, {most}", usages.len()));
    }
    nvidia::say(&format!("compiled by {nvrtc}"));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

#[test]
fn what_does_not_compile_is_named_with_file_and_cause() {
    let Some(nvrtc) = nvrtc("the compiler's messages") else { return };
    const BROKEN: &[SourceFile] =
        &[SourceFile { name: "broken.cu", text: "// line 1\nKERNEL(32, broken, (float* x)) { *x = no_such_name; }" }];
    let module = Module { stem: "broken", files: BROKEN, only: None };
    let error = nvrtc.compile(&module, &options(90)).err().expect("it names what does not exist").to_string();
    for part in ["kernels/broken.cu", "broken.cu(2)", "no_such_name", "NVRTC"] {
        assert!(error.contains(part), "{part} is not in: {error}");
    }
    const FINE: &[SourceFile] = &[SourceFile { name: "fine.cu", text: "KERNEL(32, fine, (float* x)) { *x = 1.0f; }" }];
    let module = Module { stem: "fine", files: FINE, only: None };
    let error = nvrtc.compile(&module, &options(3)).err().expect("there is no such GPU").to_string();
    assert!(error.contains("sm_3"), "{error}");
}

#[test]
fn the_assemblers_words_are_understood() {
    let log = "ptxas info    : 8 bytes gmem\n\
               ptxas info    : Compiling entry function 'add_f32' for 'sm_90a'\n\
               ptxas         .     0 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n\
               ptxas info    : Used 24 registers, used 0 barriers\n\
               ptxas info    : Compiling entry function 'add_bf16' for 'sm_90a'\n\
               ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
               ptxas info    : Used 8 registers\n";
    let usage = |kernel: &str, registers, spilled| Usage { kernel: kernel.into(), registers, spilled };
    assert_eq!(usages(log), [usage("add_f32", 24, 12), usage("add_bf16", 8, 0)]);
}
