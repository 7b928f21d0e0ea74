#!/usr/bin/env bash
# Builds what prove.sh runs and puts it, stripped, into a folder: `bash benches/gpu/pack.sh FOLDER`. With that folder (some tens
# of MiB) and the sources, prove.sh needs no cargo on the GPU's machine. PROFILE=dev builds faster and runs slower.
set -euo pipefail
folder=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
messages=$(mktemp)
trap 'rm -f "$messages"' EXIT
cargo test --locked --profile "${PROFILE:-release}" --no-run --message-format=json-render-diagnostics \
    --test cuda --bench cuda_ops >"$messages"
cargo build --locked --profile "${PROFILE:-release}" --message-format=json-render-diagnostics --bin moewarden >>"$messages"
python3 - "$messages" "$folder" <<'PYTHON'
import json, shutil, sys
for line in open(sys.argv[1]):
    made = json.loads(line)
    # The tests of the program itself are no part of this; the program comes last.
    if made.get("executable") and not (made["target"]["name"] == "moewarden" and made["profile"]["test"]):
        shutil.copy(made["executable"], f"{sys.argv[2]}/{made['target']['name']}")
PYTHON
strip "$folder"/*
du -sh "$folder"
