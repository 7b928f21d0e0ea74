#!/usr/bin/env bash
# Runs every test. Needs Rust and a C linker, and ends with one line that sums up all test programs. cargo fetches the
# crates of Cargo.lock; nothing else is installed.
#
# Ranks over MPI are tested where mpicc and mpirun of Open MPI are present, the SLURM scripts where sbatch is, too (as root:
# they start a SLURM of their own). Debian: apt-get install openmpi-bin libopenmpi-dev libclang-dev slurm-wlm \
# slurm-wlm-basic-plugins libpmix2.
#
# Checks by Python run where python3 is present, those by transformers where it has torch, transformers and safetensors
# (MOEWARDEN_PYTHON names another interpreter); where they do not run, a line says so, and they do not count as passed.
# Arguments go to `cargo test` in place of all that: tests by Python then run with `-- --include-ignored` only.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for tool in cargo cc; do
    if ! command -v "$tool" >/dev/null; then
        echo "tests/all.sh: $tool is missing: install Rust from https://rustup.rs and a C compiler (Debian: apt-get install gcc)" >&2
        exit 69
    fi
done

features=()
if type mpicc mpirun >/dev/null 2>&1; then
    features=(--features mpi)
else
    echo "skipped: tests/mpi and all that starts ranks with mpirun: there is no mpicc or no mpirun"
fi

if (($# == 0)); then
    python=${MOEWARDEN_PYTHON:-python3}
    skips=(--skip export_onto_a_disk_that_fills_up) # ignored because another test runs it in a process of its own
    # skip_without TEST MODULES: unless Python has these modules
    skip_without() {
        if ! "$python" -c "import $2" >/dev/null 2>&1; then
            echo "skipped: $1: $python does not have $2"
            skips+=(--skip "$1")
        fi
    }
    if "$python" --version >/dev/null 2>&1; then
        skip_without transformers_loads_what_was_exported "torch, transformers, safetensors"
        skip_without the_snippets_of_the_documentation_run "torch, transformers, safetensors, pandas, peft"
        skip_without huggingface_hub_reads_the_cache huggingface_hub
        skip_without tensorboard_reads_the_steps tensorboard
        : "${MOEWARDEN_CHROMIUM:=$(type -P chromium chromium-browser google-chrome | head -1)}"
        export MOEWARDEN_CHROMIUM
        if ! "${MOEWARDEN_CHROMIUM:-false}" --version >/dev/null 2>&1; then
            echo "skipped: pages_in_chromium: there is no chromium"
            skips+=(--skip pages_in_chromium)
        fi
        set -- -- --include-ignored "${skips[@]}"
    else
        echo "skipped: tests/binary/python.rs: there is no $python"
    fi
fi

log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
CARGO_TERM_COLOR=never cargo test --locked --no-fail-fast "${features[@]}" "$@" </dev/null 2>&1 | tee "$log" || status=$?

# "test result: ok. 12 passed; 0 failed; 1 ignored; ..." of each program; none at all is a failure, too.
awk -v status="$status" '
    /^test result: / { programs++; passed += $4; failed += $6; ignored += $8 }
    END {
        good = status == 0 && failed == 0 && passed > 0
        printf "test result: %s. %d passed; %d failed; %d ignored; %d test programs\n",
            good ? "ok" : "FAILED", passed, failed, ignored, programs
        exit !good
    }' "$log"
