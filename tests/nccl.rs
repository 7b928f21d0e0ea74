//! What NCCL answers without a GPU: its version, and ids.

#[path = "common/nvidia.rs"]
mod nvidia;

use std::path::Path;

use moewarden::backend::cuda::nvidia::library::Library;
use moewarden::collective::Error;
use moewarden::collective::nccl::Nccl;

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
