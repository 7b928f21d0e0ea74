#!/usr/bin/env bash
# One process on this host, without MPI: its ranks are threads, one a GPU. RANKS sets another number.
#
#     launch/local.sh --model-name MODEL --dataset-path ROWS.json --output-dir runs/first
#
# The same line again resumes. USR1 or TERM to this script saves a checkpoint; it then ends with 85.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

exec "$MOEWARDEN" train --resume --ranks "${RANKS:-$(ranks_here)}" "$@"
