#!/usr/bin/env bash
# A SLURM cluster of virtual nodes on this machine, to try jobs and failing nodes on. As root, on Debian or Ubuntu.
#
#   slurm/cluster.sh up [NODES]       start it, 3 nodes unless told; installs SLURM from the distribution where it is missing
#   slurm/cluster.sh status           its nodes and jobs; exit code 1 where none is up
#   slurm/cluster.sh crash K          node K loses power
#   slurm/cluster.sh cut K            node K loses its network, and its processes continue
#   slurm/cluster.sh freeze K         node K's processes stop; thaw K lets them continue
#   slurm/cluster.sh heal K           undo any of these: node K boots, is connected, continues
#   slurm/cluster.sh exec K CMD...    run a command on node K
#   slurm/cluster.sh down             end it and leave nothing
#   slurm/cluster.sh install          what `up` does first: the packages, without starting any service
#
# Nodes have a host name, a network, processes and shared memory of their own and share all files with this machine.
# Partitions: main, and high, which preempts main's jobs and puts them back into the queue. A lost node is noticed in about 15 s.
#
# Environment of `up`: CPUS=4, MEMORY=8000 (MiB) and GPUS=0 of each node, which are pretended; GRACE=0, the seconds between the
# signal of a job (sbatch --signal) and its end when it is preempted, where 0 means that it gets SIGTERM at once.
#
# The cluster is one PID namespace: when its first process ends, the kernel ends every other, and the links go with them.

set -euo pipefail
umask 022
STATE=/run/fulltune-slurm
CONF=/etc/slurm/slurm.conf # in addition to SLURM_CONF, for programs that drop SLURM_* from the environment
NETWORK=198.18.77          # a range set aside for trying networks: it collides with nobody's
SELF=$(realpath "$0")
export SLURM_CONF=$STATE/slurm.conf
: "${CPUS:=4}" "${MEMORY:=8000}" "${GPUS:=0}" "${GRACE:=0}"
PACKAGES=(slurmctld slurmd slurm-client munge iproute2)

refuse() { # THING REMEDY
    echo "error: $1: $2" >&2
    exit 2
}

need_root() { [ "$(id -u)" = 0 ] || refuse "a virtual cluster needs root" "sudo $SELF $*"; }

