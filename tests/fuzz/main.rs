//! Mutated inputs through the real binary. A run is a fault if it ends by a signal, as a bug (70) or with an unknown exit code,
//! does not end, prints terminal escapes, reports success with torn outputs, or changes a file of others in its output folder.
//!
//! Each run follows from its seed, which the test prints with the command of a fault; its folder is kept.
//!
//! | variable | effect |
//! |---|---|
//! | `MOEWARDEN_FUZZ_MINUTES=N` | how long runs are started; 2/3 by default |
//! | `MOEWARDEN_FUZZ_SEED=N` | the first seed; 1 by default |
//! | `MOEWARDEN_FUZZ_RUNS=N` | the number of runs, in place of a time |
//! | `MOEWARDEN_FUZZ_TABLE=FILE` | a file for the table of outcomes |
//! | `MOEWARDEN_FUZZ_LOG=FILE` | a file for each run's seed, outcome and error message |

mod corpus;
mod dice;
mod families;
#[path = "../common/golden_copy.rs"]
mod golden_copy;
mod mutate;
mod outputs;
mod process;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use corpus::Corpus;
use dice::Dice;
use families::{Case, FAMILIES};

const WORKERS: usize = 2;

fn variable<T: std::str::FromStr>(name: &str) -> Option<T> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// A run that must not have ended as it did.
struct Fault {
    seed: u64,
    family: &'static str,
    what: String,
    error: String,
    command: String,
    kept: PathBuf,
}

/// How a run ended.
struct Outcome {
    family: &'static str,
    label: String,
    error: String,
    fault: Option<Fault>,
}

/// Runs one seed in a copy of the corpus; a fault keeps its folder.
fn run(seed: u64, corpus: &Corpus, root: &Path) -> Outcome {
    let family = &FAMILIES[seed as usize % FAMILIES.len()];
    let mut dice = Dice::new(seed);
    let folder = root.join(format!("seed-{seed}"));
    corpus.copy_to(&folder);
    let Case { what, words, out, foreign } = family.apply(&mut dice, corpus, &folder);
    let ended = process::run(&folder, &words);
    let of_outputs = || ended.code.and_then(|code| outputs::fault(&folder.join(out), &words[0], code, &foreign));
    let of_foreign = || outputs::changed(&folder, &foreign);
    let fault = ended.fault().or_else(of_foreign).or_else(of_outputs).map(|fault| Fault {
        seed,
        family: family.name,
        what: fault,
        error: ended.error(),
        command: format!("moewarden {}   (mutated or put there: {what})", words.join(" ")),
        kept: folder.clone(),
    });
    if fault.is_none() {
        fs::remove_dir_all(&folder).unwrap();
    }
    Outcome { family: family.name, label: ended.label(), error: ended.error(), fault }
}

/// A row for each family, a column for each outcome.
fn table(outcomes: &BTreeMap<(&str, String), usize>) -> String {
    let labels: BTreeSet<&String> = outcomes.keys().map(|(_, label)| label).collect();
    let mut labels: Vec<_> = labels.into_iter().collect();
    labels.sort_by_key(|label| label.parse::<i32>().unwrap_or(1000));
    let mut text =
        format!("| family | runs | {} |\n|---|---|", labels.iter().map(|l| l.as_str()).collect::<Vec<_>>().join(" | "));
    text += &"---|".repeat(labels.len());
    for family in FAMILIES {
        let counts: Vec<usize> =
            labels.iter().map(|label| outcomes.get(&(family.name, (*label).clone())).copied().unwrap_or(0)).collect();
        let cells: Vec<String> = counts.iter().map(ToString::to_string).collect();
        write!(text, "\n| {} | {} | {} |", family.name, counts.iter().sum::<usize>(), cells.join(" | ")).unwrap();
    }
    text + "\n"
}

#[test]
fn mutated_inputs_end_with_a_documented_exit_code() {
    let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    _ = fs::remove_dir_all(&root);
    let corpus = Corpus::make(&root.join("corpus"));
    let first: u64 = variable("MOEWARDEN_FUZZ_SEED").unwrap_or(1);
    let runs: Option<u64> = variable("MOEWARDEN_FUZZ_RUNS");
    let minutes: f64 = variable("MOEWARDEN_FUZZ_MINUTES").unwrap_or(2.0 / 3.0);
    let (start, next) = (Instant::now(), AtomicU64::new(first));
    let more = |seed: u64| match runs {
        Some(runs) => seed < first + runs,
        // At least one of each family, however slow the machine is.
        None => seed < first + FAMILIES.len() as u64 || start.elapsed() < Duration::from_secs_f64(60.0 * minutes),
    };
    let log = std::env::var_os("MOEWARDEN_FUZZ_LOG").map(|path| fs::File::create(path).unwrap());
    let outcomes = Mutex::new(BTreeMap::new());
    let faults = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if !more(seed) {
                        return;
                    }
                    let Outcome { family, label, error, fault } = run(seed, &corpus, &root);
                    if let Some(mut log) = log.as_ref() {
                        let line = format!("{seed} | {family} | {label} | {}\n", error.replace('\n', " / "));
                        std::io::Write::write_all(&mut log, line.as_bytes()).unwrap();
                    }
                    *outcomes.lock().unwrap().entry((family, label)).or_insert(0) += 1;
                    faults.lock().unwrap().extend(fault);
                }
            });
        }
    });
    let (outcomes, faults) = (outcomes.into_inner().unwrap(), faults.into_inner().unwrap());
    let table = table(&outcomes);
    println!("seeds {first} to {}\n{table}", first + outcomes.values().sum::<usize>() as u64 - 1);
    if let Some(path) = std::env::var_os("MOEWARDEN_FUZZ_TABLE") {
        fs::write(path, &table).unwrap();
    }
    let told: Vec<String> = faults
        .iter()
        .map(|f| {
            let Fault { seed, family, what, error, command, kept } = f;
            format!(
                "seed {seed} ({family}): {what}\n{error}\n{command}\nin {}\n\
                 again: MOEWARDEN_FUZZ_SEED={seed} MOEWARDEN_FUZZ_RUNS=1 cargo test --test fuzz\n",
                kept.display()
            )
        })
        .collect();
    assert!(told.is_empty(), "{} faults\n{}", told.len(), told.join("\n"));
}
