# Functions shared by the scripts of this folder, which source this file.
# shellcheck shell=bash

: "${MOEWARDEN:=moewarden}"   # the program to run
: "${MOEWARDEN_COMMAND:=train}" # its command: train, eval or compare, which all have --resume
: "${MAX_REQUEUES:=20}"       # maximum number of requeues of one job
readonly CHECKPOINTED=85      # moewarden's exit code after it saved a checkpoint because of a signal

say() {
    echo "launch: $*" >&2
}

die() {
    say "$2"
    exit "$1"
}

# Number of ranks for this host: one per visible GPU, or one without GPUs.
ranks_here() {
    local gpus=${CUDA_VISIBLE_DEVICES-}
    if [[ $gpus ]]; then
        tr , '\n' <<<"$gpus" | wc -l
    else
        gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || gpus=1
        echo "$gpus"
    fi
}

# mpirun_is NAME PATTERN: exits if mpirun belongs to another MPI implementation, whose ranks could not connect.
mpirun_is() {
    local version
    version=$("$MPIRUN" --version 2>&1) || die 69 "cannot run $MPIRUN: load the module of $1, or set MPIRUN"
    grep -qE "$2" <<<"$version" || die 69 "$MPIRUN is not $1; its version is \"${version%%$'\n'*}\": use the script for that MPI, or set MPIRUN"
}

# Runs a command and returns its exit status. Signals named by `forward` reach the command as USR1, on which the ranks save and
# exit.
run() {
    local status
    if [[ $asked_to_stop ]]; then return "$CHECKPOINTED"; fi
    "$@" &
    while true; do
        interrupted=''
        status=0
        wait "$!" || status=$?
        # A signal interrupts `wait`; the command still runs.
        if [[ ! $interrupted ]]; then return "$status"; fi
    done
}

asked_to_stop='' interrupted=''
forward() {
    # shellcheck disable=SC2064 # $signal must expand when the trap is set
    for signal in "$@"; do trap "asked_to_stop=$signal interrupted=1; kill -USR1 \"\${!-}\" 2>/dev/null || true" "$signal"; done
}

# Runs mpirun to completion, and exits with its exit status.
run_mpirun() {
    # A separate process group: Ctrl-C then reaches only this shell, and mpirun gets USR1, the only signal that every mpirun forwards.
    set -m
    forward USR1 TERM INT
    local status=0
    run "$@" </dev/null || status=$?
    # MPICH's mpirun sometimes loses the ranks' exit code if they exit quickly after a signal. Resuming a finished run is harmless.
    if [[ $asked_to_stop ]] && ((status == 0)); then status=$CHECKPOINTED; fi
    exit "$status"
}

# --- under SLURM ---------------------------------------------------------------------------------------------------

# Start of a batch script: installs signal handlers and logs the allocation. USR1 arrives before the time limit (--signal) and, at
# some sites, at preemption, and reaches only this shell. TERM (job cancelled, requeued or out of time) reaches the ranks directly, so
# it is not forwarded.
begin_job() {
    if [[ ! ${SLURM_JOB_ID:-} ]]; then die 69 "this is a batch script: submit it with sbatch"; fi
    forward USR1
    trap 'terminated=1 interrupted=1' TERM
    terminated=''
    restarts=${SLURM_RESTART_COUNT:-0}
    # srun of SLURM 22.05 and later does not inherit --cpus-per-task from the job.
    if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
    say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, GPUs ${CUDA_VISIBLE_DEVICES:-none}, requeues so far: $restarts"
}

# preflight COMMAND...: validates options, files and sizes of a training in one process, before all ranks start. PREFLIGHT=0 skips
# it.
preflight() {
    if [[ ${PREFLIGHT:-1} == 0 || $MOEWARDEN_COMMAND != train ]] || ((restarts > 0)); then return; fi
    local status=0
    "$@" || status=$?
    if ((status != 0)); then die "$status" "the check before the start failed with exit code $status"; fi
}

# Starts one rank per task. After a rank exits, the others have ten seconds (--wait) to exit with a message and exit code of their
# own. That is enough: they notice at once, and ranks that save a checkpoint exit together. --kill-on-bad-exit=1 would kill them
# immediately, and srun would exit with 143 instead of that code.
# shellcheck disable=SC2034 # used by the scripts that source this file
ranks_by_srun=(srun --mpi="${MPI_TYPE:-pmix}" --kill-on-bad-exit=0 --wait=10 --cpu-bind="${CPU_BIND:-cores}")

# train_job COMMAND...: runs the training, and requeues the job if the training stopped after saving a checkpoint.
train_job() {
    local status=0
    run "$@" || status=$?
    if ((status != CHECKPOINTED)); then
        say "moewarden ended with exit code $status"
    elif [[ $terminated ]]; then
        # TERM means that the job was cancelled, requeued or timed out; requeueing a cancelled job would revive it.
        say "checkpointed; the job was terminated from outside and is not requeued by this script"
    elif ((restarts >= MAX_REQUEUES)); then
        say "checkpointed; not requeued, because MAX_REQUEUES=$MAX_REQUEUES is reached: submit the job again to continue"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "checkpointed; requeued"
    else
        say "checkpointed; SLURM refused to requeue the job: submit it again to continue"
    fi
    exit "$status"
}
