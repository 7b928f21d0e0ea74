//! Which form of a product to take: pure functions of its shape, so that what runs can be read, printed and tested.

use std::fmt;

use super::gpu::Architecture;
use crate::backend::Dtype;

/// Products of groups of rows with their groups' weights, or the gradients of these.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grouped {
    /// Rows of all groups together.
    pub rows: usize,
    /// How many groups there are; how many rows each has, only the GPU knows.
    pub groups: usize,
    /// Columns of a weight.
    pub inputs: usize,
    /// Rows of a weight.
    pub outputs: usize,
    /// Type of the activations.
    pub dtype: Dtype,
}

/// How grouped products are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// One product of the vendor's library a group. It must know how many rows each group has, so the first such product
    /// of a dispatch waits for the GPU.
    EachGroup,
    /// One kernel over all groups, on tensor cores, warp by warp (`mma.sync`).
    TensorCores,
    /// The same by products of whole warpgroups (`wgmma`), which GPUs of compute capability 9.0 have.
    Warpgroups,
    /// One kernel over all groups, by ordinary arithmetic.
    Arithmetic,
}

/// Work of one group's product, in floating-point operations, from which it keeps the whole GPU busy for longer than a launch
/// takes (some 15 µs), so that the library's faster inner loop pays. An estimate, not a measurement.
const WORTH_A_LAUNCH: u64 = 10_000_000_000;
/// The same beside products of warpgroups, whose inner loop is nearer to the library's: only where the wait for the counts is lost
/// in the work of a layer.
const WORTH_A_LAUNCH_WARPGROUPS: u64 = 40_000_000_000;
/// The same for F32, where the grouped kernel is ordinary arithmetic.
const WORTH_A_LAUNCH_F32: u64 = 500_000_000;

impl Grouped {
    /// Multiplications and additions of one group's product with one weight, were all groups of one size.
    pub fn work(&self) -> u64 {
        2 * self.rows.div_ceil(self.groups.max(1)) as u64 * self.inputs as u64 * self.outputs as u64
    }

    /// The form for this shape. A single group needs no counts; few large ones are done best by the library; many small
    /// ones only fill the GPU together.
    pub fn form(&self, architecture: Architecture) -> Form {
        // Tensor cores are fed in pieces of 8 numbers, which must not cross a row's end.
        let whole_pieces = self.inputs.is_multiple_of(8) && self.outputs.is_multiple_of(8);
        let together = match architecture.sm {
            90 if self.dtype == Dtype::Bf16 && whole_pieces => Form::Warpgroups,
            80.. if self.dtype == Dtype::Bf16 && whole_pieces => Form::TensorCores,
            _ => Form::Arithmetic,
        };
        let threshold = match together {
            Form::Warpgroups => WORTH_A_LAUNCH_WARPGROUPS,
            _ if self.dtype == Dtype::Bf16 => WORTH_A_LAUNCH,
            _ => WORTH_A_LAUNCH_F32,
        };
        if self.groups <= 1 || self.work() >= threshold { Form::EachGroup } else { together }
    }
}

/// How attention is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionForm {
    /// On tensor cores, compiled for heads of at most this width.
    TensorCores(usize),
    /// By ordinary arithmetic.
    Arithmetic,
}

/// The form for heads of width `dim`: tensor cores are fed in pieces of 8 numbers, and compiled for two widths.
pub fn attention(dim: usize, dtype: Dtype, architecture: Architecture) -> AttentionForm {
    match dim {
        1..=128 if dtype == Dtype::Bf16 && architecture.sm >= 80 && dim.is_multiple_of(8) => {
            AttentionForm::TensorCores(if dim <= 64 { 64 } else { 128 })
        }
        _ => AttentionForm::Arithmetic,
    }
}

impl fmt::Display for Grouped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} rows in {} groups, weights [{}, {}] in {:?}, {:.2} GFLOP a group",
            self.rows,
            self.groups,
            self.outputs,
            self.inputs,
            self.dtype,
            self.work() as f64 / 1e9
        )
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Form::EachGroup => "a library product for each group",
            Form::TensorCores => "one kernel for all groups on tensor cores (mma.sync)",
            Form::Warpgroups => "one kernel for all groups on tensor cores (wgmma)",
            Form::Arithmetic => "one kernel for all groups by ordinary arithmetic",
        })
    }
}

