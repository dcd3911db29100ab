#!/bin/bash
#SBATCH --job-name=first
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --output=/runs/first/logs/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --account=vision
#SBATCH --partition=gpu
#SBATCH --time=1-00:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --gres=gpu:a100:8
#SBATCH --exclusive
#SBATCH --comment="ticket routing"

module load cuda/12.8 || exit 2
export NCCL_IB_HCA=mlx5
export PYTHONSAFEPATH=1
export PYTHONPATH=/runs/first/code${PYTHONPATH:+:$PYTHONPATH}

# Before the time limit Slurm tells this script alone, and this script one launcher, which runs on this node: to signal
# the step would reach every process in it.
pid_file=/runs/first/.head.pid"${SLURM_ARRAY_TASK_ID:-}"
rm -f "$pid_file"
tell_launcher() {
    until kill -USR1 "$(cat "$pid_file" 2>/dev/null)" 2>/dev/null; do sleep 1; done
}
trap 'tell_launcher &' USR1
# TERM means that the job is cancelled or preempted: all have got it; what comes then is not for this script to decide.
ended=
trap 'ended=1' TERM
srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=180 python -m launcher node /runs/a &
child=$!
# A signal ends the waiting, not the child.
while kill -0 "$child" 2>/dev/null; do
    wait "$child"
done
wait "$child"
code=$?
# 75: all is saved and there is more to do. 14: a node or rank was missing. Above 128: a launcher was killed.
if [ "$code" -eq 75 ] || [ "$code" -eq 14 ] || [ "$code" -gt 128 ]; then
    if [ "${SLURM_RESTART_COUNT:-0}" -ge 50 ]; then
        echo "not requeued: it was 50 times (slurm.requeues)"
        exit "$code"
    fi
    # In an array this task alone.
    job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
    job=${job:-$SLURM_JOB_ID}
    for _ in 1 2 3 4 5 6; do
        [ -z "$ended" ] || break
        echo "exit code $code: the job requeues itself"
        now=$(scontrol show job "$job" -o | sed -n 's/.* Restarts=\([0-9]*\) .*/\1/p')
        if [ -n "$now" ] && [ "$now" != "${SLURM_RESTART_COUNT:-0}" ]; then
            echo "it has started again without this node"
            break
        fi
        scontrol requeue "$job" && sleep 300
        sleep 5
    done
fi
exit "$code"
