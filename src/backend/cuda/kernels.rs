//! The kernels: their sources, embedded in the program, and their signatures.

use half::{bf16, f16};

use super::Cuda;
use super::gpu::{Grid, Kernel, Module, SourceFile};
use super::launch::{
    Addresses, Argument, Declaration, Declared, Element, In, InOut, Named, Number, OrNull, Out, Targets, kernels,
    select,
};
use super::plan::{AttentionForm, Form};
use crate::backend::Dtype;

macro_rules! source {
    ($file:expr) => {
        SourceFile { name: $file, text: include_str!(concat!("../../../kernels/", $file)) }
    };
}

/// `NAME = "stem";` is `kernels/stem.cu`; `NAME = "stem": "file", ..;` are several files of `kernels/`, one after
/// another. `for sm`: only for GPUs of that compute capability.
macro_rules! modules {
    ($($name:ident = $stem:literal $(for $sm:literal)? $(: $($file:literal),+)?;)*) => {
        $(static $name: Module = Module { stem: $stem, files: files!($stem $(, $($file),+)?), only: only!($($sm)?) };)*

        /// All modules.
        pub static MODULES: &[&Module] = &[$(&$name),*];
    };
}

macro_rules! only {
    () => {
        None
    };
    ($sm:literal) => {
        Some($sm)
    };
}

macro_rules! files {
    ($stem:literal) => {
        &[source!(concat!($stem, ".cu"))]
    };
    ($stem:literal, $($file:literal),+) => {
        &[$(source!($file)),+]
    };
}

/// The file that comes first in every module.
pub const COMMON: SourceFile = source!("common.cuh");

modules! {
    ATTENTION_MMA = "attention_mma": "groups.cuh", "mma.cuh", "attention.cuh", "attention_mma.cu";
    ATTENTION = "attention": "groups.cuh", "attention.cuh", "attention.cu";
    COLUMNS = "columns";
    CROSS_ENTROPY = "cross_entropy": "softmax.cuh", "cross_entropy.cu";
    DISPATCH = "dispatch";
    ELEMENTS = "elements";
    GRADIENT_MAGNITUDE = "gradient_magnitude": "tile.cuh", "tile_simt.cuh", "gradient_magnitude.cu";
    GRADIENT_MAGNITUDE_MMA = "gradient_magnitude_mma": "mma.cuh", "tile.cuh", "pipeline.cuh", "tile_mma.cuh", "gradient_magnitude.cu";
    GRADIENT_MAGNITUDE_WGMMA = "gradient_magnitude_wgmma" for 90: "mma.cuh", "wgmma_layout.cuh", "wgmma.cuh", "tile.cuh", "pipeline.cuh",
        "tile_wgmma.cuh", "gradient_magnitude.cu";
    GROUPED = "grouped": "groups.cuh", "tile.cuh", "tile_simt.cuh", "grouped.cu";
    GROUPED_MMA = "grouped_mma": "groups.cuh", "mma.cuh", "tile.cuh", "pipeline.cuh", "tile_mma.cuh", "grouped.cu";
    GROUPED_WGMMA = "grouped_wgmma" for 90: "groups.cuh", "mma.cuh", "wgmma_layout.cuh", "wgmma.cuh", "tile.cuh", "pipeline.cuh", "tile_wgmma.cuh",
        "grouped.cu";
    GRADIENT_MAGNITUDE_WIDE = "gradient_magnitude_wide" for 90: "mma.cuh", "wide_tile.cuh", "wgmma_layout.cuh", "wgmma.cuh", "tile.cuh",
        "pipeline.cuh", "tile_wgmma.cuh", "gradient_magnitude.cu";
    GROUPED_WIDE = "grouped_wide" for 90: "groups.cuh", "mma.cuh", "wide_tile.cuh", "wgmma_layout.cuh", "wgmma.cuh", "tile.cuh",
        "pipeline.cuh", "tile_wgmma.cuh", "grouped.cu";
    KL = "kl": "softmax.cuh", "kl.cu";
    NORM = "norm";
    NORM_ROPE = "norm_rope";
    ROPE = "rope";
    ROUTE = "route";
    ROWS = "rows";
    STATISTICS = "statistics": "softmax.cuh", "statistics.cu";
    SWIGLU = "swiglu";
    UPDATE = "update";
}

