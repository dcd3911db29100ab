"""dist-train plan: the resolved settings, what each strategy needs, and what would be started; for any hardware."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

from rich import box
from rich.table import Table

from dist_train import config_io, config_text
from dist_train.errors import ConfigError
from dist_train.fit import gib
from dist_train.hardware import Gpu, Hardware, detect_hardware
from dist_train.memory_facts import model_facts
from dist_train.plan import LaunchPlan, make_plan
from dist_train.prepared import epoch_rows
from dist_train.recipe import load_recipe
from dist_train.start_run import check_metric, pinned, prepare_data, print_plan
from launcher.measure import measure_profile
from launcher.preflight import check_gpus, check_imports
from launcher.summary import open_console

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(GiB|GB|G)?", re.IGNORECASE)
# Runs whose prediction is held against what they measured, the newest ones.
_RUNS_LOOKED_AT = 20


def show_plan(recipe_name: str, overrides: list[str], gpu_memory: str | None) -> None:
    """Print it all. The data is read and prepared, the model is measured once, nothing is started."""
    loaded = config_io.load(recipe_name, overrides)
    config = loaded.config
    count = config.parallel.processes_per_node or 1
    hardware = detect_hardware() if gpu_memory is None else imagined_hardware(count, gpu_memory, "--gpu-memory")
    check_imports()
    print(config_text.dump(config, loaded.sources, config.name or "not named yet"))
    recipe = load_recipe(config.recipe)
    check_metric(config, recipe)
    config = pinned(loaded, recipe).config
    data = prepare_data(config, recipe, loaded.sources)
    device = "cuda" if hardware.gpus else "cpu"
    facts = model_facts(config, recipe, data, device, measure_profile)
    plan = make_plan(config, hardware, epoch_rows(config, recipe, data), facts=facts)
    if gpu_memory is None:
        check_gpus(plan, hardware)
    _print_memory(plan)
    print(_past_errors(config.output_dir))
    print_plan(None, plan)


def imagined_hardware(count: int, gpu_memory: str, asked_with: str) -> Hardware:
    """The hardware that was asked about: so many GPUs of this memory."""
    match = _SIZE.fullmatch(gpu_memory.strip())
    if match is None:
        raise ConfigError(f"{asked_with} is {gpu_memory}, but must be a size such as 80GiB.")
    memory = float(match[1]) * (10**9 / 2**30 if (match[2] or "").lower() == "gb" else 1.0)
    gpus = tuple(Gpu(index, f"planned-{index}", f"a GPU of {gpu_memory}", memory) for index in range(count))
    return Hardware("planned", "not known", cores=8 * count, memory_gib=0.0, gpus=gpus)


def _print_memory(plan: LaunchPlan) -> None:
    assert plan.memory_budget is not None
    names = ("parameters", "gradients", "optimizer", "EMA", "copies", "activations", "temporaries", "buffers")
    title = f"GiB of one rank at its peak, and sent in a step; {gib(plan.memory_budget)} may be used"
    table = Table("strategy", *names, "peak", "fits", "micro-batches", "sent", title=title, title_justify="left",
                  box=box.SIMPLE_HEAD)  # fmt: skip
    for entry in plan.fits:
        seen = entry.estimate
        parts = (seen.parameters, seen.gradients, seen.optimizer, seen.ema, seen.copies)
        more = (seen.activations, seen.temporaries, seen.communication, seen.peak)
        mark = "chosen" if entry.strategy == plan.strategy else "yes" if entry.fits else "no"
        cells = [f"{value / 2**30:.2f}" for value in (*parts, *more)]
        table.add_row(entry.strategy, *cells, mark, str(entry.micro_batches), f"{seen.sent / 2**30:.2f}")
    open_console().print(table)
    print("temporaries hold logits and casts; buffers are those of the collectives")
    chosen = next(entry.estimate for entry in plan.fits if entry.strategy == plan.strategy)
    if chosen.host:
        print(f"offload        {gib(chosen.host)} of the CPU's memory for each rank")
    print(f"peak           in the {chosen.moment}")


def _past_errors(output_dir: Path) -> str:
    """How far earlier predictions were from what the runs then measured."""
    files = sorted(output_dir.glob("*/memory.json"), key=lambda path: path.stat().st_mtime)[-_RUNS_LOOKED_AT:]
    errors = [json.loads(file.read_text())["error"] for file in files]
    if not errors:
        return f"prediction     no run below {output_dir} has measured its peak yet"
    mean, lowest = statistics.mean(map(abs, errors)), min(0.0, *errors)
    return (
        f"prediction     in the last {len(errors)} runs below {output_dir} it was off by {mean:.1%} on average; "
        f"the furthest below what was measured: {lowest:.1%}"
    )
