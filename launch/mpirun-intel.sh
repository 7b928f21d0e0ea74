#!/usr/bin/env bash
# Starts ranks with Intel MPI's mpirun, on this host or on the hosts of a hostfile. Build moewarden with the mpicc of that MPI.
#
#     launch/mpirun-intel.sh --config my.yaml --output-dir runs/first
#     RANKS=16 MPIRUN_OPTIONS="-f hosts -ppn 8" launch/mpirun-intel.sh ...
#
# Run the same command again to resume. On USR1, TERM or Ctrl-C the ranks save a checkpoint, and the script exits with 85.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
: "${MPIRUN:=mpirun}"
mpirun_is "Intel MPI" "Intel\(R\) MPI"

# Pin each rank to an equal share of the host's cores; its threads may move within that share.
export I_MPI_PIN_DOMAIN=${I_MPI_PIN_DOMAIN:-auto}

# shellcheck disable=SC2086 # MPIRUN_OPTIONS holds several words
run_mpirun "$MPIRUN" -n "${RANKS:-$(ranks_here)}" -genvall ${MPIRUN_OPTIONS:-} "$MOEWARDEN" "$MOEWARDEN_COMMAND" --resume "$@"
