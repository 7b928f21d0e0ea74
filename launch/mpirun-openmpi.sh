#!/usr/bin/env bash
# Starts ranks with Open MPI's mpirun, on this host or on the hosts of a hostfile. Build moewarden with the mpicc of that MPI.
#
#     launch/mpirun-openmpi.sh --config my.yaml --output-dir runs/first
#     RANKS=16 MPIRUN_OPTIONS="--hostfile hosts" launch/mpirun-openmpi.sh ...
#
# Run the same command again to resume. On USR1, TERM or Ctrl-C the ranks save a checkpoint, and the script exits with 85.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
: "${MPIRUN:=mpirun}"
mpirun_is "Open MPI" "Open MPI|OpenRTE|PRRTE"

# Open MPI exports environment variables to other hosts only if they are named.
pass=()
for name in $(compgen -e | grep -E '^(MOEWARDEN_|NCCL_|HF_|CUDA_|LD_LIBRARY_PATH$)' || true); do pass+=(-x "$name"); done

# Without --bind-to none, Open MPI would bind each rank with all its threads to one core.
# shellcheck disable=SC2086 # MPIRUN_OPTIONS holds several words
run_mpirun "$MPIRUN" -n "${RANKS:-$(ranks_here)}" --bind-to none "${pass[@]}" ${MPIRUN_OPTIONS:-} "$MOEWARDEN" "$MOEWARDEN_COMMAND" --resume "$@"