impl fmt::Display for AttentionForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AttentionForm::TensorCores(width) => write!(f, "tensor cores, heads in {width} columns"),
            AttentionForm::Arithmetic => f.write_str("ordinary arithmetic"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(rows: usize, groups: usize, inputs: usize, outputs: usize, dtype: Dtype, sm: u32) -> Form {
        let architecture = Architecture { sm, processors: 132, shared: 227 * 1024 };
        Grouped { rows, groups, inputs, outputs, dtype }.form(architecture)
    }

    #[test]
    fn forms_of_known_models() {
        // 4,096 and 32,768 tokens of OLMoE-1B-7B, Qwen3-30B-A3B and Mixtral-8x7B.
        for tokens in [4096, 32768] {
            assert_eq!(form(tokens * 8, 128, 2048, 768, Dtype::Bf16, 80), Form::TensorCores);
            assert_eq!(form(tokens * 8, 128, 2048, 768, Dtype::Bf16, 90), Form::Warpgroups);
            assert_eq!(form(tokens * 2, 8, 4096, 14336, Dtype::Bf16, 90), Form::EachGroup);
        }
        assert_eq!(form(4096 * 8, 64, 2048, 1024, Dtype::Bf16, 90), Form::Warpgroups);
        assert_eq!(form(32768 * 8, 64, 2048, 1024, Dtype::Bf16, 90), Form::Warpgroups);
        assert_eq!(form(32768 * 8, 64, 2048, 1024, Dtype::Bf16, 80), Form::EachGroup);
        assert_eq!(form(4096, 1, 2048, 5632, Dtype::Bf16, 90), Form::EachGroup);
    }

    #[test]
    fn tensor_cores_want_bf16_whole_pieces_and_ampere() {
        assert_eq!(form(64, 4, 32, 16, Dtype::Bf16, 80), Form::TensorCores);
        assert_eq!(form(64, 4, 32, 16, Dtype::Bf16, 100), Form::TensorCores);
        assert_eq!(form(64, 4, 32, 16, Dtype::Bf16, 75), Form::Arithmetic);
        assert_eq!(form(64, 4, 33, 16, Dtype::Bf16, 90), Form::Arithmetic);
        assert_eq!(form(64, 4, 32, 12, Dtype::Bf16, 90), Form::Arithmetic);
        assert_eq!(form(64, 4, 32, 16, Dtype::F32, 90), Form::Arithmetic);
        assert_eq!(form(32768, 64, 2048, 1024, Dtype::F32, 90), Form::EachGroup);
        assert_eq!(form(0, 0, 8, 8, Dtype::Bf16, 90), Form::EachGroup);
    }

    #[test]
    fn choices_are_printed() {
        let shape = Grouped { rows: 32768, groups: 64, inputs: 2048, outputs: 1024, dtype: Dtype::Bf16 };
        assert_eq!(shape.to_string(), "32768 rows in 64 groups, weights [1024, 2048] in Bf16, 2.15 GFLOP a group");
        let architecture = Architecture { sm: 90, processors: 132, shared: 227 * 1024 };
        assert_eq!(shape.form(architecture).to_string(), "one kernel for all groups on tensor cores (wgmma)");
    }

    #[test]
    fn attention_by_width() {
        let form = |dim, dtype, sm| attention(dim, dtype, Architecture { sm, processors: 132, shared: 227 * 1024 });
        assert_eq!(form(128, Dtype::Bf16, 90), AttentionForm::TensorCores(128));
        assert_eq!(form(80, Dtype::Bf16, 80), AttentionForm::TensorCores(128));
        assert_eq!(form(64, Dtype::Bf16, 80), AttentionForm::TensorCores(64));
        for other in [(256, Dtype::Bf16, 90), (128, Dtype::F32, 90), (60, Dtype::Bf16, 90), (128, Dtype::Bf16, 75)] {
            assert_eq!(form(other.0, other.1, other.2), AttentionForm::Arithmetic);
        }
        assert_eq!(form(128, Dtype::Bf16, 90).to_string(), "tensor cores, heads in 128 columns");
    }
}
