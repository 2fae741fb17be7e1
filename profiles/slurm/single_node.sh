#!/usr/bin/env bash
# A SLURM of this one machine, to try profiles/slurm before it goes to a cluster. As root, on Debian or Ubuntu after
#
#   apt-get install slurm-wlm munge
#   profiles/slurm/single_node.sh [FOLDER]     start it; its configuration and logs go into FOLDER
#   profiles/slurm/single_node.sh stop
#
# No network port is reachable from elsewhere: all daemons listen on 127.0.0.1.
set -euo pipefail

if [ "${1:-}" = stop ]; then
    pkill -x slurmd || true
    pkill -x slurmctld || true
    pkill -x munged || true
    exit
fi
for daemon in munged slurmctld slurmd; do
    command -v "$daemon" > /dev/null || { echo "no $daemon here: apt-get install slurm-wlm munge"; exit 1; }
done
[ "$(id -u)" = 0 ] || { echo "the daemons need root"; exit 1; }

folder=$(realpath -m "${1:-/tmp/slurm}")
mkdir -p "$folder"/{state,spool} /run/munge
chown munge: /run/munge
chmod 755 /run/munge
[ -s /etc/munge/munge.key ] || { dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 status=none
    chown munge: /etc/munge/munge.key; chmod 400 /etc/munge/munge.key; }
host=$(hostname -s)
memory=$(awk '/MemTotal/ {print int($2 / 1024 * 0.9)}' /proc/meminfo)
cat > "$folder/slurm.conf" <<CONF
ClusterName=single
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
MinJobAge=300
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
mkdir -p /etc/slurm
ln -sf "$folder/slurm.conf" /etc/slurm/slurm.conf
pgrep -x munged > /dev/null || runuser -u munge -- munged
pgrep -x slurmctld > /dev/null || slurmctld
pgrep -x slurmd > /dev/null || slurmd
for _ in $(seq 30); do
    if sinfo -h -o %T 2> /dev/null | grep -q idle; then
        sinfo
        exit
    fi
    sleep 1
done
echo "no idle node after 30 s: see $folder/slurmctld.log and $folder/slurmd.log"
exit 1
