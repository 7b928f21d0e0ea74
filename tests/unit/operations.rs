//! Every operation of a backend is called by a test of each backend: a new one fails here until it has tests.

use std::fs;
use std::path::Path;

/// Methods of `trait Backend` that only describe the device, call operations, or give a hint; and those that decide where parameters
/// lie, which `tests/cuda/golden.rs` and `program.rs` hold against whole models.
const QUERIES: [&str; 15] = [
    "activation_size",
    "fence_weights",
    "free_memory",
    "load_offloaded",
    "logit_chunk_rows",
    "offload",
    "offload_ranks",
    "offloaded_weights",
    "peak_memory",
    "prefetch",
    "profile",
    "routed_size",
    "shape",
    "together",
    "write_weight",
];

/// Operations that the tests of the CPU backend reach through whole models: goldens, gradients, and random weights.
const THROUGH_MODELS: [&str; 3] = ["random_weight", "router_logits", "single_expert_dispatch"];

/// The sources in a folder of `tests`, one after another.
fn sources(folder: &str) -> String {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(folder);
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files
        .filter(|path| path.extension().is_some_and(|e| e == "rs"))
        .map(|path| fs::read_to_string(path).unwrap())
        .collect()
}

/// The names of the methods of `trait Backend`.
fn operations() -> Vec<String> {
    let source = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/backend/mod.rs")).unwrap();
    let body = source.split_once("pub trait Backend").expect("the trait").1.split_once("\n}").expect("its end").0;
    let methods = body.split("\n    fn ").skip(1);
    methods.map(|method| method.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()).collect()
}

#[test]
fn each_operation_has_a_test_on_each_backend() {
    let operations = operations();
    assert!(operations.len() > 50, "{operations:?}");
    for (backend, exempt) in [("unit", &THROUGH_MODELS[..]), ("cuda", &[])] {
        let tests = sources(backend);
        let untested: Vec<_> = operations
            .iter()
            .filter(|name| !QUERIES.contains(&&***name) && !exempt.contains(&&***name))
            .filter(|name| !tests.contains(&format!(".{name}(")))
            .collect();
        assert!(untested.is_empty(), "no test in tests/{backend} calls {untested:?}");
    }
    for name in QUERIES.iter().chain(&THROUGH_MODELS) {
        assert!(operations.iter().any(|operation| operation == name), "there is no operation {name}");
    }
}
