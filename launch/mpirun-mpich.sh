#!/usr/bin/env bash
# Ranks by the mpirun of MPICH (Hydra): on this host, or on those of a hostfile. moewarden must have been built with its mpicc.
#
#     launch/mpirun-mpich.sh --config my.yaml --output-dir runs/first
#     RANKS=16 MPIRUN_OPTIONS="-f hosts -ppn 8" launch/mpirun-mpich.sh ...
#
# The same line again resumes. USR1, TERM or Ctrl-C saves a checkpoint; it then ends with 85.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
: "${MPIRUN:=mpirun}"
mpirun_is "MPICH" "HYDRA"

# shellcheck disable=SC2086 # options are words
run_mpirun "$MPIRUN" -n "${RANKS:-$(ranks_here)}" -bind-to none ${MPIRUN_OPTIONS:-} "$MOEWARDEN" train --resume "$@"
