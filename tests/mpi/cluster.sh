#!/usr/bin/env bash
# A private SLURM of two virtual nodes, n1 and n2, on this host: for tests, as root, without systemd, munge or a network.
#
#     tests/mpi/cluster.sh up DIR      starts it, everything it writes under DIR, and prints `export SLURM_CONF=...`
#     tests/mpi/cluster.sh down DIR    ends it with all its jobs; DIR stays, with the daemons' logs
#
# Each node has 4 CPUs and 2 GPUs that are links to /dev/null. Jobs of the partition `high` preempt those of `low` (the default),
# which have 30 seconds to save before SLURM requeues them. Debian: apt-get install slurm-wlm
set -euo pipefail

fail() {
    echo "cluster.sh: $*" >&2
    exit 69
}

# A port that is the first of three free ones.
free_ports() {
    local port
    for _ in {1..100}; do
        port=$((20000 + RANDOM % 10000))
        if ! (for p in {0..2}; do : <"/dev/tcp/127.0.0.1/$((port + p))" && exit; done; exit 1) 2>/dev/null; then
            echo "$port"
            return
        fi
    done
    fail "found no three free ports"
}

write_config() {
    local port host
    port=$(free_ports)
    host=$(hostname -s)
    mkdir -p "$dir"/{state,spool-n1,spool-n2,tmp-n1,tmp-n2}
    # SLURM takes no plain file for a GPU.
    ln -sf /dev/null "$dir/gpu0"
    ln -sf /dev/null "$dir/gpu1"
    echo "NodeName=n[1-2] Name=gpu File=$dir/gpu[0-1]" >"$dir/gres.conf"
    cat >"$SLURM_CONF" <<CONF
ClusterName=moewarden
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
AuthType=auth/none
CredType=cred/none
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=100000
# Open MPI knows a process by the number of its job and its rank: a rank of another cluster on this host, one that reports the
# death of its peer on a port that is in use again, must not pass for a rank of this cluster.
FirstJobId=$port
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdSpoolDir=$dir/spool-%n
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmdLogFile=$dir/slurmd-%n.log
# PMIx keeps its sockets here: one folder for both nodes makes them collide.
TmpFS=$dir/tmp-%n
GresTypes=gpu
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 2))] CPUs=4 RealMemory=1000 Gres=gpu:2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=low Nodes=n[1-2] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=n[1-2] PriorityTier=10 PreemptMode=OFF
CONF
}

up() {
    ((EUID == 0)) || fail "only root can start SLURM's daemons"
    for tool in slurmctld slurmd sbatch sinfo; do
        command -v "$tool" >/dev/null || fail "$tool is missing (Debian: apt-get install slurm-wlm)"
    done
    mkdir -p "$dir"
    write_config
    slurmctld -c -f "$SLURM_CONF" >&2
    slurmd -f "$SLURM_CONF" -N n1 >&2
    slurmd -f "$SLURM_CONF" -N n2 >&2
    for _ in {1..100}; do
        if [[ $(sinfo -h -p low -t idle -o %D 2>/dev/null) == 2 ]]; then
            echo "export SLURM_CONF=$SLURM_CONF"
            return
        fi
        sleep 0.1
    done
    sinfo -N -l >&2 || true
    tail -n 20 "$dir"/*.log >&2
    down
    fail "the nodes are not idle after 10 s"
}

# The daemons of this cluster and the processes of its jobs, by their environment.
processes() {
    local process environment
    for process in /proc/[0-9]*; do
        environment=$(tr '\0' '\n' 2>/dev/null <"$process/environ") || continue
        grep -qxF "SLURM_CONF=$SLURM_CONF" <<<"$environment" || continue
        if grep -q '^SLURM_JOB_ID=' <<<"$environment" || grep -qE '^slurm(ctld|scriptd|d|stepd)$' "$process/comm"; then
            echo "${process#/proc/}"
        fi
    done 2>/dev/null
}

down() {
    local signal left
    for signal in TERM TERM KILL KILL; do
        for _ in {1..20}; do
            left=$(processes)
            [[ $left ]] || return 0
            # shellcheck disable=SC2086 # one word a process
            kill "-$signal" $left 2>/dev/null || true
            sleep 0.1
        done
    done
    fail "these processes cannot be ended: ${left//$'\n'/ }"
}

(($# == 2)) || fail "usage: cluster.sh up|down DIR"
dir=$(realpath -m "$2")
export SLURM_CONF=$dir/slurm.conf
case $1 in
    up) up ;;
    down) down ;;
    *) fail "usage: cluster.sh up|down DIR" ;;
esac
