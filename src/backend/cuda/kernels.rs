//! The sources of the kernels, embedded.

use super::gpu::{Kernel, Module};
use crate::backend::Dtype;

/// What every module is compiled behind.
pub const COMMON: &str = include_str!("../../../kernels/common.cuh");

/// `NAME = "stem";` is `kernels/stem.cu`, `NAME = "stem": "file", ..;` several files of `kernels/` one after another, with
/// `for sm` only for GPUs of that compute capability.
macro_rules! modules {
    ($($name:ident = $stem:literal $(for $sm:literal)? $(: $($file:literal),+)?;)*) => {
        $(pub(super) static $name: Module =
            Module { stem: $stem, source: source!($stem $(, $($file),+)?), only: only!($($sm)?) };)*

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

macro_rules! source {
    ($stem:literal) => {
        include_str!(concat!("../../../kernels/", $stem, ".cu"))
    };
    ($stem:literal, $($file:literal),+) => {
        concat!($(include_str!(concat!("../../../kernels/", $file))),+)
    };
}

modules! {
    ATTENTION_MMA = "attention_mma": "groups.cuh", "mma.cuh", "attention.cuh", "attention_mma.cu";
    ATTENTION = "attention": "groups.cuh", "attention.cuh", "attention.cu";
    COLUMNS = "columns";
    CROSS_ENTROPY = "cross_entropy";
    DISPATCH = "dispatch";
    ELEMENTS = "elements";
    GRADIENT_MAGNITUDE = "gradient_magnitude": "tile.cuh", "tile_simt.cuh", "gradient_magnitude.cu";
    GRADIENT_MAGNITUDE_MMA = "gradient_magnitude_mma": "mma.cuh", "tile.cuh", "stages.cuh", "tile_mma.cuh", "gradient_magnitude.cu";
    GRADIENT_MAGNITUDE_WGMMA = "gradient_magnitude_wgmma" for 90: "mma.cuh", "wgmma.cuh", "tile.cuh", "stages.cuh",
        "tile_wgmma.cuh", "gradient_magnitude.cu";
    GROUPED = "grouped": "groups.cuh", "tile.cuh", "tile_simt.cuh", "grouped.cu";
    GROUPED_MMA = "grouped_mma": "groups.cuh", "mma.cuh", "tile.cuh", "stages.cuh", "tile_mma.cuh", "grouped.cu";
    GROUPED_WGMMA = "grouped_wgmma" for 90: "groups.cuh", "mma.cuh", "wgmma.cuh", "tile.cuh", "stages.cuh", "tile_wgmma.cuh",
        "grouped.cu";
    NORM = "norm";
    ROPE = "rope";
    ROUTE = "route";
    ROWS = "rows";
    STATISTICS = "statistics";
    SWIGLU = "swiglu";
    UPDATE = "update";
}

/// A kernel that exists once for each type of activations: `<name>_f32` and `<name>_bf16`.
pub(super) struct Typed {
    pub(super) f32: Kernel,
    pub(super) bf16: Kernel,
}

impl Typed {
    /// The one for this type. Panics at F16, which no activation has.
    pub(super) fn of(&self, dtype: Dtype) -> &Kernel {
        match dtype {
            Dtype::F32 => &self.f32,
            Dtype::Bf16 => &self.bf16,
            Dtype::F16 => unreachable!("activations are F32 or BF16"),
        }
    }
}

/// `typed!(MODULE, "name")`: the kernels `name_f32` and `name_bf16` of a module.
macro_rules! typed {
    ($module:ident, $name:literal) => {
        $crate::backend::cuda::kernels::Typed {
            f32: $crate::backend::cuda::gpu::Kernel {
                module: &$crate::backend::cuda::kernels::$module,
                name: concat!($name, "_f32"),
            },
            bf16: $crate::backend::cuda::gpu::Kernel {
                module: &$crate::backend::cuda::kernels::$module,
                name: concat!($name, "_bf16"),
            },
        }
    };
}

/// `kernel!(MODULE, "name")`: one kernel of a module.
macro_rules! kernel {
    ($module:ident, $name:expr) => {
        $crate::backend::cuda::gpu::Kernel { module: &$crate::backend::cuda::kernels::$module, name: $name }
    };
}

pub(super) use {kernel, typed};
