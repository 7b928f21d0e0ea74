#!/usr/bin/env bash
# One process on this host, without MPI; its ranks are threads, one per GPU. RANKS overrides the number.
#
#     launch/local.sh --model-name MODEL --dataset-path ROWS.json --output-dir runs/first
#
# Run the same command again to resume. On USR1 or TERM the process saves a checkpoint and exits with 85.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

exec "$MOEWARDEN" "$MOEWARDEN_COMMAND" --resume --ranks "${RANKS:-$(ranks_here)}" "$@"
