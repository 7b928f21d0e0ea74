# Shared by the scripts of this folder, which source it.
# shellcheck shell=bash

: "${MOEWARDEN:=moewarden}"   # the program
: "${MAX_REQUEUES:=20}"       # how often a job may go back to the queue
readonly CHECKPOINTED=85      # moewarden's exit code where a signal asked it to save and leave

say() {
    echo "launch: $*" >&2
}

die() {
    say "$2"
    exit "$1"
}

# How many ranks this host takes: one a visible GPU, or one in all.
ranks_here() {
    local gpus=${CUDA_VISIBLE_DEVICES-}
    if [[ $gpus ]]; then
        tr , '\n' <<<"$gpus" | wc -l
    else
        gpus=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || gpus=1
        echo "$gpus"
    fi
}

# mpirun_is NAME PATTERN: stops where mpirun is of another flavour, whose ranks would not find each other.
mpirun_is() {
    local version
    version=$("$MPIRUN" --version 2>&1) || die 69 "$MPIRUN does not run: load the module of $1, or set MPIRUN"
    grep -qE "$2" <<<"$version" || die 69 "$MPIRUN is not of $1 but says \"${version%%$'\n'*}\": take another script, or set MPIRUN"
}

# Runs a command and returns its exit status. Signals named by `forward` reach it as USR1, on which the ranks save and leave.
run() {
    local status
    if [[ $asked_to_stop ]]; then return "$CHECKPOINTED"; fi
    "$@" &
    while true; do
        interrupted=''
        status=0
        wait "$!" || status=$?
        # A signal ends `wait`, not the command.
        if [[ ! $interrupted ]]; then return "$status"; fi
    done
}

asked_to_stop='' interrupted=''
forward() {
    # shellcheck disable=SC2064 # the name is to be put in now
    for signal in "$@"; do trap "asked_to_stop=$signal interrupted=1; kill -USR1 \"\${!-}\" 2>/dev/null || true" "$signal"; done
}

# Runs mpirun to its end; the script ends with its exit status.
run_mpirun() {
    # A process group of its own: Ctrl-C then reaches this shell alone, and mpirun gets USR1, the one signal that all pass on.
    set -m
    forward USR1 TERM INT
    local status=0
    run "$@" </dev/null || status=$?
    # MPICH's loses the ranks' exit code now and then when they end at once after a signal; resuming a finished run does no harm.
    if [[ $asked_to_stop ]] && ((status == 0)); then status=$CHECKPOINTED; fi
    exit "$status"
}

# --- under SLURM ---------------------------------------------------------------------------------------------------

# What a batch script does first. USR1 comes before the time limit (--signal) and, at some sites, at preemption, and to this
# shell only. TERM comes to the ranks as well, when the job is cancelled, requeued or out of time: nothing to pass on then.
begin_job() {
    if [[ ! ${SLURM_JOB_ID:-} ]]; then die 69 "this is a batch script: submit it with sbatch"; fi
    forward USR1
    trap 'terminated=1 interrupted=1' TERM
    terminated=''
    restarts=${SLURM_RESTART_COUNT:-0}
    # srun of SLURM 22.05 and later does not take this from the job.
    if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
    say "job $SLURM_JOB_ID on $SLURM_JOB_NODELIST, GPUs ${CUDA_VISIBLE_DEVICES:-none}, requeues so far: $restarts"
}

# preflight COMMAND...: looks at options, files and sizes in one process, before many start. PREFLIGHT=0 skips it.
preflight() {
    if [[ ${PREFLIGHT:-1} == 0 ]] || ((restarts > 0)); then return; fi
    local status=0
    "$@" || status=$?
    if ((status != 0)); then die "$status" "the check before the start failed with exit code $status"; fi
}

# Starts a rank a task. Ranks that outlive another have ten seconds to end by themselves, with a message and an exit code of
# their own, which is enough: they notice at once, and ranks that save a checkpoint end together. --kill-on-bad-exit=1 would end them at once, and srun with
# 143 in place of that code.
# shellcheck disable=SC2034 # used by the scripts
ranks_by_srun=(srun --mpi="${MPI_TYPE:-pmix}" --kill-on-bad-exit=0 --wait=10 --cpu-bind="${CPU_BIND:-cores}")

# train_job COMMAND...: runs the training to the end of this job, and sends the job back to the queue where it left a checkpoint.
train_job() {
    local status=0
    run "$@" || status=$?
    if ((status != CHECKPOINTED)); then
        say "moewarden ended with exit code $status"
    elif [[ $terminated ]]; then
        # Whoever ended the job has decided what becomes of it; requeueing a cancelled job would bring it back.
        say "checkpointed; the job was ended from outside and is not requeued by this script"
    elif ((restarts >= MAX_REQUEUES)); then
        say "checkpointed; not requeued, for MAX_REQUEUES=$MAX_REQUEUES is reached: submit the job again to go on"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "checkpointed; requeued"
    else
        say "checkpointed; SLURM refused to requeue the job: submit it again to go on"
    fi
    exit "$status"
}
