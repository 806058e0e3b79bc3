#!/usr/bin/env bash
# A real SLURM of two nodes on this machine, for tests and for trying things out: munged, slurmctld and two slurmd with
# private ports, keys and folders; nothing under /etc is touched, nothing else on the machine is seen.
#
#   eval "$(scripts/slurm_test_cluster.sh up [--accounts] [FOLDER] [PID])"   # then sbatch, squeue and alignctl use it
#   scripts/slurm_test_cluster.sh down FOLDER
#
# `up` installs Debian's packages where they are missing and it may (root, apt-get), and exits with 77 and the reason
# where it may not. With a PID the cluster goes down with that process, however that one ends. Each node has 4 CPUs and 4
# GPUs that exist in name only. With --accounts there are a slurmdbd and its database, too: sacct works, squeue forgets
# jobs soon after their end, and accounts that do not exist are refused; `lab` does.
set -euo pipefail

NODES=2 CPUS=4 GPUS=4

cannot() {
    echo "no SLURM here: $1" >&2
    exit 77
}

install() {
    need "slurm-wlm munge" slurmctld slurmd sbatch munged
    [[ ${1:-} != --accounts ]] || need "slurmdbd mariadb-server" slurmdbd mariadbd
}

need() { # PACKAGES COMMAND...: the packages, unless the commands are there
    local packages=$1
    shift
    (($(command -v "$@" | wc -l) < $#)) || return 0
    [[ $(id -u) == 0 ]] || cannot "packages $packages are missing, and only root may install them"
    command -v apt-get >/dev/null || cannot "packages $packages are missing, and there is no apt-get"
    # shellcheck disable=SC2086  # several words
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends $packages; } >&2 ||
        cannot "apt-get could not install $packages"
}

free_ports() {
    python3 - "$1" <<'PYTHON'
import socket, sys
held = [socket.socket() for _ in range(int(sys.argv[1]))]
for one in held:
    one.bind(("127.0.0.1", 0))
print(*(one.getsockname()[1] for one in held))
PYTHON
}

configure() {
    local folder=$1 host user ports node
    host=$(hostname -s)
    user=$(id -un)
    read -ra ports < <(free_ports $((NODES + 2)))
    mkdir -p "$folder/state"
    for ((gpu = 0; gpu < GPUS; gpu++)); do ln -sf /dev/null "$folder/nvidia$gpu"; done
    (umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
    cat >"$folder/slurm.conf" <<CONF
ClusterName=alignctl
SlurmctldHost=$host(127.0.0.1)
SlurmUser=$user
SlurmdUser=$user
AuthType=auth/munge
AuthInfo=socket=$folder/munge.sock,cred_expire=5
SlurmctldPort=${ports[0]}
SlurmdPort=${ports[1]}
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
EnforcePartLimits=ALL
ReturnToService=2
MpiDefault=none
MailProg=/bin/true
SlurmdParameters=config_overrides
KillWait=20
MinJobAge=3600
SlurmdTimeout=20
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=60 DefaultTime=10 PriorityTier=1 GraceTime=15 State=UP
PartitionName=urgent Nodes=ALL MaxTime=60 DefaultTime=10 PriorityTier=9 PreemptMode=off State=UP
CONF
    for ((node = 1; node <= NODES; node++)); do
        mkdir -p "$folder/spool-n$node"
        echo "NodeName=n$node NodeHostname=$host NodeAddr=127.0.0.1 Port=${ports[node + 1]} CPUs=$CPUS RealMemory=8000" \
            "Gres=gpu:$GPUS State=UNKNOWN" >>"$folder/slurm.conf"
    done
    # Links to /dev/null: SLURM counts them as cards and sets CUDA_VISIBLE_DEVICES.
    echo "NodeName=n[1-$NODES] Name=gpu File=$folder/nvidia[0-$((GPUS - 1))] Flags=nvidia_gpu_env" >"$folder/gres.conf"
}

accounts() { # a database and a slurmdbd, which slurmctld is told of
    local host port database_port
    host=$(hostname -s)
    read -r port database_port < <(free_ports 2)
    cat >"$folder/users.sql" <<SQL
CREATE USER 'slurm'@'127.0.0.1' IDENTIFIED BY 'slurm';
GRANT ALL ON slurm_acct_db.* TO 'slurm'@'127.0.0.1';
SQL
    mariadb-install-db --no-defaults --user="$(id -un)" --datadir="$folder/database" --skip-test-db >&2
    start mariadbd mariadbd --no-defaults --user="$(id -un)" --datadir="$folder/database" --bind-address=127.0.0.1 \
        --port="$database_port" --socket="$folder/database.sock" --pid-file="$folder/database.pid" \
        --init-file="$folder/users.sql"
    wait_for 30 "the database did not start" test -S "$folder/database.sock"
    (
        umask 077
        cat >"$folder/slurmdbd.conf" <<CONF
DbdHost=$host
DbdAddr=127.0.0.1
DbdPort=$port
SlurmUser=$(id -un)
AuthType=auth/munge
AuthInfo=socket=$folder/munge.sock,cred_expire=5
PidFile=$folder/slurmdbd.pid
LogFile=$folder/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort=$database_port
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_acct_db
CONF
    )
    sed -i -e '/^MinJobAge=/d' -e '/^AccountingStorageType=/d' "$SLURM_CONF"
    cat >>"$SLURM_CONF" <<CONF
MinJobAge=2
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort=$port
AccountingStoragePass=$folder/munge.sock
AccountingStorageEnforce=associations
CONF
    start slurmdbd slurmdbd -D
    wait_for 60 "slurmdbd did not start" accounts_answer
    {
        sacctmgr -i add cluster alignctl
        sacctmgr -i add account lab cluster=alignctl
        sacctmgr -i add user "$(id -un)" account=lab cluster=alignctl
    } >&2
}

start() { # NAME COMMAND...: in the background, its process id in folder/NAME.own
    local name=$1
    shift
    setsid "$@" </dev/null >"$folder/$name.out" 2>&1 &
    echo $! >"$folder/$name.own"
}

start_node() { start "slurmd-$1" slurmd -D -N "$1" -f "$folder/slurm.conf"; }

wait_for() { # SECONDS WHAT COMMAND...
    local until=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        if ((SECONDS > until)); then
            cat "$folder"/*.out >&2
            stop "$folder"
            echo "$what" >&2
            exit 1
        fi
        sleep 0.05
    done
}

accounts_answer() { sacctmgr -n list cluster >/dev/null 2>&1; }

all_idle() { [[ $(sinfo -h -N -p main -o %T | grep -c '^idle$') == "$NODES" ]]; }

belongs() { # PID FOLDER: whether a process is one of this cluster's jobs, or runs one
    local its
    { its=$(tr '\0' '\n' <"/proc/$1/environ"); } 2>/dev/null || return 1
    grep -qxF "SLURM_CONF=$2/slurm.conf" <<<"$its" || return 1
    grep -q '^SLURM_JOB_ID=' <<<"$its" || [[ $(cat "/proc/$1/comm" 2>/dev/null) == slurmstepd* ]]
}

stop() { # FOLDER: everything this cluster started, by process id; steps outlive their slurmd
    local signal own process
    for signal in TERM KILL; do
        for own in "$1"/*.own; do
            [[ ! -e $own ]] || kill -$signal "$(<"$own")" 2>/dev/null || true
        done
        for process in /proc/[0-9]*; do
            ! belongs "${process#/proc/}" "$1" || kill -$signal "${process#/proc/}" 2>/dev/null || true
        done
        sleep 0.5
    done
    rm -f "$1"/*.own
}

up() { # [--accounts] [FOLDER] [PID]
    local accounts=''
    [[ ${1:-} != --accounts ]] || { accounts=$1 && shift; }
    install "$accounts"
    folder=$(realpath -m "${1:-$(mktemp -d)}")
    configure "$folder"
    export SLURM_CONF=$folder/slurm.conf
    start munged munged -F -f --socket="$folder/munge.sock" --key-file="$folder/munge.key" \
        --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    wait_for 20 "munged did not start" test -S "$folder/munge.sock"
    [[ -z $accounts ]] || accounts
    start slurmctld slurmctld -D -c -f "$SLURM_CONF"
    for ((node = 1; node <= NODES; node++)); do start_node "n$node"; done
    wait_for 30 "the nodes did not come up" all_idle
    if [[ -n ${2:-} ]]; then setsid "$0" guard "$folder" "$2" </dev/null >/dev/null 2>&1 & fi
    echo "export SLURM_CONF=$SLURM_CONF"
}

guard() { # FOLDER PID
    while kill -0 "$2" 2>/dev/null && [[ -e $1/slurmctld.own ]]; do sleep 1; done
    stop "$1"
}

case ${1:-} in
up) shift && up "$@" ;;
down) stop "$(realpath "${2:?which folder?}")" ;;
guard) guard "$2" "$3" ;;
install) install "${2:-}" ;;
start-node) folder=$(realpath "$2") && export SLURM_CONF=$folder/slurm.conf && start_node "$3" ;;
*) sed -n '2,/^set/s/^# \{0,1\}//p' "$0" >&2 && exit 2 ;;
esac