/// The text of a module, as it is compiled. Compiler messages name each file and count its own lines.
pub fn source(module: &Module) -> String {
    let mut text = format!("// module {}\n", module.stem);
    for file in std::iter::once(&COMMON).chain(module.files) {
        text += &format!("#line 1 \"{}\"\n{}\n", file.name, file.text);
    }
    text
}

kernels! {
    // elements.cu
    fn add<T>(x: InOut<T>, y: In<T>, n: usize),
    fn clamp<T>(x: InOut<T>, n: usize, limit: f32),
    fn clamp_backward<T>(dy: InOut<T>, y: In<T>, n: usize, limit: f32),
    fn repeat_row<T>(x: In<T>, y: Out<T>, cols: usize),
    fn cast_f32_bf16(from: In<f32>, to: Out<bf16>, n: usize),
    fn cast_f32_f16(from: In<f32>, to: Out<f16>, n: usize),
    fn cast_bf16_f32(from: In<bf16>, to: Out<f32>, n: usize),
    fn cast_bf16_f16(from: In<bf16>, to: Out<f16>, n: usize),
    fn cast_f16_f32(from: In<f16>, to: Out<f32>, n: usize),
    fn cast_f16_bf16(from: In<f16>, to: Out<bf16>, n: usize),
    fn split_f32(x: In<f32>, y: Out<bf16>, cols: usize, n: usize),
    fn random_f32(to: Out<f32>, n: usize, seed: u64, step: f32),
    fn random_bf16(to: Out<bf16>, n: usize, seed: u64, step: f32),
    fn random_f16(to: Out<f16>, n: usize, seed: u64, step: f32)
    in ELEMENTS;

    // columns.cu
    fn column_sums<T>(dy: In<T>, x: OrNull<In<T>>, r: OrNull<In<f32>>, partial: Out<f32>, rows: usize, cols: usize,
        lanes: u32, chunk: u32),
    fn add_partials(into: InOut<f32>, partial: In<f32>, parts: usize, cols: usize)
    in COLUMNS;

    // rows.cu
    fn gather_rows(x: In<u8>, index: In<u32>, divide: u32, y: Out<u8>, bytes: usize),
    fn write_rows(x: InOut<u8>, index: In<u32>, y: In<u8>, bytes: usize),
    fn add_rows<T>(x: InOut<T>, index: In<u32>, y: In<T>, cols: usize),
    fn embedding_backward<T>(dy: In<T>, ids: In<u32>, order: In<u32>, starts: In<u32>, dw: InOut<f32>, cols: usize),
    fn fill_columns<T>(x: InOut<T>, columns: In<u32>, count: usize, cols: usize, value: f32)
    in ROWS;

    // norm.cu
    fn rms_norm<T>(x: In<T>, w: In<T>, y: Out<T>, groups: usize, n: usize, eps: f32),
    fn add_rms_norm<T>(x: InOut<T>, added: In<T>, w: In<T>, y: Out<T>, groups: usize, n: usize, eps: f32),
    fn rms_norm_backward<T>(dy: In<T>, x: In<T>, w: In<T>, dx: Out<T>, rs: OrNull<Out<f32>>, groups: usize, n: usize,
        eps: f32),
    fn add_rms_norm_backward<T>(dy: In<T>, x: In<T>, w: In<T>, dx: InOut<T>, rs: OrNull<Out<f32>>, groups: usize, n: usize,
        eps: f32)
    in NORM;

    // norm_rope.cu
    fn rms_norm_rope<T>(x: In<T>, w: In<T>, y: Out<T>, eps: f32, positions: In<u32>, cosines: In<f32>, sines: In<f32>,
        heads: u32, heads_per_row: u32, half: u32),
    fn rms_norm_rope_backward<T>(dy: In<T>, x: In<T>, w: In<T>, dx: Out<T>, eps: f32, positions: In<u32>,
        cosines: In<f32>, sines: In<f32>, heads: u32, heads_per_row: u32, half: u32)
    in NORM_ROPE;

    // rope.cu
    fn rope<T>(x: InOut<T>, positions: In<u32>, cosines: In<f32>, sines: In<f32>, heads: u32, half: u32, direction: f32)
    in ROPE;

    // swiglu.cu
    fn swiglu<T>(gate_up: In<T>, y: Out<T>, f: usize),
    fn swiglu_backward<T>(dy: In<T>, gate_up: In<T>, dx: Out<T>, f: usize),
    fn weighted_swiglu<T>(gate_up: In<T>, weights: In<f32>, slot_of: In<u32>, y: Out<T>, f: usize),
    fn weighted_swiglu_backward<T>(dy: In<T>, gate_up: In<T>, weights: In<f32>, slot_of: In<u32>, dx: Out<T>,
        dweights: Out<f32>, f: usize),
    fn sigmoid_gate<T>(x: In<T>, gate: In<T>, y: Out<T>, d: usize),
    fn sigmoid_gate_backward<T>(dy: In<T>, x: In<T>, gate: In<T>, dx: Out<T>, dgate: Out<T>, d: usize)
    in SWIGLU;

    // attention.cu, attention_mma.cu
    fn attention<T>(y: Out<T>, normaliser: Out<f32>, q: In<T>, k: In<T>, v: In<T>, queries: In<u32>, keys: In<u32>,
        sequences: usize, heads: usize, key_heads: usize, dim: usize, window: u64),
    fn attention_backward_queries<T>(dq: Out<T>, delta: Out<f32>, normaliser: In<f32>, dy: In<T>, q: In<T>, k: In<T>,
        v: In<T>, y: In<T>, queries: In<u32>, keys: In<u32>, sequences: usize, heads: usize, key_heads: usize, dim: usize,
        window: u64),
    fn attention_backward_keys<T>(dk: Out<T>, dv: Out<T>, normaliser: In<f32>, delta: In<f32>, dy: In<T>, q: In<T>,
        k: In<T>, v: In<T>, queries: In<u32>, keys: In<u32>, sequences: usize, heads: usize, key_heads: usize, dim: usize,
        window: u64)
    in {
        form: AttentionForm,
        AttentionForm::Arithmetic => ATTENTION { "_f32": f32, "_bf16": bf16 },
        AttentionForm::TensorCores(64) => ATTENTION_MMA { "_64": bf16 },
        AttentionForm::TensorCores(128) => ATTENTION_MMA { "_128": bf16 },
    };

    // route.cu
    fn route(logits: In<f32>, ids: Out<u32>, weights: Out<f32>, probabilities: Out<f32>, tokens: usize, experts: u32,
        top_k: u32, renormalize: bool),
    fn route_backward(dweights: In<f32>, ids: In<u32>, weights: In<f32>, probabilities: In<f32>, dlogits: Out<f32>,
        tokens: usize, experts: u32, top_k: u32, renormalize: bool),
    fn zero_weights(ids: In<u32>, weights: InOut<f32>, experts: In<u32>, slots: usize, count: usize)
    in ROUTE;

    // dispatch.cu
    fn dispatch_count(ids: In<u32>, counts: Out<u32>, slots: usize, experts: u32),
    fn dispatch_scan_chunks(counts: InOut<u32>, totals: Out<u32>, chunks: u32),
    fn dispatch_scan_experts(offsets: InOut<u32>, experts: u32),
    fn dispatch_place(ids: In<u32>, counts: In<u32>, offsets: In<u32>, row_of: Out<u32>, slot_of: Out<u32>, slots: usize),
    fn combine_rows<T>(x: In<T>, row_of: In<u32>, y: Out<T>, top_k: u32, cols: usize),
    fn combine_rows_onto<T>(x: In<T>, row_of: In<u32>, shared: OrNull<In<T>>, gate: OrNull<In<T>>, residual: In<T>,
        y: Out<T>, top_k: u32, cols: usize)
    in DISPATCH;

    // grouped.cu
    fn grouped_linear<T>(y: Out<T>, x: In<T>, weights: In<Addresses<T>>, offsets: In<u32>, groups: usize, stack: usize,
        inputs: usize, outputs: usize),
    fn grouped_backward_input<T>(dx: Out<T>, dy: In<T>, weights: In<Addresses<T>>, offsets: In<u32>, groups: usize,
        stack: usize, inputs: usize, outputs: usize),
    fn grouped_backward_weight<T>(dw: InOut<f32>, dy: In<T>, x: In<T>, offsets: In<u32>, jobs: In<u64>, stack: usize,
        inputs: usize, outputs: usize, overwrite: bool)
    in {
        form: Form,
        Form::Arithmetic => GROUPED { "_f32": f32, "_bf16": bf16 },
        Form::TensorCores => GROUPED_MMA { "_bf16": bf16 },
        Form::Warpgroups => GROUPED_WGMMA { "_bf16": bf16 },
        Form::WideWarpgroups => GROUPED_WIDE { "_bf16": bf16 },
    };

    // gradient_magnitude.cu
    fn gradient_magnitude<T>(partial: Out<f64>, dy: In<T>, x: In<T>, weights: In<Addresses<T>>, offsets: In<u32>,
        jobs: In<u64>, stack: usize, inputs: usize, outputs: usize)
    in {
        form: Form,
        Form::Arithmetic => GRADIENT_MAGNITUDE { "_f32": f32, "_bf16": bf16 },
        Form::TensorCores => GRADIENT_MAGNITUDE_MMA { "_bf16": bf16 },
        Form::Warpgroups => GRADIENT_MAGNITUDE_WGMMA { "_bf16": bf16 },
        Form::WideWarpgroups => GRADIENT_MAGNITUDE_WIDE { "_bf16": bf16 },
    };
    fn magnitude_of<T>(partial: Out<f64>, gradient: In<f32>, w: In<T>, n: usize, moment: u64),
    fn add_magnitudes(scores: InOut<f64>, partial: In<f64>, jobs: In<u64>, n: usize)
    in GRADIENT_MAGNITUDE;

    // cross_entropy.cu
    fn cross_entropy<T>(logits: In<f32>, targets: In<u32>, losses: Out<f64>, grad: OrNull<Out<T>>, classes: usize,
        stride: usize, scale: f32),
    fn greedy(logits: In<f32>, targets: In<u32>, greedy: Out<u32>, classes: usize, stride: usize)
    in CROSS_ENTROPY;

    // kl.cu
    fn linear_kl<T>(logits: In<f32>, base: In<f32>, kl: Out<f64>, same: Out<f64>, grad: OrNull<Out<T>>, classes: usize,
        stride: usize, scale: f32),
    fn softmax_kl(logits: In<f32>, base: In<f32>, kl: Out<f64>, rows: usize, cols: usize),
    fn softmax_kl_backward(base: In<f32>, logits: In<f32>, dlogits: InOut<f32>, rows: usize, cols: usize, scale: f32)
    in KL;

    // statistics.cu
    fn sum_rows(x: In<f32>, partial: Out<f64>, rows: usize, cols: usize, softmax: bool),
    fn sum_partials(partial: In<f64>, out: Out<f64>, parts: usize, cols: usize),
    fn softmax_sum_backward(dy: In<f32>, logits: In<f32>, dlogits: InOut<f32>, rows: usize, cols: usize),
    fn segment_sum_backward<T>(dy: In<f32>, dx: InOut<T>, cols: usize)
    in STATISTICS;

    // update.cu
    fn adamw(master: InOut<f32>, m: InOut<f32>, v: InOut<f32>, grad: In<f32>, n: usize, grad_scale: f32,
        one_minus_beta1: f32, beta2: f32, one_minus_beta2: f32, decay: f32, step_size: f32, bias_correction2_sqrt: f32,
        eps: f32),
    fn adamw_weights<T>(master: InOut<f32>, m: InOut<f32>, v: InOut<f32>, grad: In<f32>, weights: In<Targets<T>>,
        jobs: In<u64>, n: usize, grad_scale: f32, one_minus_beta1: f32, beta2: f32, one_minus_beta2: f32, decay: f32,
        step_size: f32, bias_correction2_sqrt: f32, eps: f32),
    fn sums_of_squares(x: In<f32>, jobs: In<u64>, partial: Out<f64>, n: usize),
    fn totals_of_parts(partial: In<f64>, jobs: In<u64>, out: Out<f64>),
    fn total(values: In<f64>, out: Out<f64>, n: usize)
    in UPDATE;
}
