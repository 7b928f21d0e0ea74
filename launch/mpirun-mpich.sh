#!/usr/bin/env bash
# Starts ranks with the mpirun of MPICH (Hydra), on this host or on the hosts of a hostfile. Build moewarden with the mpicc of that MPI.
#
#     launch/mpirun-mpich.sh --config my.yaml --output-dir runs/first
#     RANKS=16 MPIRUN_OPTIONS="-f hosts -ppn 8" launch/mpirun-mpich.sh ...
#
# Run the same command again to resume. On USR1, TERM or Ctrl-C the ranks save a checkpoint, and the script exits with 85.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
: "${MPIRUN:=mpirun}"
mpirun_is "MPICH" "HYDRA"

# shellcheck disable=SC2086 # MPIRUN_OPTIONS holds several words
run_mpirun "$MPIRUN" -n "${RANKS:-$(ranks_here)}" -bind-to none ${MPIRUN_OPTIONS:-} "$MOEWARDEN" "$MOEWARDEN_COMMAND" --resume "$@"
