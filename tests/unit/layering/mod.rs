//! Imports run one way: from the command line down to the operations, and without a cycle between files. Only the edge
//! reads the environment.

mod source;

use std::fs;
use std::path::{Path, PathBuf};

use source::{Crate, File};

/// Each line may import from the lines before it, and no module from another of its own line.
const LEVELS: [&[&str]; 12] = [
    &["exit", "meter", "panics", "quote"],
    &["files", "input", "ui"],
    &["collective", "backend"],
    &["data", "model"],
    &["experts", "routers", "optim"],
    &["judge"],
    &["train"],
    &["checkpoint", "report"],
    &["config"],
    &["launch"],
    &["run"],
    &["cli", "main"],
];

/// Modules that may read environment variables.
const READS_ENVIRONMENT: [&str; 4] = ["ui", "launch", "cli", "main"];

fn level(module: &str) -> Option<usize> {
    LEVELS.iter().position(|level| level.contains(&module))
}

/// What a file of `module` (`a`, `a::b`) does against the rules.
fn complaints(module: &str, source: &str) -> Vec<String> {
    let path: Vec<String> = module.split("::").map(str::to_owned).collect();
    let module = path[0].clone();
    let Some(own) = level(&module) else { return vec![format!("the module {module} has no level here")] };
    let mut found = Vec::new();
    for named in File::parse("", path, source, true).named(true) {
        let Some(target) = named.path.first() else { continue };
        match level(target) {
            None => found.push(format!("line {}: crate::{target} has no level here", named.line)),
            Some(other) if other >= own && *target != module => {
                found.push(format!("line {}: {module} must not import {target}", named.line));
            }
            Some(_) => {}
        }
    }
    if !READS_ENVIRONMENT.contains(&&*module) {
        let lines = source.lines().enumerate().filter(|(_, line)| line.contains("env::var"));
        found.extend(lines.map(|(i, _)| format!("line {}: {module} must not read the environment", i + 1)));
    }
    found
}

fn source_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// All sources by their path below `src`; `lib.rs` only lists the modules.
fn sources() -> Vec<(String, String)> {
    let root = source_dir();
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let name = path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned();
            if name != "lib.rs" && name.ends_with(".rs") {
                found.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    assert!(found.len() > 50, "only {} files were found", found.len());
    found
}

/// The module of a file: `a` of `a.rs` and `a/mod.rs`, `a::b` of `a/b.rs`.
fn module_of(name: &str) -> String {
    name.trim_end_matches(".rs").trim_end_matches("/mod").replace('/', "::")
}

/// The files `(name, source)` as a crate, without their tests.
fn crate_of<'a>(sources: impl IntoIterator<Item = (&'a str, &'a str)>) -> Crate {
    let parse = |(name, source): (&str, &str)| {
        File::parse(name, module_of(name).split("::").map(str::to_owned).collect(), source, false)
    };
    Crate::new(sources.into_iter().map(parse).collect())
}

