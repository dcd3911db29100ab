"""dist-train parity: the same training under every strategy and split, and how far the results lie apart."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from dist_train import config_io
from dist_train.errors import NumericError, ToolkitError
from dist_train.hardware import detect_hardware
from dist_train.rundir import RunDir
from launcher.start import run_for_a_check
from launcher.summary import open_console

_COMPARED = ("losses", "gradient_norms", "gradients")


@dataclass(frozen=True)
class Case:
    strategy: str
    ranks: int
    micro_batches: int

    @property
    def name(self) -> str:
        return f"{self.strategy}-{self.ranks}-ranks-{self.micro_batches}-micro-batches"


@dataclass(frozen=True)
class Outcome:
    case: Case
    differences: dict[str, float]
    """Largest relative difference over the steps by name; empty when the case could not run."""
    failure: str | None = None


def cases(ranks: int) -> list[Case]:
    """The first is what the others are held against: one process, one micro-batch."""
    split = [Case(strategy, ranks, 1) for strategy in ("ddp", "zero1", "zero2", "zero3", "fsdp")]
    return [Case("single", 1, 1), Case("single", 1, 2), *split, *(Case(case.strategy, ranks, 2) for case in split)]


def check_parity(
    recipe: str, settings: list[str], ranks: int | None, steps: int, tolerance: float | None
) -> list[Outcome]:
    """Run all cases and print the table. NumericError past the tolerance, or when the model cannot be equal."""
    gpus = len(detect_hardware().gpus)
    ranks = ranks or gpus or 2
    if tolerance is None:
        tolerance = 1e-3 if gpus else 1e-5
    config = config_io.load(recipe, settings).config
    fixed = ["track.wandb=disabled", f"train.stop_after_steps={steps}"]
    if "model.dropout" in config_io.flatten(config):
        fixed.append("model.dropout=0")
        print("model.dropout is 0 here: random masks differ by rank")
    if config.train.precision == "auto":
        fixed.append("train.precision=fp32")
    config.output_dir.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="parity-", dir=config.output_dir))
    outcomes: list[Outcome] = []
    reference: RunDir | None = None
    obstacles: list[str] = []
    for case in cases(ranks):
        print(f"{case.name} ...", flush=True)
        run, failure = _run(recipe, [*settings, *fixed], case, config.train.global_batch_size, folder)
        if reference is None:
            if run is None:
                raise NumericError(f"the reference, one process, could not be trained:\n{failure}")
            reference, obstacles = run, _read(run)["obstacles"]
        outcomes.append(Outcome(case, compare(reference, run) if run else {}, failure))
        if run is not None and run is not reference:
            shutil.rmtree(run.parity)  # whole gradients of every step
    _print_table(outcomes, steps)
    _judge(outcomes, obstacles, tolerance, folder)
    shutil.rmtree(folder)
    print(f"\nequal: no difference is above {tolerance:g}.")
    return outcomes


def _run(
    recipe: str, settings: list[str], case: Case, global_batch_size: int, folder: Path
) -> tuple[RunDir | None, str | None]:
    """The run of a case, or why there is none. What it prints goes to a file beside it."""
    own = [
        *(f"name={case.name}", f"output_dir={folder}", f"parallel.strategy={case.strategy}"),
        f"parallel.processes_per_node={case.ranks}",
        f"train.micro_batch_size={-(-global_batch_size // (case.ranks * case.micro_batches))}",
    ]
    with open(folder / f"{case.name}.log", "w", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            return run_for_a_check(recipe, [*settings, *own], "--parity"), None
        except ToolkitError as error:
            return None, str(error)


def compare(reference: RunDir, other: RunDir) -> dict[str, float]:
    """The largest relative differences over the steps; of the weights, the difference over what training changed."""
    first, second = _read(reference), _read(other)
    differences = {}
    for name in ("losses", "gradient_norms"):
        mine, theirs = np.array(first[name]), np.array(second[name])
        differences[name] = float(np.max(np.abs(mine - theirs) / np.abs(mine)))
    mine, theirs = (np.load(run.parity / "gradients.npy", mmap_mode="r") for run in (reference, other))
    differences["gradients"] = max(
        float(np.linalg.norm(a - b) / np.linalg.norm(a)) for a, b in zip(mine, theirs, strict=True)
    )
    (start, end), (_, other_end) = (np.load(run.parity / "weights.npy") for run in (reference, other))
    differences["weights"] = float(np.linalg.norm(end - other_end) / np.linalg.norm(end - start))
    return differences


def _read(run: RunDir) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run.parity / "parity.json").read_text())
    return value


def _print_table(outcomes: list[Outcome], steps: int) -> None:
    names = ("loss", "gradient norm", "gradient", "weights / update")
    title = f"largest relative difference from one process over {steps} steps"
    table = Table("strategy", "ranks", "micro-batches", *names, title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for outcome in outcomes:
        case = outcome.case
        values = [f"{value:.1e}" for value in outcome.differences.values()] or ["failed", "", "", ""]
        table.add_row(case.strategy, str(case.ranks), str(case.micro_batches), *values)
    open_console().print(table)


def _judge(outcomes: list[Outcome], obstacles: list[str], tolerance: float, folder: Path) -> None:
    """NumericError with all that is wrong; the logs then stay."""
    wrong = [f"{o.case.name} failed: {o.failure}" for o in outcomes if o.failure is not None]
    wrong += [
        f"{o.case.name}: {name.replace('_', ' ')} differ by {o.differences[name]:.1e}, more than {tolerance:g}"
        for o in outcomes
        for name in _COMPARED
        # Not `>`: a difference that is NaN is one.
        if o.differences and not o.differences[name] <= tolerance
    ]
    if wrong and obstacles:
        wrong.append("this model cannot be equal under every split: " + "; ".join(obstacles))
    if wrong:
        raise NumericError("\n".join(wrong) + f"\nLogs and curves of all cases: {folder}")
