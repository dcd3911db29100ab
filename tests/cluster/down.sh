#!/usr/bin/env bash
# Ends the local Slurm that up.sh started in FOLDER, with all its jobs, and removes the folder.
set -euo pipefail
folder=${1:-/tmp/dist-train-cluster}
[ -d "$folder/run" ] || exit 0
export SLURM_CONF=$folder/etc/slurm.conf

# The daemons, and what a slurmd that was killed has left of its jobs: all that has this configuration, but for shells.
pids=()
[ -f "$folder/run/munged.pid" ] && pids+=("$(cat "$folder/run/munged.pid")")
for process in /proc/[0-9]*; do
    name=$(cat "$process/comm" 2>/dev/null) || continue
    case $name in
        slurmctld | slurmd | slurmstepd) ;;
        *) grep -qz "^SLURM_JOB_ID=" "$process/environ" 2>/dev/null || continue ;;
    esac
    grep -qzx "SLURM_CONF=$SLURM_CONF" "$process/environ" 2>/dev/null && pids+=("${process#/proc/}")
done
for signal in TERM KILL; do
    for pid in "${pids[@]}"; do
        kill -"$signal" "$pid" 2>/dev/null || true
    done
    for _ in $(seq 50); do
        alive=0
        for pid in "${pids[@]}"; do
            kill -0 "$pid" 2>/dev/null && alive=1
        done
        [ $alive = 0 ] && break
        sleep 0.1
    done
done
rm -rf "$folder"
