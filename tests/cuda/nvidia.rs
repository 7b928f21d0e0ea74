//! NVIDIA's libraries from their PyPI wheels, if they are installed. No GPU is needed.

use std::io::Write;

use moewarden::backend::cuda::nvidia::Error;
use moewarden::backend::cuda::nvidia::library::{self, Library, Open, Surroundings};

/// Opens a library as the program does, also from `MOEWARDEN_WHEELS`, a folder filled by `pip install --target`.
/// Without the library, prints that `what` is skipped.
pub fn library(library: Library, what: &str) -> Option<Open> {
    let surroundings = Surroundings::read(|name| match name {
        "PYTHONPATH" => std::env::var_os("MOEWARDEN_WHEELS"),
        _ => std::env::var_os(name),
    });
    match library::open(library, 13, &surroundings) {
        Ok(open) => Some(open),
        Err(Error::Missing { .. }) => {
            say(&format!("skipped: {what}: there is no {library} here"));
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Prints a line even if the test passes.
pub fn say(line: &str) {
    _ = writeln!(std::io::stderr(), "{line}"); // unlike eprintln!, not captured
}
