"""Measure a model's profile in a process of its own: the launcher never imports torch."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from dist_train.config import RunConfig
from dist_train.config_text import dump
from launcher.process import run_measurement


def measure_profile(config: RunConfig, prepared: Path, out: Path, precision: str) -> None:
    """Write the profile of the config's model to `out`. UnmeasuredError when the model cannot be built or run."""
    print("memory         measuring the model once, for this and later plans", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(dump(config, {}, "profile"), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "dist_train.activation_profile", str(file), str(prepared), str(out)]
        run_measurement([*command, precision], "the model could not be measured", {**os.environ, "PYTHONSAFEPATH": "1"})