#[test]
fn imports_run_one_way() {
    let mut wrong = Vec::new();
    for (name, source) in sources() {
        wrong.extend(complaints(&module_of(&name), &source).into_iter().map(|what| format!("src/{name}: {what}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_files_import_each_other_in_a_cycle() {
    let sources = sources();
    let all = crate_of(sources.iter().map(|(name, source)| (&**name, &**source)));
    assert!(all.edges().len() > 300, "only {} imports were found", all.edges().len());
    let cycles = all.cycles();
    assert!(cycles.is_empty(), "cycles of imports, one of each group of files:\n{}", cycles.join("\n"));
}

#[test]
fn imports_against_the_order_are_found() {
    let bad = "use crate::exit;\nuse crate::{\n    data::Record,\n    ui,\n    backend::{cpu, Heads},\n};\nlet x = crate::run::train();\n";
    assert_eq!(
        complaints("model", bad),
        ["line 3: model must not import data", "line 7: model must not import run"],
        "two modules of one level, and a call upwards"
    );
    assert_eq!(complaints("run", bad), Vec::<String>::new());
    assert_eq!(complaints("model", "// crate::run\nuse crate::model::plan;\nuse self::x;"), Vec::<String>::new());
    assert_eq!(complaints("optim", "std::env::var(\"HOME\")"), ["line 1: optim must not read the environment"]);
    assert_eq!(complaints("launch", "std::env::var_os(\"HOME\")"), Vec::<String>::new());
    assert_eq!(complaints("new", ""), ["the module new has no level here"]);
    assert_eq!(complaints("run", "use crate::new::Thing;"), ["line 1: crate::new has no level here"]);
    assert_eq!(complaints("model::rope", "use super::super::run::x;"), ["line 1: model must not import run"]);
    assert_eq!(
        complaints("model::rope", "use super::Model;\nmod tests {\n    use super::super::super::cli::x;\n}"),
        ["line 3: model must not import cli"],
        "paths of inline modules"
    );
}

/// The cycles of a folder `run` with these files.
fn cycles(files: &[(&str, &str)]) -> Vec<String> {
    crate_of(files.iter().copied()).cycles()
}

#[test]
fn a_cycle_is_found_with_its_lines() {
    let found = cycles(&[
        ("run/mod.rs", "mod a;\nmod b;\nmod c;\npub use a::A;\n"),
        ("run/a.rs", "\nuse super::b::{\n    self as other,\n    B,\n};\npub struct A(B);\n"),
        ("run/b.rs", "pub struct B;\n\nfn f() -> crate::run::c::C { todo!() }\n"),
        ("run/c.rs", "pub struct C;\n// use super::b;\nfn f() { let quote = '\"'; let _ = super::A; }\n"),
    ]);
    assert_eq!(found, ["run/a.rs:3 → run/b.rs:3 → run/c.rs:3 → run/a.rs"]);
}

#[test]
fn the_shortest_cycle_of_each_group_is_reported() {
    let found = cycles(&[
        ("run/a.rs", "use super::b::B; struct A;"),
        ("run/b.rs", "use super::c::C; struct B;"),
        ("run/c.rs", "use super::{a::A, b}; struct C(b::B);"),
        ("run/d.rs", "use super::a; use super::e::E; struct D(a::A);"),
        ("run/e.rs", "use super::d::D; struct E;"),
    ]);
    assert_eq!(found, ["run/b.rs:1 → run/c.rs:1 → run/b.rs", "run/d.rs:1 → run/e.rs:1 → run/d.rs"]);
}

#[test]
fn a_mod_file_that_only_declares_and_exports_is_in_no_cycle() {
    let facade = "#![allow(x)]\npub mod a;\nmod b;\npub(crate) use a::{A, A as Again};\npub use b::*;\n";
    let a = "use super::B;\npub struct A;";
    assert_eq!(cycles(&[("run/mod.rs", facade), ("run/a.rs", a), ("run/b.rs", "pub struct B;")]), [""; 0]);
    let b = "use super::Again;\npub struct B;";
    assert_eq!(
        cycles(&[("run/mod.rs", facade), ("run/a.rs", a), ("run/b.rs", b)]),
        ["run/a.rs:1 → run/b.rs:1 → run/a.rs"],
        "through a glob and a new name"
    );
    let parent = "mod a;\nmod b;\npub struct Own(a::A);\npub fn run() { super::train::train() }\n";
    let a = "use super::Own;\npub struct A;";
    let train = "pub fn train() { crate::run::b::go() }";
    let b = "pub fn go() { super::run() }";
    assert_eq!(cycles(&[("run/mod.rs", parent), ("run/a.rs", a)]), [""; 0], "a parent and its child");
    assert_eq!(
        cycles(&[("run/mod.rs", parent), ("run/a.rs", a), ("run/b.rs", b), ("train.rs", train)]),
        ["run/mod.rs:4 → train.rs:1 → run/b.rs:1 → run/mod.rs"],
        "through what a parent defines"
    );
    let exports = "pub use super::b::B;\npub struct A;";
    let b = "use super::a::A;\npub struct B;";
    assert_eq!(cycles(&[("run/a.rs", exports), ("run/b.rs", b)]), [""; 0], "an export is no use");
}

#[test]
fn tests_and_imported_modules_are_understood() {
    let a = "use super::b;\nfn f() { b::g() }\n#[cfg(test)]\nmod tests {\n    use super::*;\n}\n";
    let b = "pub fn g() {}\n#[cfg(test)]\nuse super::a;\n#[cfg(test)]\nmod tests { use super::super::a::f; }\n";
    assert_eq!(cycles(&[("run/a.rs", a), ("run/b.rs", b)]), [""; 0], "what only tests import");
    let facade = "mod inner;\npub use inner::Inner;\n";
    assert_eq!(
        cycles(&[
            ("run/b/mod.rs", facade),
            ("run/b/inner.rs", "use super::super::a::f;\npub struct Inner;"),
            ("run/a.rs", "use super::b;\npub fn f() {\n    b::Inner;\n}"),
        ]),
        ["run/b/inner.rs:1 → run/a.rs:3 → run/b/inner.rs"],
        "through the name of a folder"
    );
}
