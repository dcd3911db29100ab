"""Plans and trains. Knows no recipe by name and nothing of `launcher` or `slurm`."""

__version__ = "0.1.0"
