//! Dense products by cuBLAS.
//!
//! The functions are documented in the cuBLAS manual, <https://docs.nvidia.com/cuda/cublas/index.html>; the constants
//! are cudarc's, generated from the headers.

use std::ffi::{c_int, c_void};

use cudarc::cublas::sys;

use super::Error;
use super::library::Open;
use crate::backend::Dtype;
use crate::backend::cuda::gpu::{self, Address, Gemm, Operand};

type Handle = *mut c_void;

/// A cuBLAS handle for one stream of one GPU.
pub(super) struct Cublas {
    functions: Functions,
    handle: Handle,
}

// SAFETY: the manual's section "Thread Safety": several threads may use one handle as long as its settings do not
// change. They are set once, in `new`.
unsafe impl Send for Cublas {}
// SAFETY: as for Send.
unsafe impl Sync for Cublas {}

/// Status codes are plain integers, because a newer library may return codes that an enum would lack.
struct Functions {
    destroy: unsafe extern "C" fn(Handle) -> c_int,
    gemm: unsafe extern "C" fn(
        Handle,
        c_int,         // transa
        c_int,         // transb
        c_int,         // m
        c_int,         // n
        c_int,         // k
        *const c_void, // alpha
        *const c_void, // A
        c_int,         // its type
        c_int,         // lda
        *const c_void, // B
        c_int,
        c_int,
        *const c_void, // beta
        *mut c_void,   // C
        c_int,
        c_int,
        c_int, // compute type
        c_int, // algorithm
    ) -> c_int,
}

/// Bytes of the workspace, as the manual recommends ("cublasSetWorkspace": 32 MiB for Hopper).
pub(super) const WORKSPACE: usize = 32 << 20;

impl Cublas {
    /// A handle for products on `stream` of the current context. `workspace` has [`WORKSPACE`] bytes and outlives it.
    ///
    /// With one stream and a user-provided workspace, results are reproducible ("Results Reproducibility").
    pub(super) fn new(library: &Open, stream: *mut c_void, workspace: Address) -> Result<Self, Error> {
        // SAFETY: the types are those of cublas_api.h; the handle is the one that is created here.
        unsafe {
            let create: unsafe extern "C" fn(*mut Handle) -> c_int = library.function(c"cublasCreate_v2")?;
            let set_stream: unsafe extern "C" fn(Handle, *mut c_void) -> c_int =
                library.function(c"cublasSetStream_v2")?;
            let set_workspace: unsafe extern "C" fn(Handle, *mut c_void, usize) -> c_int =
                library.function(c"cublasSetWorkspace_v2")?;
            let set_math: unsafe extern "C" fn(Handle, c_int) -> c_int = library.function(c"cublasSetMathMode")?;
            let functions =
                Functions { destroy: library.function(c"cublasDestroy_v2")?, gemm: library.function(c"cublasGemmEx")? };
            let mut handle = std::ptr::null_mut();
            check("cublasCreate", create(&mut handle))?;
            let made = Self { functions, handle };
            // Before the workspace, which it resets.
            check("cublasSetStream", set_stream(handle, stream))?;
            check("cublasSetWorkspace", set_workspace(handle, workspace.0 as *mut c_void, WORKSPACE))?;
            // The default mode, which never rounds f32 to TF32, and with partial sums of bf16 products in f32.
            let math = sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION as c_int;
            check("cublasSetMathMode", set_math(handle, math))?;
            Ok(made)
        }
    }

    /// Queues a product. The handle's context must be current.
    pub(super) fn gemm(&self, gemm: &Gemm) -> Result<(), gpu::Error> {
        let call = ColumnMajor::of(gemm);
        let (operand_type, c_type) = (cuda_type(gemm.dtype), cuda_type(gemm.c_dtype));
        let operation = |transposed| match transposed {
            false => sys::cublasOperation_t::CUBLAS_OP_N as c_int,
            true => sys::cublasOperation_t::CUBLAS_OP_T as c_int,
        };
        // SAFETY: the matrices are valid by the contract of `Gpu::gemm`; alpha and beta are read before the call
        // returns (pointer mode "host", the default).
        let code = unsafe {
            (self.functions.gemm)(
                self.handle,
                operation(call.a.transposed),
                operation(call.b.transposed),
                int(call.m),
                int(call.n),
                int(call.k),
                (&raw const gemm.alpha).cast(),
                call.a.at.0 as *const c_void,
                operand_type,
                int(call.a.stride),
                call.b.at.0 as *const c_void,
                operand_type,
                int(call.b.stride),
                (&raw const gemm.beta).cast(),
                gemm.c.0 as *mut c_void,
                c_type,
                int(gemm.c_stride),
                sys::cublasComputeType_t::CUBLAS_COMPUTE_32F as c_int,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DFALT as c_int,
            )
        };
        check("cublasGemmEx", code).map_err(|e| gpu::Error::Fault { call: format!("{gemm:?}"), message: e.to_string() })
    }
}

