//! NVIDIA's libraries from their PyPI wheels, where they are. No GPU is needed.

use std::io::Write;

use moewarden::backend::cuda::nvidia::Error;
use moewarden::backend::cuda::nvidia::library::{self, Library, Open, Surroundings};

/// The library as the program itself would find it, and in `MOEWARDEN_WHEELS`, a folder that `pip install --target` filled.
/// Where there is none, a line says that `what` does not run.
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

/// A line that is shown even if the test passes.
pub fn say(line: &str) {
    _ = writeln!(std::io::stderr(), "{line}"); // unlike eprintln!, not captured
}
