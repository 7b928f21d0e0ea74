//! Repeated tries of one kind of fault, and the table of results.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;
use std::{env, fs};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// How often a kind of fault is tried.
#[derive(Clone, Copy)]
pub enum Tries {
    /// This many in a short run, and [`repeats`] in a campaign.
    AtLeast(usize),
    /// The same, but at least 50 times in a campaign.
    AtLeast50(usize),
    /// The same number in both: each case once.
    #[cfg_attr(not(feature = "mpi"), allow(dead_code))]
    Exactly(usize),
}

/// The value of `MOEWARDEN_FAULT_REPEATS`; 0 if it is not set.
pub fn repeats() -> usize {
    env::var("MOEWARDEN_FAULT_REPEATS").map_or(0, |text| text.parse().expect("MOEWARDEN_FAULT_REPEATS is a number"))
}

/// Runs `one` for each try with its number and its own random numbers; panics if a try panics. `row` names the fault in the
/// table.
pub fn campaign(row: &str, tries: Tries, one: impl Fn(usize, &mut ChaCha8Rng)) {
    let count = match (tries, repeats()) {
        (Tries::Exactly(n) | Tries::AtLeast(n) | Tries::AtLeast50(n), 0) | (Tries::Exactly(n), _) => n,
        (Tries::AtLeast(n), repeats) => n.max(repeats),
        (Tries::AtLeast50(n), repeats) => n.max(repeats).max(50),
    };
    let (mut lost, start) = (Vec::new(), Instant::now());
    for i in 0..count {
        // The seed depends on the row and the number, so that a campaign repeats the tries of a short run.
        let seed =
            u64::from_le_bytes(blake3::hash(format!("{row} {i}").as_bytes()).as_bytes()[..8].try_into().unwrap());
        println!("{row}: try {i}, seed {seed:#018x}");
        let tried = catch_unwind(AssertUnwindSafe(|| one(i, &mut ChaCha8Rng::seed_from_u64(seed))));
        if let Err(panic) = tried {
            println!("{row}: try {i} failed");
            lost.push(panic);
        }
    }
    println!("{row}: {count} tries, {} failed, in {:.1} s", lost.len(), start.elapsed().as_secs_f64());
    record(row, count, lost.len());
    if let Some(first) = lost.into_iter().next() {
        resume_unwind(first);
    }
}

/// Writes a row of the table, in place of an older row of the same fault.
fn record(row: &str, tries: usize, lost: usize) {
    static TABLE: Mutex<()> = Mutex::new(());
    let Ok(path) = env::var("MOEWARDEN_FAULT_TABLE") else { return };
    let _table = TABLE.lock().unwrap_or_else(PoisonError::into_inner);
    let text = fs::read_to_string(&path).unwrap_or_default();
    let key = |line: &str| line.split('|').nth(1).map(|cell| cell.trim().to_owned());
    let mut rows: BTreeMap<_, _> = text.lines().filter_map(|line| Some((key(line)?, line.to_owned()))).collect();
    rows.insert(row.to_owned(), format!("| {row} | {tries} | {} | {lost} |", tries - lost));
    let text: String = rows.into_values().map(|line| line + "\n").collect();
    fs::write(path, text).expect("MOEWARDEN_FAULT_TABLE can be written");
}
