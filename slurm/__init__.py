"""Slurm: what a job's environment says. Never imports torch."""
