//! Chooses the form, that is the implementation, of a product: pure functions of its shape, which can be printed and
//! tested.

use std::fmt;

use super::gpu::Architecture;
use crate::backend::Dtype;

/// What is computed of groups of rows and their groups' weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// The product, or the gradient of its input.
    Product,
    /// Gradients of weights, added to those of earlier passes.
    Gradients,
    /// Gradients of weights, each reduced to one number.
    Scores,
}

/// The shape of a grouped product (groups of rows times their groups' weights), or of its gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grouped {
    /// What is computed.
    pub operation: Operation,
    /// Rows of all groups together.
    pub rows: usize,
    /// Number of groups. Only the GPU knows how many rows each one has.
    pub groups: usize,
    /// Columns of a weight.
    pub inputs: usize,
    /// Rows of a weight.
    pub outputs: usize,
    /// Number format of the activations.
    pub dtype: Dtype,
}

/// The implementations of grouped products.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// One cuBLAS product per group. It needs the number of rows of each group on the host, so the first such product
    /// of a dispatch waits for the GPU.
    EachGroup,
    /// One kernel over all groups on tensor cores, by `mma.sync`.
    TensorCores,
    /// One kernel over all groups on tensor cores, by `wgmma`, which GPUs of compute capability 9.0 have, in tiles of 128 x
    /// 128: two blocks share a multiprocessor.
    Warpgroups,
    /// The same in tiles of 128 x 256: a third more FLOP for each byte loaded, but one block a multiprocessor.
    WideWarpgroups,
    /// One kernel over all groups, by ordinary arithmetic.
    Arithmetic,
}

/// The FLOP per group from which one cuBLAS call per group is preferred to the `mma.sync` kernel: such a product keeps
/// the whole GPU busy for longer than its launch takes (some 15 µs), so that the faster inner loop of cuBLAS pays. An
/// estimate, not a measurement.
const WORTH_A_LAUNCH: u64 = 10_000_000_000;
/// The same threshold against the `wgmma` kernel: a group's product then fills a GPU of 132 multiprocessors about once
/// by itself (128 tiles of 128 x 256 for 4,096 rows of OLMoE-1B-7B). An estimate, too.
const WORTH_A_LAUNCH_WARPGROUPS: u64 = 12_000_000_000;
/// The same threshold for gradients against the `wgmma` kernel: they are products over few rows, which cuBLAS computes with
/// less of an advantage.
const WORTH_A_LAUNCH_GRADIENTS: u64 = 40_000_000_000;
/// The rows of a group from which its scores may be computed by cuBLAS at all, against the `wgmma` kernel: products of slabs
/// of the gradient, each of which is written and read again, so that it must be a sum over many rows. An estimate, too.
const WORTH_SLABS: u64 = 4096;
/// The rows of a group from which scores are computed in wide tiles: with fewer, a block spends more time on its first copies
/// and its reduction than on products, and nothing else runs on its multiprocessor meanwhile. An estimate.
const WORTH_WIDE_SCORES: u64 = 512;
/// The same threshold for F32, where the grouped kernel does not use tensor cores.
const WORTH_A_LAUNCH_F32: u64 = 500_000_000;

impl Grouped {
    /// Rows of a group, if all have the same number.
    fn rows_of_group(&self) -> u64 {
        self.rows.div_ceil(self.groups.max(1)) as u64
    }

    /// Multiplications and additions of one group's product with one weight, if all groups have the same size.
    pub fn work(&self) -> u64 {
        2 * self.rows_of_group() * self.inputs as u64 * self.outputs as u64
    }

    /// The form for this shape. A single group needs no sizes from the GPU; a few large groups are fastest in cuBLAS;
    /// many small groups fill the GPU only together.
    pub fn form(&self, architecture: Architecture) -> Form {
        // Operands of tensor cores are copied in chunks of 8 elements, which must not cross the end of a row.
        let whole_chunks = self.inputs.is_multiple_of(8) && self.outputs.is_multiple_of(8);
        let together = match architecture.sm {
            90 if self.dtype == Dtype::Bf16 && whole_chunks => match self.operation {
                Operation::Scores if self.rows_of_group() < WORTH_WIDE_SCORES => Form::Warpgroups,
                _ => Form::WideWarpgroups,
            },
            80.. if self.dtype == Dtype::Bf16 && whole_chunks => Form::TensorCores,
            _ => Form::Arithmetic,
        };
        let threshold = match (together, self.operation) {
            (Form::Warpgroups | Form::WideWarpgroups, Operation::Scores) if self.rows_of_group() < WORTH_SLABS => {
                u64::MAX
            }
            (Form::Warpgroups | Form::WideWarpgroups, Operation::Scores) => WORTH_A_LAUNCH_GRADIENTS,
            (Form::WideWarpgroups, Operation::Gradients) => WORTH_A_LAUNCH_GRADIENTS,
            (Form::WideWarpgroups, Operation::Product) => WORTH_A_LAUNCH_WARPGROUPS,
            _ if self.dtype == Dtype::Bf16 => WORTH_A_LAUNCH,
            _ => WORTH_A_LAUNCH_F32,
        };
        if self.groups <= 1 || self.work() >= threshold { Form::EachGroup } else { together }
    }
}

