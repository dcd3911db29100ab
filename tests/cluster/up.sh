#!/usr/bin/env bash
# Starts a real Slurm on this machine: four nodes n1 to n4 on loopback, each with four CPUs and two pretended GPUs.
#
#   tests/cluster/up.sh [FOLDER]     then: export SLURM_CONF=FOLDER/etc/slurm.conf, and sbatch, squeue ... as anywhere
#
# Needs root and slurmctld, slurmd, slurm-client, munge (apt-get install). FOLDER holds all of it; down.sh ends it.
set -euo pipefail
folder=${1:-/tmp/dist-train-cluster}
here=$(cd "$(dirname "$0")" && pwd)
"$here/down.sh" "$folder"
mkdir -p "$folder"/{etc,run,state,spool,log,fake}
folder=$(cd "$folder" && pwd)
base_port=${CLUSTER_PORT:-16817}

nodes=(n1 n2 n3 n4)
{
    cat <<EOF
ClusterName=local
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$base_port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/run/munge.socket,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
MpiDefault=none
SwitchType=switch/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/log/jobcomp.txt
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=${CLUSTER_KILL_WAIT_S:-15}
SlurmdTimeout=10
ReturnToService=2
MailProg=/bin/true
EOF
    for index in "${!nodes[@]}"; do
        echo "NodeName=${nodes[$index]} NodeAddr=127.0.0.1 Port=$((base_port + 184 + index)) CPUs=4 RealMemory=4000 Gres=gpu:2"
    done
    echo "PartitionName=low Nodes=ALL Default=YES PriorityTier=1 State=UP PreemptMode=REQUEUE MaxTime=60"
    echo "PartitionName=high Nodes=ALL PriorityTier=10 State=UP PreemptMode=OFF MaxTime=60"
} > "$folder/etc/slurm.conf"
for index in 0 1; do
    [ -e "$folder/fake/gpu$index" ] || mknod "$folder/fake/gpu$index" c 1 3
done
echo "NodeName=n[1-4] Name=gpu File=$folder/fake/gpu[0-1]" > "$folder/etc/gres.conf"
{ cat /etc/hosts; printf '127.0.0.1 %s\n' "${nodes[@]}"; } > "$folder/etc/hosts"
export SLURM_CONF=$folder/etc/slurm.conf

(umask 077 && dd if=/dev/urandom of="$folder/etc/munge.key" bs=1024 count=1 status=none)
munged --force --socket="$folder/run/munge.socket" --key-file="$folder/etc/munge.key" --pid-file="$folder/run/munged.pid" \
    --log-file="$folder/log/munged.log" --seed-file="$folder/run/munged.seed"
with_hosts="mount --bind $folder/etc/hosts /etc/hosts"
unshare -m sh -c "$with_hosts; exec slurmctld -f $SLURM_CONF"
for node in "${nodes[@]}"; do
    # A host name of its own, and names that resolve, as on a machine of its own.
    unshare -u -m sh -c "hostname $node; $with_hosts; exec slurmd -f $SLURM_CONF -N $node"
done

for _ in $(seq 100); do
    idle=$(timeout 5 sinfo -h -p low -t idle -o %D 2>/dev/null || true)
    [ "${idle:-0}" = "${#nodes[@]}" ] && break
    sleep 0.1
done
if [ "${idle:-0}" != "${#nodes[@]}" ]; then
    echo "the cluster did not start: see $folder/log" >&2
    exit 1
fi
echo "four nodes are idle. Use them with: export SLURM_CONF=$SLURM_CONF"
