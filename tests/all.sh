#!/usr/bin/env bash
# Runs every test. Needs Rust and a C linker, installs nothing, and ends with one line that sums up all test programs.
#
# Arguments go to `cargo test`. Checks by Python run where python3 is present, those by transformers where python3 has torch
# and transformers (MOEWARDEN_PYTHON names another interpreter). `-- --show-output` shows what was skipped, and why.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

for tool in cargo cc; do
    if ! command -v "$tool" >/dev/null; then
        echo "tests/all.sh: $tool is missing: install Rust from https://rustup.rs and a C compiler (Debian: apt-get install gcc)" >&2
        exit 69
    fi
done

log=$(mktemp)
trap 'rm -f "$log"' EXIT
status=0
CARGO_TERM_COLOR=never cargo test --locked --no-fail-fast "$@" </dev/null 2>&1 | tee "$log" || status=$?

# "test result: ok. 12 passed; 0 failed; 1 ignored; ..." of each program; none at all is a failure, too.
awk -v status="$status" '
    /^test result: / { programs++; passed += $4; failed += $6; ignored += $8 }
    END {
        good = status == 0 && failed == 0 && passed > 0
        printf "test result: %s. %d passed; %d failed; %d ignored; %d test programs\n",
            good ? "ok" : "FAILED", passed, failed, ignored, programs
        exit !good
    }' "$log"