/// The implementations of attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttentionForm {
    /// On tensor cores, compiled for heads of at most this width.
    TensorCores(usize),
    /// By ordinary arithmetic.
    Arithmetic,
}

/// The form for heads of width `dim`. On tensor cores rows are copied in chunks of 8 elements; there are kernels for
/// two widths.
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
            Form::Warpgroups => "one kernel for all groups on tensor cores (wgmma, 128 columns)",
            Form::WideWarpgroups => "one kernel for all groups on tensor cores (wgmma, 256 columns)",
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
        form_of(Operation::Product, rows, groups, [inputs, outputs], dtype, sm)
    }

    fn form_of(operation: Operation, rows: usize, groups: usize, size: [usize; 2], dtype: Dtype, sm: u32) -> Form {
        let architecture = Architecture { sm, processors: 132, shared: 227 * 1024 };
        Grouped { operation, rows, groups, inputs: size[0], outputs: size[1], dtype }.form(architecture)
    }

    #[test]
    fn forms_of_known_models() {
        // 4,096 and 32,768 tokens of OLMoE-1B-7B, Qwen3-30B-A3B and Mixtral-8x7B.
        for tokens in [4096, 32768] {
            assert_eq!(form(tokens * 8, 128, 2048, 768, Dtype::Bf16, 80), Form::TensorCores);
            assert_eq!(form(tokens * 8, 128, 2048, 768, Dtype::Bf16, 90), Form::WideWarpgroups);
            assert_eq!(form(tokens * 2, 8, 4096, 14336, Dtype::Bf16, 90), Form::EachGroup);
        }
        assert_eq!(form(4096 * 8, 64, 2048, 1024, Dtype::Bf16, 90), Form::WideWarpgroups);
        assert_eq!(form(32768 * 8, 64, 2048, 1024, Dtype::Bf16, 90), Form::EachGroup, "17 GFLOP a group");
        assert_eq!(form(32768 * 8, 64, 2048, 1024, Dtype::Bf16, 80), Form::EachGroup);
        assert_eq!(form(4096, 1, 2048, 5632, Dtype::Bf16, 90), Form::EachGroup);
    }

    #[test]
    fn scores_over_few_rows_are_computed_by_one_kernel_and_large_gradients_by_the_library() {
        // Mixtral-8x7B, 1,024 and 8,192 rows a group, 120 and 962 GFLOP.
        for (tokens, scores) in [(4096, Form::WideWarpgroups), (32768, Form::EachGroup)] {
            let mixtral = |operation, sm| form_of(operation, tokens * 2, 8, [4096, 14336], Dtype::Bf16, sm);
            assert_eq!(mixtral(Operation::Scores, 90), scores);
            assert_eq!(mixtral(Operation::Scores, 80), Form::EachGroup);
            assert_eq!(mixtral(Operation::Gradients, 90), Form::EachGroup);
        }
        // OLMoE-1B-7B, 17 GFLOP.
        let olmoe = |operation| form_of(operation, 32768 * 8, 64, [2048, 1024], Dtype::Bf16, 90);
        assert_eq!([olmoe(Operation::Scores), olmoe(Operation::Gradients)], [Form::WideWarpgroups; 2]);
        // Qwen3-30B-A3B: 256 rows a group of 4,096 tokens.
        let qwen = |tokens: usize| form_of(Operation::Scores, tokens * 8, 128, [2048, 768], Dtype::Bf16, 90);
        assert_eq!([qwen(4096), qwen(32768)], [Form::Warpgroups, Form::WideWarpgroups]);
    }

    #[test]
    fn tensor_cores_need_bf16_whole_chunks_and_ampere() {
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
        let operation = Operation::Product;
        let shape = Grouped { operation, rows: 32768, groups: 64, inputs: 2048, outputs: 1024, dtype: Dtype::Bf16 };
        assert_eq!(shape.to_string(), "32768 rows in 64 groups, weights [1024, 2048] in Bf16, 2.15 GFLOP a group");
        let architecture = Architecture { sm: 90, processors: 132, shared: 227 * 1024 };
        assert_eq!(
            shape.form(architecture).to_string(),
            "one kernel for all groups on tensor cores (wgmma, 256 columns)"
        );
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
