"""What a scaling study leaves: a table in the terminal, scale.json, scale.csv, and one HTML page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_train import plots
from dist_train.report import render
from dist_train.rundir import write_atomic, write_json
from dist_train.scaling import flat_table
from launcher.study import print_table

Entry = Mapping[str, Any]
_COLUMNS = (
    ("size", "name", "{}"),
    ("ranks", "ranks", "{}"),
    ("samples/s", "samples_per_s", "{:,.0f}"),
    ("tokens/s", "tokens_per_s", "{:,.0f}"),
    ("step, ms", "step_s", "{:.2f}"),
    ("speed-up", "speed_up", "{:.2f}"),
    ("efficiency", "efficiency", "{:.0%}"),
    ("spread", "spread", "{:.1%}"),
    ("waits for input", "input_wait_share", "{:.1%}"),
    ("padding", "padding_share", "{:.0%}"),
    ("memory, GiB", "memory_gib", "{:.2f}"),
    ("planned", "predicted_gib", "{:.2f}"),
    ("cost of 1 M samples", "cost_per_million_samples", "{:.2f}"),
)


def write(folder: Path, study: Mapping[str, Any]) -> None:
    """Keep and print it."""
    write_json(folder / "scale.json", dict(study))
    entries = study["sizes"]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows(flat_table(entries))
    write_atomic(folder / "scale.csv", stream.getvalue())
    rows, sentences = _rows(entries), _sentences(study)
    context = {
        "study": study,
        "about": _about(study),
        "table": rows,
        "sentences": sentences,
        "figures": [_speed(study), *_time(entries), _memory(entries)],
        "runs": [f"{entry['name']}-r{repeat}" for entry in entries for repeat in range(entry["repeats"])],
    }
    write_atomic(folder / "scale.html", render("study.html.j2", context))
    print_table(rows, f"{folder}: {_about(study)}", sentences)
    print(f"\nkept in {folder}: scale.html, scale.csv and scale.json")


def _rows(entries: Sequence[Entry]) -> list[list[str]]:
    shown = [column for column in _COLUMNS if any(entry[column[1]] is not None for entry in entries)]
    rows = [[title for title, _, _ in shown]]
    for entry in entries:
        values = {**entry, "step_s": 1000 * entry["step_s"]}
        rows.append([pattern.format(values[key]) if values[key] is not None else "" for _, key, pattern in shown])
    return rows


def _about(study: Mapping[str, Any]) -> str:
    asked, hardware = study["asked"], study["hardware"]
    batch = f"global batch {study['global_batch_size']}"
    kept = batch if asked["mode"] == "strong" else f"{batch} at the smallest size, growing with the ranks"
    devices = f"{len(hardware['gpus'])} x {hardware['gpus'][0]}" if hardware["gpus"] else hardware["cpu"]
    threads = "" if hardware["gpus"] else f", {study['threads_per_rank']} thread(s) a rank"
    return (
        f"{asked['recipe']}, {kept}; {asked['steps']} steps after {asked['warm_up']} of warm-up, "
        f"{asked['repeats']} repeats, interleaved; {hardware['host']}, {devices}, {hardware['cores']} cores{threads}"
    )


def _sentences(study: Mapping[str, Any]) -> list[str]:
    found = [f"{entry['name']}: {flag}." for entry in study["sizes"] for flag in entry["flags"]]
    loads = max(entry["load"] for entry in study["sizes"])
    clocks = sorted({entry["clock_mhz"] for entry in study["sizes"] if entry["clock_mhz"]})
    clock = f", clock {clocks[0]:.0f} to {clocks[-1]:.0f} MHz" if clocks else ""
    found.append(f"Load of the machine before a repeat: at most {loads:.1f}{clock}.")
    for strategy, fit in study["fits"].items():
        parts = " + ".join(f"{1000 * weight:.2f} ms x {term}" for term, weight in fit["terms"].items() if weight)
        worst = max(map(abs, fit["residuals"]))
        freedom = f"off by at most {worst:.1%}" if fit["has_freedom"] else "exact, since it has as many terms as sizes"
        found.append(f"Fit of {strategy}: a step on n ranks takes {parts} ({freedom}).")
        ahead = ", ".join(f"{each['ranks']} ranks {1000 * each['step_s']:.2f} ms" for each in fit["predictions"])
        found.append(f"PREDICTION of {strategy}, not measured: a step takes on {ahead}.")
    found += [f"{name} FAILED: {cause.splitlines()[0]}" for name, cause in study["failed"].items()]
    if study["failed"]:
        found.append("Run what is missing: the same command with --resume.")
    return found


def _speed(study: Mapping[str, Any]) -> dict[str, str]:
    figure, (left, right) = plots.make_axes(2, 8.6, 3.2)
    by_strategy: dict[str, list[Entry]] = {}
    for entry in study["sizes"]:
        by_strategy.setdefault(entry["strategy"], []).append(entry)
    for (strategy, entries), colour in zip(by_strategy.items(), plots.COLOURS, strict=False):
        ranks = [entry["ranks"] for entry in entries]
        left.plot(ranks, [entry["speed_up"] for entry in entries], "o-", color=colour, label=strategy)
        right.plot(ranks, [entry["efficiency"] for entry in entries], "o-", color=colour, label=strategy)
        for entry in entries:
            rates = entry["samples_per_s_by_repeat"]
            ends = [rate / entry["samples_per_s"] * entry["speed_up"] for rate in (min(rates), max(rates))]
            left.plot([entry["ranks"]] * 2, ends, color=colour, linewidth=1)
    every = sorted({entry["ranks"] for entry in study["sizes"]})
    left.plot(every, [count / every[0] for count in every], "--", color="0.6", label="ideal")
    right.axhline(1.0, linestyle="--", color="0.6", label="ideal")
    left.set(xlabel="ranks", ylabel="speed-up", xticks=every)
    right.set(xlabel="ranks", ylabel="efficiency", xticks=every, ylim=(0, None))
    left.legend()
    caption = "Median over the repeats; the thin bars reach from the slowest to the fastest repeat."
    return plots.picture(figure, "Speed-up and efficiency", caption)


def _time(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """The split of a step, where there is one."""
    split = [entry for entry in entries if entry["split"] is not None]
    if not split:
        return []
    figure, (axes,) = plots.make_axes(1, 6.4, 3.2)
    places, below = range(len(split)), [0.0] * len(split)
    for part, colour in zip(split[0]["split"], (*plots.COLOURS, "0.8"), strict=True):
        heights = [1000 * entry["step_s"] * entry["split"][part] for entry in split]
        axes.bar(places, heights, 0.6, bottom=below, label=part, color=colour)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    axes.set_xticks(places, [plots.plain(entry["name"]) for entry in split])
    axes.set(ylabel="ms a step")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    caption = (
        "The median step by the shares of profiled ones, means over the ranks. Exposed: nothing is computed beside."
    )
    return [plots.picture(figure, "Where a step's time goes", caption)]


def _memory(entries: Sequence[Entry]) -> dict[str, str]:
    figure, (axes,) = plots.make_axes(1, 6.0, 3.0)
    places = range(len(entries))
    axes.bar([place - 0.2 for place in places], [entry["memory_gib"] for entry in entries], 0.4, label="measured",
             color=plots.COLOURS[0])  # fmt: skip
    planned = [(place + 0.2, entry["predicted_gib"]) for place, entry in enumerate(entries) if entry["predicted_gib"]]
    if planned:
        axes.bar(*zip(*planned, strict=True), 0.4, label="planned", color=plots.COLOURS[1])
    axes.set_xticks(places, [plots.plain(entry["name"]) for entry in entries])
    axes.set(ylabel="GiB a rank")
    axes.legend()
    return plots.picture(
        figure, "Memory of a step", "The peak of one step on the fullest rank, and what the plan said."
    )
