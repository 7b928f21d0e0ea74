#!/usr/bin/env bash
# Ranks by Open MPI's mpirun: on this host, or on those of a hostfile. moewarden must have been built with its mpicc.
#
#     launch/mpirun-openmpi.sh --config my.yaml --output-dir runs/first
#     RANKS=16 MPIRUN_OPTIONS="--hostfile hosts" launch/mpirun-openmpi.sh ...
#
# The same line again resumes. USR1, TERM or Ctrl-C saves a checkpoint; it then ends with 85.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
: "${MPIRUN:=mpirun}"
mpirun_is "Open MPI" "Open MPI|OpenRTE|PRRTE"

# Open MPI passes on variables to other hosts by name only.
pass=()
for name in $(compgen -e | grep -E '^(MOEWARDEN_|NCCL_|HF_|CUDA_|LD_LIBRARY_PATH$)' || true); do pass+=(-x "$name"); done

# By default it would bind a rank with all its threads to one core.
# shellcheck disable=SC2086 # options are words
run_mpirun "$MPIRUN" -n "${RANKS:-$(ranks_here)}" --bind-to none "${pass[@]}" ${MPIRUN_OPTIONS:-} "$MOEWARDEN" train --resume "$@"
