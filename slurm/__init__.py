"""Slurm: the script of a job, what the cluster says, what a job says of itself. Never imports torch."""
