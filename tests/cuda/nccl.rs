//! NCCL without a GPU: its version, and ids. With `MOEWARDEN_TEST_GPU=0` also a group of one rank on that GPU.

use std::path::Path;
use std::time::Duration;

use crate::nvidia;
use moewarden::backend::cuda::gpu::Gpu;
use moewarden::backend::cuda::nvidia::Nvidia;
use moewarden::backend::cuda::nvidia::library::{Library, Surroundings};
use moewarden::collective::nccl::{Communicator, DeviceCollective, Nccl};
use moewarden::collective::{Error, threads};
use moewarden::launch::kernel_cache;

#[test]
fn it_tells_its_version_and_makes_ids() {
    let Some(library) = nvidia::library(Library::Nccl, "NCCL's version and ids") else { return };
    let nccl = Nccl::load(&library.path, 0).unwrap();
    nvidia::say(&format!("loaded {nccl}"));
    assert!((21800..30000).contains(&nccl.version()), "{}", nccl.version());
    let (first, second) = (nccl.unique_id().unwrap(), nccl.unique_id().unwrap());
    assert_ne!(first.0, second.0, "two groups, two ids");
    assert_ne!(first.0, [0; 128]);
}

#[test]
fn what_is_not_nccl_is_refused_by_name() {
    for (file, cause) in [("libnccl.so.nowhere", "libnccl.so.nowhere"), ("libc.so.6", "ncclGetUniqueId")] {
        let Err(error) = Nccl::load(Path::new(file), 3) else { panic!("{file} was taken for NCCL") };
        assert!(matches!(&error, Error::Nccl { rank: 3, .. }), "{error:?}");
        assert!(error.to_string().contains(file) && error.to_string().contains(cause), "{error}");
    }
}

/// Sums over one rank change nothing, but they use NCCL, its second stream, and the events that order the two streams.
#[test]
fn one_rank_on_a_gpu() {
    let Ok(index) = std::env::var("MOEWARDEN_TEST_GPU") else {
        return nvidia::say("skipped: NCCL on a GPU, which MOEWARDEN_TEST_GPU does not name");
    };
    let library = nvidia::library(Library::Nccl, "NCCL on the GPU").expect("NCCL, where a GPU is to be tested");
    let surroundings = Surroundings::read(|name| std::env::var_os(name));
    let gpu = Nvidia::open(index.parse().expect("an index"), &surroundings, kernel_cache().as_deref()).unwrap();
    let load = || Nccl::load(&library.path, 0).unwrap();
    let (host, timeout) = (threads::single(), Duration::from_secs(60));
    let group = Communicator::new(load(), &host, gpu.stream(), timeout).unwrap();
    assert_eq!((group.rank(), group.world_size()), (0, 1));

    let len = 10_000_019;
    let values: Vec<f32> = (0..len).map(|i| (i % 1000) as f32 - 0.5).collect();
    let [first, second] = [0; 2].map(|_| gpu.allocate(4 * len).unwrap().unwrap());
    let mut got = vec![0f32; len];
    // Each step reads the result of the previous one, across both streams.
    for _ in 0..3 {
        gpu.zero(second, 4 * len).unwrap();
        gpu.copy_in(first, bytemuck::cast_slice(&values)).unwrap();
        group.all_reduce_f32(first.0, len).unwrap();
        group.reduce_scatter_f32(first.0, &[len], second.0).unwrap();
        group.join().unwrap();
        gpu.zero(first, 4 * len).unwrap();
        group.all_gather_into(second.0, &[4 * len], first.0).unwrap();
        group.wait().unwrap();
        gpu.copy_out(first, bytemuck::cast_slice_mut(&mut got)).unwrap();
        assert!(got == values);
    }
    drop(group);
    let group = Communicator::new(load(), &host, gpu.stream(), timeout).unwrap();
    group.abort();
    assert!(group.wait().is_err());
    drop(group);
    for at in [first, second] {
        gpu.free(at).unwrap();
    }
}
