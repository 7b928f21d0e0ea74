//! Imports run one way: from the command line down to the operations. And only the edge reads the environment.

use std::fs;
use std::path::{Path, PathBuf};

/// Each line may import from the lines before it, and no module from another of its own line.
const LEVELS: [&[&str]; 10] = [
    &["exit"],
    &["files", "ui"],
    &["collective", "backend"],
    &["data", "model"],
    &["experts", "routers", "optim"],
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

/// The modules that a source names as `crate::module`, each with its line. Comments name what they like.
fn named_modules(source: &str) -> Vec<(usize, String)> {
    // Blank comments keep the lines' numbers.
    let code: Vec<_> = source.lines().map(|line| line.split("//").next().unwrap_or_default()).collect();
    let code = code.join("\n");
    let mut found = Vec::new();
    for (at, path) in code.match_indices("crate::") {
        let line = 1 + code[..at].matches('\n').count();
        let rest = &code[at + path.len()..];
        match rest.strip_prefix('{') {
            None => found.push((line, first_name(rest))),
            Some(list) => found.extend(listed(list).into_iter().map(|item| (line, first_name(item)))),
        }
    }
    found
}

/// The items of a `{..}` list, whose opening brace is gone.
fn listed(text: &str) -> Vec<&str> {
    let (mut items, mut depth, mut start) = (Vec::new(), 0, 0);
    for (at, c) in text.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => {
                items.push(&text[start..at]);
                break;
            }
            '}' => depth -= 1,
            ',' if depth == 0 => {
                items.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    items.retain(|item| !item.trim().is_empty());
    items
}

fn first_name(path: &str) -> String {
    path.trim_start().chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// What a file of `module` does against the rules.
fn complaints(module: &str, source: &str) -> Vec<String> {
    let Some(own) = level(module) else { return vec![format!("the module {module} has no level here")] };
    let mut found = Vec::new();
    for (line, target) in named_modules(source) {
        match level(&target) {
            None => found.push(format!("line {line}: crate::{target} has no level here")),
            Some(other) if other >= own && target != module => {
                found.push(format!("line {line}: {module} must not import {target}"));
            }
            Some(_) => {}
        }
    }
    if !READS_ENVIRONMENT.contains(&module) {
        let lines = source.lines().enumerate().filter(|(_, line)| line.contains("env::var"));
        found.extend(lines.map(|(i, _)| format!("line {}: {module} must not read the environment", i + 1)));
    }
    found
}

/// All sources with the module they belong to; `lib.rs` only lists the modules.
fn sources() -> Vec<(String, PathBuf)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    let mut folders = vec![root.clone()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let inside = path.strip_prefix(&root).unwrap();
            let module = inside.iter().next().unwrap().to_str().unwrap().trim_end_matches(".rs").to_owned();
            if module != "lib" && path.extension().is_some_and(|ending| ending == "rs") {
                found.push((module, path));
            }
        }
    }
    found.sort();
    found
}

#[test]
fn imports_run_one_way() {
    let sources = sources();
    assert!(sources.len() > 50, "only {} files were found", sources.len());
    let mut wrong = Vec::new();
    for (module, path) in sources {
        let source = fs::read_to_string(&path).unwrap();
        wrong.extend(complaints(&module, &source).into_iter().map(|what| format!("{}: {what}", path.display())));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_runs_the_other_way_is_found() {
    let bad = "use crate::exit;\nuse crate::{\n    data::Record,\n    ui,\n    backend::{cpu, Heads},\n};\nlet x = crate::run::train();\n";
    assert_eq!(
        complaints("model", bad),
        ["line 2: model must not import data", "line 7: model must not import run"],
        "two modules of one level, and a call upwards"
    );
    assert_eq!(complaints("run", bad), Vec::<String>::new());
    assert_eq!(complaints("model", "// crate::run\nuse crate::model::plan;\nuse super::x;"), Vec::<String>::new());
    assert_eq!(complaints("optim", "std::env::var(\"HOME\")"), ["line 1: optim must not read the environment"]);
    assert_eq!(complaints("launch", "std::env::var_os(\"HOME\")"), Vec::<String>::new());
    assert_eq!(complaints("new", ""), ["the module new has no level here"]);
    assert_eq!(complaints("run", "use crate::new::Thing;"), ["line 1: crate::new has no level here"]);
}