install() {
    local name missing=''
    for name in slurmctld slurmd sbatch munged ip; do command -v "$name" >/dev/null || missing="$missing $name"; done
    [ -n "$missing" ] || return 0
    command -v apt-get >/dev/null || refuse "not installed:$missing" "install SLURM and munge; apt-get, which would do it, is not here"
    echo "installing ${PACKAGES[*]}"
    local policy=/usr/sbin/policy-rc.d ours='' # Debian's way to say that installing a service does not start it
    [ -e "$policy" ] || { ours=1 && printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy"; }
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${PACKAGES[@]}"; } >/dev/null || missing=failed
    [ -z "$ours" ] || rm -f "$policy"
    [ "$missing" != failed ] || refuse "apt-get could not install ${PACKAGES[*]}" "see its message above"
}

configure() { # NODES
    local nodes=$1 gres='' k
    mkdir "$STATE"/{log,controller}
    (umask 077 && head -c 128 /dev/urandom >"$STATE/munge.key")
    if [ "$GPUS" -gt 0 ]; then
        # SLURM counts any file as a GPU, but sets CUDA_VISIBLE_DEVICES only for devices.
        for ((k = 0; k < GPUS; k++)); do ln -s /dev/null "$STATE/gpu$k"; done
        gres="Gres=gpu:$GPUS"
        echo "Name=gpu File=$STATE/gpu[0-$((GPUS - 1))]" >"$STATE/gres.conf"
    fi
    # The plugin that is found by itself wants to make cgroups, which nothing here uses.
    echo "CgroupPlugin=cgroup/v1" >"$STATE/cgroup.conf"
    # Asking a name server that nodes cannot reach costs ten seconds for each name.
    sed 's/^hosts:.*/hosts: files/' /etc/nsswitch.conf >"$STATE/nsswitch.conf"
    { printf '%s\n' "127.0.0.1 localhost" "$NETWORK.254 controller" && for ((k = 1; k <= nodes; k++)); do echo "$NETWORK.$k node$k"; done; } >"$STATE/hosts"
    {
        cat <<END
ClusterName=fulltune
SlurmctldHost=controller($NETWORK.254)
SlurmUser=root
# Job ids of an earlier cluster would meet that cluster's files.
FirstJobId=$(($(date +%s) % 600000 * 100 + 1))
# cred_expire is also how long a job waits that goes back into the queue.
AuthInfo=socket=$STATE/munge.socket,cred_expire=5
SlurmctldPidFile=$STATE/slurmctld.pid
SlurmdPidFile=$STATE/slurmd.%n.pid
SlurmctldLogFile=$STATE/log/controller
SlurmdLogFile=$STATE/log/%n
StateSaveLocation=$STATE/controller
SlurmdSpoolDir=$STATE/spool.%n
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
DefMemPerCPU=$((MEMORY / CPUS))
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout=5
MessageTimeout=5
KillWait=5
# Without accounting this is how long \`scontrol show job\` and \`squeue -t all\` tell how a job ended.
MinJobAge=3600
NodeName=DEFAULT CPUs=$CPUS RealMemory=$MEMORY $gres
PartitionName=main Nodes=ALL Default=YES DefaultTime=60 PriorityTier=1 GraceTime=$GRACE
PartitionName=high Nodes=ALL DefaultTime=60 PriorityTier=2 PreemptMode=OFF
END
        [ -z "$gres" ] || echo GresTypes=gpu
        # Without a grace time the signal would meet the SIGTERM that ends the job.
        [ "$GRACE" = 0 ] || echo SlurmctldParameters=preempt_send_user_signal
        for ((k = 1; k <= nodes; k++)); do echo "NodeName=node$k NodeAddr=$NETWORK.$k"; done
    } >"$SLURM_CONF"
    echo "export SLURM_CONF=$SLURM_CONF" >"$STATE/env"
}

up() {
    local nodes=${1:-3}
    [[ "$nodes $CPUS $MEMORY" =~ ^[1-9][0-9]{0,2}( [1-9][0-9]*){2}$ && "$nodes" -le 200 ]] ||
        refuse "NODES=$nodes CPUS=$CPUS MEMORY=$MEMORY" "whole numbers above 0, at most 200 nodes"
    [[ "$GPUS $GRACE" =~ ^[0-9]+\ [0-9]+$ ]] || refuse "GPUS=$GPUS GRACE=$GRACE" "whole numbers"
    need_root up "$nodes"
    install
    unshare --net --uts --ipc --pid --mount --fork sh -c 'ip link add type bridge && ip link add type veth' 2>/dev/null ||
        refuse "no namespaces and links may be made here" "a virtual machine, or a container started with --privileged"
    mkdir -p "$STATE"
    exec 9>>"$STATE/lock" # held by the cluster as long as one of its processes lives
    { flock -n 9 && [ "$STATE/lock" -ef /proc/self/fd/9 ]; } || refuse "a cluster is up already" "$SELF status shows it, $SELF down ends it"
    trap 'exec 9>&-; down' EXIT
    trap 'exit 130' INT TERM HUP
    sweep
    [ ! -e "$CONF" ] || refuse "$CONF exists, this machine belongs to another cluster" "take another machine"
    configure "$nodes"
    ln -s "$SLURM_CONF" "$CONF"
    env -i PATH="$PATH" HOME=/root LANG=C.UTF-8 SLURM_CONF="$SLURM_CONF" \
        setsid unshare --net --uts --ipc --pid --mount --fork --kill-child "$SELF" controller "$nodes" \
        </dev/null >"$STATE/log/start" 2>&1 8</proc/self/ns/net &
    exec 9>&-
    SECONDS=0
    until [ "$(timeout 1 sinfo -hN -p main -t idle -o %N 2>/dev/null | wc -l)" = "$nodes" ]; do
        if ! is_up || [ "$SECONDS" -gt 90 ]; then
            tail -n 5 "$STATE"/log/* >&2
            echo "error: the cluster did not start; the last lines of its logs are above" >&2
            exit 1
        fi
        sleep 0.1
    done
    trap - EXIT
    cat <<END
A cluster of $nodes nodes is up (node1 to node$nodes; $CPUS CPUs, $MEMORY MiB, $GPUS GPUs each). Partitions: main, and high, which preempts main.
    . $STATE/env                      # sets SLURM_CONF
    srun --nodes=$nodes hostname
    sbatch --nodes=2 slurm/train.sbatch +exp=quickstart_base launch=torchrun launch.processes=1
    $SELF down                        # ends it; --help tells how nodes are crashed, cut and frozen
Logs: $STATE/log
END
}

is_up() { [ -e "$STATE/lock" ] && ! flock -n "$STATE/lock" true; }

# The first process of the cluster's namespaces, in a network of its own without a firewall; 8 is this machine's network.
controller() { # NODES
    local k
    read -r k _ </proc/self/stat && echo "$k" >"$STATE/pid" # /proc is still this machine's, so that is our number there
    hostname controller
    mount --bind "$STATE/hosts" /etc/hosts # of the nodes too, which start from here
    mount --bind "$STATE/nsswitch.conf" /etc/nsswitch.conf
    ip link set lo up
    # A bridge takes the lowest address of its links, and a node would get a new one each time: old ones are remembered for a minute.
    ip link add name switch address 02:00:00:00:00:fe type bridge
    ip address add "$NETWORK.254/24" dev switch
    ip link set switch up
    ip link add name login type veth peer name fulltune-slurm netns /proc/self/fd/8
    ip link set login master switch up
    nsenter --net=/proc/self/fd/8 ip address add "$NETWORK.253/24" dev fulltune-slurm
    nsenter --net=/proc/self/fd/8 ip link set fulltune-slurm up
    munged --key-file="$STATE/munge.key" --socket="$STATE/munge.socket" --pid-file="$STATE/munged.pid" \
        --log-file="$STATE/log/munged" --seed-file="$STATE/munge.seed"
    for ((k = 1; k <= $1; k++)); do boot "$k"; done
    slurmctld -D & # its end is the cluster's
    wait $!
}

boot() { # K: start a node from the controller's namespaces and wait for it: a controller that looks for absent nodes stalls
    { setsid unshare --net --uts --ipc --pid --mount --fork "$SELF" node "$1" || true; rm -f "$STATE/node$1"; } \
        </dev/null >"$STATE/log/start.node$1" 2>&1 8</proc/self/ns/net &
    until [ -e "$STATE/node$1" ]; do kill -0 $! && sleep 0.02; done
}

# The first process of a node's namespaces, which collects orphans as slurmd would not; 8 is the controller's network.
node() { # K
    local pid
    read -r pid _ </proc/self/stat
    mount -t proc proc /proc
    mount -t tmpfs tmpfs /dev/shm
    hostname "node$1"
    ip link set lo up
    ip link add name eth0 address "$(printf 02:00:00:00:00:%02x "$1")" type veth peer name "node$1" netns /proc/self/fd/8
    nsenter --net=/proc/self/fd/8 ip link set "node$1" master switch up
    ip address add "$NETWORK.$1/24" dev eth0
    ip link set eth0 up
    echo "$pid" >"$STATE/node$1"
    slurmd -D -N "node$1" 8<&- 9>&- &
    wait
}

on_controller() { nsenter -t "$(cat "$STATE/pid")" -m -u -i -n -p -- "$@"; }
on_node() { nsenter -t "$(cat "$STATE/node$1")" -m -u -i -n -p -- "${@:2}"; }

crash() { # the link goes first: a machine without power closes no connection
    on_controller ip link delete "node$1"
    kill -9 "$(cat "$STATE/node$1")"
    while [ -e "$STATE/node$1" ] && is_up; do sleep 0.05; done
}

heal() {
    if [ -e "$STATE/node$1" ]; then
        on_controller ip link set "node$1" up
        thaw "$1"
    else
        on_controller "$SELF" boot "$1"
    fi
}

cut() { on_controller ip link set "node$1" down; }
freeze() { on_node "$1" bash -c 'kill -STOP -1'; } # all of the node but its first process, which only waits
thaw() { on_node "$1" bash -c 'kill -CONT -1'; }
# shellcheck disable=SC2016
exec_on() { on_node "$1" sh -c 'cd "$0" && exec "$@"' "$PWD" "${@:2}"; }

status() {
    is_up || { echo "no cluster is up" && exit 1; }
    timeout 10 sinfo -N -p main -o '%N %T %c CPUs %m MiB %G %E'
    timeout 10 squeue
}

down() {
    [ -d "$STATE" ] || return 0
    exec 9>>"$STATE/lock"
    local tries
    for ((tries = 0; tries < 100; tries++)); do
        # While the lock is held the number is that of the cluster's first process, or will be there in a moment.
        ! flock -w 0.1 9 || { sweep && rm -rf "$STATE" && return; }
        [ ! -s "$STATE/pid" ] || kill -9 "$(cat "$STATE/pid")" 2>/dev/null || true
    done
    refuse "the cluster did not end" "another $SELF up may be under way: try again"
}

sweep() { # what a dead cluster left
    [ "$(readlink "$CONF")" != "$SLURM_CONF" ] || rm -f "$CONF"
    ip link delete fulltune-slurm 2>/dev/null || true # the kernel would, a little later
    find "$STATE" -mindepth 1 ! -name lock -delete
}

of_node() { # COMMAND K ...: where a cluster with that node is up
    need_root "$@"
    is_up || refuse "no cluster is up" "$SELF up"
    grep -q "^NodeName=node${2:-} " "$SLURM_CONF" || refuse "no node \`${2:-}\`" "the number of a node: $(grep -c 'NodeAddr' "$SLURM_CONF") are up"
    [ "$1" = heal ] || [ -e "$STATE/node$2" ] || refuse "node$2 has crashed" "$SELF heal $2"
}

case ${1:-} in
up) up "${@:2}" ;;
down) need_root "$@" && down ;;
status) status ;;
install) need_root "$@" && install ;;
crash | cut | heal | freeze | thaw) of_node "$@" && "$1" "$2" ;;
exec) of_node "$@" && exec_on "${@:2}" ;;
controller | node | boot) "$@" ;; # called by the cluster itself
-h | --help | help) sed -n '2,/^$/s/^# \{0,1\}//p' "$SELF" ;;
*) refuse "command \`${1:-}\`" "up, status, crash, cut, freeze, thaw, heal, exec, down, install; --help tells more" ;;
esac
