#!/usr/bin/env bash
# Ends the local Slurm that up.sh started in FOLDER, with all its jobs, and removes the folder.
set -euo pipefail
folder=${1:-/tmp/dist-train-cluster}
[ -d "$folder/run" ] || exit 0
export SLURM_CONF=$folder/etc/slurm.conf

pids=()
for file in "$folder"/run/*.pid; do
    [ -f "$file" ] && pids+=("$(cat "$file")")
done
# What a slurmd that was killed has left of its jobs: each step has a daemon of its own.
pids+=($(pgrep -f "slurmstepd.*" || true))
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
