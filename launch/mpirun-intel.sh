#!/usr/bin/env bash
# Ranks by Intel MPI's mpirun: on this host, or on those of a hostfile. moewarden must have been built with its mpicc.
#
#     launch/mpirun-intel.sh --config my.yaml --output-dir runs/first
#     RANKS=16 MPIRUN_OPTIONS="-f hosts -ppn 8" launch/mpirun-intel.sh ...
#
# The same line again resumes. USR1, TERM or Ctrl-C saves a checkpoint; it then ends with 85.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
: "${MPIRUN:=mpirun}"
mpirun_is "Intel MPI" "Intel\(R\) MPI"

# A share of the host's cores for each rank, in which its threads may move.
export I_MPI_PIN_DOMAIN=${I_MPI_PIN_DOMAIN:-auto}

# shellcheck disable=SC2086 # options are words
run_mpirun "$MPIRUN" -n "${RANKS:-$(ranks_here)}" -genvall ${MPIRUN_OPTIONS:-} "$MOEWARDEN" train --resume "$@"
