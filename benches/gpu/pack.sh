#!/usr/bin/env bash
# Builds the programs of prove.py and packs them, stripped, into one archive: `bash benches/gpu/pack.sh [ARCHIVE]`, by default
# target/gpu-proof.tar.xz, where prove.py looks for it. The GPU's machine then needs no cargo, only this and the sources.
# PROFILE=dev builds faster and runs slower.
set -euo pipefail
archive=$(realpath -m "${1:-$(dirname "${BASH_SOURCE[0]}")/../../target/gpu-proof.tar.xz}")
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir "$folder/bin"
cargo test --locked --profile "${PROFILE:-release}" --no-run --message-format=json-render-diagnostics \
    --test cuda --bench cuda_ops >"$folder/messages"
cargo build --locked --profile "${PROFILE:-release}" --message-format=json-render-diagnostics --bin moewarden >>"$folder/messages"
python3 - "$folder" <<'PYTHON'
import json, shutil, sys
for line in open(f"{sys.argv[1]}/messages"):
    made = json.loads(line)
    # The tests of the program itself are no part of this; the program comes last.
    if made.get("executable") and not (made["target"]["name"] == "moewarden" and made["profile"]["test"]):
        shutil.copy(made["executable"], f"{sys.argv[1]}/bin/{made['target']['name']}")
PYTHON
strip "$folder"/bin/*
du -sh "$folder/bin"
mkdir -p "$(dirname "$archive")"
tar -C "$folder/bin" -cf - . | xz -T0 -6 >"$archive.part"
mv "$archive.part" "$archive"
du -h "$archive"
