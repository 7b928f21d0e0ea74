//! Tests of the CUDA backend that need no GPU: the kernels run emulated on the CPU, NVIDIA's libraries are replaced by a
//! stand-in or loaded from their wheels. With `MOEWARDEN_TEST_GPU=0` the comparisons run on that GPU.

#[path = "../common/case.rs"]
mod case;
#[path = "../emulator/mod.rs"]
mod emulator;
#[path = "../common/golden_copy.rs"]
mod golden_copy;
#[cfg(feature = "mpi")]
#[allow(dead_code)] // the tests of MPI use all of it
#[path = "../common/processes.rs"]
mod processes;
#[path = "../common/values.rs"]
mod values;

mod nvidia;

mod driver;
mod fused;
mod golden;
mod nccl;
mod nvrtc;
mod ops;
mod products;
mod program;
mod proof;
mod ranks;
