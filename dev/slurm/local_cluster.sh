#!/usr/bin/env bash
# Make this machine a real Slurm cluster of one node, to try job arrays and preemption.
# It needs Debian or Ubuntu, and root.
#   bash dev/slurm/local_cluster.sh start    installs slurm-wlm and munge, starts them, shows the node
#   bash dev/slurm/local_cluster.sh stop     cancels all jobs and stops the daemons
set -euo pipefail

CONF=/etc/slurm/slurm.conf        # where sbatch, squeue and the daemons find it
STATE=/var/tmp/local_cluster      # spool, state and logs; every start deletes them
MARK="# written by dev/slurm/local_cluster.sh"

fail() { echo "error: $1" >&2; exit 2; }
running() { [ -f "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }

install_slurm() {
  command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
  command -v apt-get >/dev/null || fail "slurmctld, slurmd or munged is missing, and so is apt-get"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
}

write_conf() {
  mkdir -p "$(dirname "$CONF")"
  # No cgroups, because a container cannot use them. Slurm finds processes through /proc and limits nothing.
  # A job in the partition `urgent` preempts jobs in the partition `main`.
  # cred_expire: the time, in seconds, that a requeued job waits. The default is 2 minutes.
  cat > "$CONF" <<END
$MARK
ClusterName=local
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation=$STATE/ctld
SlurmdSpoolDir=$STATE/slurmd
SlurmctldPidFile=$STATE/slurmctld.pid
SlurmdPidFile=$STATE/slurmd.pid
SlurmctldLogFile=$STATE/slurmctld.log
SlurmdLogFile=$STATE/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
KillWait=30
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2
$(slurmd -C | head -n 1) NodeAddr=127.0.0.1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2
END
}

idle() { [ "$(sinfo --noheader --format=%t 2>/dev/null | sort -u)" = idle ]; }

start() {
  [ "$(id -u)" = 0 ] || fail "start: the daemons want root; use sudo"
  install_slurm
  if [ -f "$CONF" ] && ! grep -qF "$MARK" "$CONF"; then
    fail "$CONF: this machine belongs to a Slurm cluster already; use that one, or move the file away"
  fi
  if running "$STATE/slurmctld.pid" && running "$STATE/slurmd.pid"; then
    sinfo
    return
  fi
  rm -rf "$STATE"
  mkdir -p "$STATE/ctld" "$STATE/slurmd"
  write_conf
  if ! munge -n 2>/dev/null | unmunge >/dev/null 2>&1; then
    install -d -o munge -g munge -m 755 /run/munge
    runuser -u munge -- munged
    touch "$STATE/munged_is_ours"
  fi
  slurmctld -c
  slurmd -c
  for _ in $(seq 30); do
    idle && break
    sleep 1
  done
  sinfo
  idle || fail "the node does not come up; see $STATE/slurmctld.log and $STATE/slurmd.log"
}

stop() {
  if running "$STATE/slurmctld.pid"; then
    squeue --noheader --format=%A | sort -u | xargs -r scancel || true
    for _ in $(seq 40); do
      [ -z "$(squeue --noheader)" ] && break
      sleep 1
    done
    scontrol shutdown
  fi
  for _ in $(seq 20); do
    running "$STATE/slurmctld.pid" || running "$STATE/slurmd.pid" || break
    sleep 0.5
  done
  [ ! -f "$STATE/munged_is_ours" ] || runuser -u munge -- munged --stop
  rm -rf "$STATE"
  if [ -f "$CONF" ] && grep -qF "$MARK" "$CONF"; then
    rm "$CONF"
  fi
}

case "${1:-}" in
  start|stop) "$1" ;;
  *) fail "usage: bash dev/slurm/local_cluster.sh start|stop" ;;
esac