impl Drop for Cublas {
    fn drop(&mut self) {
        // SAFETY: the handle was created by this library and is not used again.
        unsafe { (self.functions.destroy)(self.handle) };
    }
}

/// A product in cuBLAS's column-major convention.
///
/// A row-major matrix, read as column-major, is its transpose. So `c = op(a) · op(b)` is computed as `cᵀ = op(b)ᵀ ·
/// op(a)ᵀ`: a and b, m and n are swapped; strides and transpositions stay the same.
#[derive(Debug, PartialEq)]
struct ColumnMajor {
    m: usize,
    n: usize,
    k: usize,
    a: Operand,
    b: Operand,
}

impl ColumnMajor {
    fn of(gemm: &Gemm) -> Self {
        Self { m: gemm.n, n: gemm.m, k: gemm.k, a: gemm.b, b: gemm.a }
    }
}

fn cuda_type(dtype: Dtype) -> c_int {
    match dtype {
        Dtype::F32 => sys::cudaDataType_t::CUDA_R_32F as c_int,
        Dtype::F16 => sys::cudaDataType_t::CUDA_R_16F as c_int,
        Dtype::Bf16 => sys::cudaDataType_t::CUDA_R_16BF as c_int,
    }
}

fn int(size: usize) -> c_int {
    c_int::try_from(size).expect("sizes of a product are below 2^31")
}

/// Describes the most likely status codes; the manual's section "cublasStatus_t" has all.
fn check(call: &str, code: c_int) -> Result<(), Error> {
    let why = match code {
        0 => return Ok(()),
        1 => "not initialized (a GPU or driver that this cuBLAS does not support?)",
        3 => "no memory on the GPU",
        7 => "an invalid value",
        8 => "the GPU lacks a required feature",
        13 => "the execution failed",
        15 => "not supported",
        _ => "see cublasStatus_t in the cuBLAS manual",
    };
    Err(Error::Cublas { call: call.to_owned(), code, why })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What cublasGemmEx computes by its manual: C = op(A) · op(B), all column-major, "addresses" being offsets in
    /// `memory`.
    fn blas(call: &ColumnMajor, memory: &[f64], ldc: usize) -> Vec<f64> {
        let at = |x: &Operand, row: usize, col: usize| {
            let (row, col) = if x.transposed { (col, row) } else { (row, col) };
            memory[x.at.0 as usize + col * x.stride + row]
        };
        let mut c = vec![0.0; call.n * ldc];
        for (row, col) in (0..call.m).flat_map(|row| (0..call.n).map(move |col| (row, col))) {
            c[col * ldc + row] = (0..call.k).map(|i| at(&call.a, row, i) * at(&call.b, i, col)).sum();
        }
        c
    }

    #[test]
    fn row_major_products_come_out_of_a_column_major_library() {
        let (m, n, k, pad) = (2, 3, 4, 5);
        let memory: Vec<f64> = (0..200u32).map(|i| f64::from(i * i % 37) - 11.0).collect();
        for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
            let (a_cols, b_cols) = (if ta { m } else { k }, if tb { k } else { n });
            let a = Operand { at: Address(3), stride: a_cols + pad, transposed: ta };
            let b = Operand { at: Address(90), stride: b_cols + pad, transposed: tb };
            let (c, c_stride) = (Address::NULL, n + 2);
            let (dtype, c_dtype) = (Dtype::F32, Dtype::F32);
            let gemm = Gemm { m, n, k, a, b, dtype, c, c_stride, c_dtype, alpha: 1.0, beta: 0.0 };

            let row_major = |x: &Operand, row: usize, col: usize| {
                let (row, col) = if x.transposed { (col, row) } else { (row, col) };
                memory[x.at.0 as usize + row * x.stride + col]
            };
            let got = blas(&ColumnMajor::of(&gemm), &memory, c_stride);
            for (row, col) in (0..m).flat_map(|row| (0..n).map(move |col| (row, col))) {
                let want: f64 = (0..k).map(|i| row_major(&a, row, i) * row_major(&b, i, col)).sum();
                assert_eq!(got[row * c_stride + col], want, "transposed {ta} {tb}, [{row}, {col}]");
            }
        }
    }
}
