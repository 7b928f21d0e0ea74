//! The process: panic hook, command line, exit code.

use std::{env, io, panic};

use moewarden::backend::DeviceFault;
use moewarden::collective::Leave;
use moewarden::exit::{Ended, Stopped};
use moewarden::{cli, collective, exit, panics, quote};

fn main() {
    panic::set_hook(Box::new(|fault| {
        let payload = fault.payload();
        if payload.is::<DeviceFault>() || payload.is::<collective::Error>() || panics::is_expected() {
            return; // not a bug; reported where it is caught
        }
        say(&format!(
            "error: moewarden itself is at fault: {fault}\nPlease report this with the command line and the version \
             ({}); RUST_BACKTRACE=1 adds where it came from.",
            env!("CARGO_PKG_VERSION")
        ));
        let backtrace = std::backtrace::Backtrace::capture();
        if backtrace.status() == std::backtrace::BacktraceStatus::Captured {
            say(&backtrace.to_string());
        }
    }));
    let code = panic::catch_unwind(run).unwrap_or(exit::INTERNAL);
    // After success or a saved checkpoint all ranks reach this point; after a failure some may wait forever.
    let together = [exit::OK, exit::REQUEUE].contains(&code);
    collective::leave(code, if together { Leave::Together } else { Leave::Abort })
}

/// Parses the command line, runs the command, and returns the exit code.
fn run() -> u8 {
    let cli = match cli::parse(env::args_os()) {
        Ok(cli) => cli,
        Err(help_or_error) => {
            // A closed pipe is not an error.
            _ = cli::print(&help_or_error);
            return if help_or_error.use_stderr() { exit::USAGE } else { exit::OK };
        }
    };
    match cli::run(&cli) {
        Ok(Ended::Done(())) => exit::OK,
        Ok(Ended::Stopped(Stopped::Saved(message))) => {
            say(&message);
            exit::REQUEUE
        }
        Ok(Ended::Stopped(Stopped::Lost(message))) => {
            say(&format!("error: {message}"));
            exit::TERMINATED
        }
        Err(failure) => {
            for (i, cause) in failure.chain().enumerate() {
                // Causes quote paths and files.
                let cause = quote::message(&cause);
                say(&format!("{} {cause}", if i == 0 { "error:" } else { "caused by:" }));
            }
            failure.code()
        }
    }
}

/// Prints a line to stderr, which may be closed.
fn say(text: &str) {
    _ = io::Write::write_all(&mut io::stderr(), format!("{text}\n").as_bytes());
}
