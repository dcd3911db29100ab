"""report.json, report.md and report.html of a run, from its kept predictions. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dist_train import plots
from dist_train.config import RunConfig
from dist_train.errors import ConfigError, DataError
from dist_train.events import read_lines
from dist_train.init_from import started_from
from dist_train.metrics import interval
from dist_train.plan import LaunchPlan
from dist_train.recipe import load_recipe
from dist_train.rundir import RunDir, read_json, write_atomic, write_json
from dist_train.score import Score, by_group, is_of_group

SPLITS = ("validation", "test")
_TEMPLATES = Path(__file__).parent / "templates"

Interval = dict[str, float | None]


def build_report(
    run: RunDir, score: Score, config: RunConfig, say: Callable[[str], None], results: RunDir | None = None
) -> dict[str, Any]:
    """Train the baselines if need be, measure all, and write the three files. Returns what report.json holds.

    results: where predictions lie and the files go, if not in the run itself (a checkpoint that is not the best one).
    """
    results = results or run
    facts = read_json(run.data_facts)
    baselines = score.baselines(Path(facts["folder"]), config, say)
    say(f"writing the report ({config.eval.bootstrap_samples} bootstrap samples a split)")
    tables: dict[str, dict[str, pa.Table]] = {}
    measured = {}
    for split in SPLITS:
        tables[split] = {"model": _read_predictions(run, results.prediction_file(split))}
        tables[split] |= {name: tables_of[split] for name, tables_of in baselines.items()}
        for name, table in tables[split].items():
            if not table["row"].equals(tables[split]["model"]["row"]):
                raise DataError(f"the {name} predictions of the {split} split are of other rows than the model's.")
        measured[split] = measure_models(tables[split], score, config.eval.bootstrap_samples)
    lines = _last_attempts(run)
    conditions = _conditions(run, results, tables["test"]["model"], score, config.eval.bootstrap_samples)
    report = {
        "run": run.name if results is run else f"{run.name}, {results.name}",
        "recipe": Path(config.recipe).name,
        "headline": list(score.headline),
        "metrics": {split: measured[split]["metrics"]["model"] for split in SPLITS},
        "groups": {split: measured[split]["groups"]["model"] for split in SPLITS},
        "details": {split: score.details(tables[split]["model"]) for split in SPLITS},
        "baselines": {name: {split: measured[split]["metrics"][name] for split in SPLITS} for name in baselines},
        "about_baselines": dict(score.about_baselines),
        "comparison": measured["test"]["comparison"],
        "conditions": conditions,
        "profile": [read_json(path) for path in sorted(run.profile.glob("rank*.json"))],
        "latency": read_json(run.latency) if run.latency.is_file() else None,
        "best_baseline": best_baseline(measured["validation"]["metrics"], score),
        "verdicts": _gain(measured, score) + _verdicts(measured["test"], score),
        "remarks": score.remarks(measured["test"]["metrics"]["model"]),
        "intervals": f"95 %, {config.eval.bootstrap_samples} bootstrap samples of {score.sampled}; "
        "differences are paired",
        "data": facts,
        "started_from": started_from(run),
        "training": _training(run, lines),
        "plan": LaunchPlan.from_json(read_json(run.plan)).to_json(),
        "environment": read_json(run.environment),
        "repeat": _commands(run, config),
    }
    kept_by = report["training"]["kept_by"] or config.eval.metric or score.metric
    figures = [plots.curves(lines, kept_by, report["training"]["best_step"])]
    figures += score.figures(tables["test"], report["groups"]["test"], Path(facts["folder"]))
    write_json(results.report_json, report)
    context = {"report": report, "table": summary_table(report), "config": run.config.read_text()}
    write_atomic(results.report_md, render("report.md.j2", context))
    write_atomic(results.report_html, render("report.html.j2", {**context, "figures": figures}))
    if results is run and run.model_record.is_file():
        write_atomic(run.best / "README.md", _model_card(run, report))
    return report


def _conditions(run: RunDir, results: RunDir, clean: pa.Table, score: Score, samples: int) -> dict[str, Any]:
    """Headline metrics of the test split under each other condition, and how far they fall below those of the split as
    it is, over the same bootstrap samples."""
    tables = {name: _read_predictions(run, path) for name, path in results.conditions().items()}
    if not tables:
        return {}
    measured = measure_models({"model": clean, **tables}, score, samples)
    shown = [name for name in score.headline if name in measured["metrics"]["model"]]
    return {
        name: {
            "metrics": {metric: measured["metrics"][name][metric] for metric in shown},
            "fall": measured["comparison"][name],
        }
        for name in tables
    }


def _commands(run: RunDir, config: RunConfig) -> list[str]:
    """How to do it again; nothing for a task that a program of the user's made itself."""
    try:
        load_recipe(config.recipe)
    except ConfigError:
        return []
    return [f"dist-train run {run.path}/config.yaml", f"dist-train report {run.path}"]


def _model_card(run: RunDir, report: dict[str, Any]) -> str:
    """The card beside the model: what was measured, what it was made from, how to use it."""
    record = read_json(run.model_record)
    record["recipe_name"] = Path(record["recipe"]).name  # a recipe of one's own is named by its folder
    return render("model_card.md.j2", {"report": report, "record": record})


def _read_predictions(run: RunDir, path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
        raise DataError(f"{path} {what}: evaluate again with dist-train eval {run.path}") from error


def summary_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Model and baselines on the test split with intervals, then each paired difference; a header row first."""
    # What a recipe measures may depend on its task.
    names = [name for name in report["headline"] if name in report["metrics"]["test"]]
    rows = [["test split", *names]]
    tables = {"model": report["metrics"]["test"]}
    tables |= {name: splits["test"] for name, splits in report["baselines"].items()}
    for name, metrics in tables.items():
        rows.append([name, *(show_interval(metrics[metric]) if metric in metrics else "" for metric in names)])
    for name, differences in report["comparison"].items():
        shown = (show_interval(differences[m], signed=True) if m in differences else "" for m in names)
        rows.append([f"model - {name}", *shown])
    return rows


def show_interval(entry: Mapping[str, Any], signed: bool = False) -> str:
    if entry["value"] is None:
        return "not defined"
    sign = "+" if signed else ""
    return f"{entry['value']:{sign}.4f} [{entry['low']:{sign}.4f}, {entry['high']:{sign}.4f}]"


def measure_models(models: Mapping[str, pa.Table], score: Score, samples: int) -> dict[str, Any]:
    """Values with intervals of each model of one split; every model meets the same draws, so differences are paired."""
    measures = {name: score.values(table) for name, table in models.items()}
    rows = models["model"].num_rows
    points = {name: values(np.ones(rows)) for name, values in measures.items()}
    drawn: dict[str, dict[str, list[float]]] = {name: {metric: [] for metric in points[name]} for name in models}
    for weights in score.draws(models["model"], samples):
        for name, values in measures.items():
            for metric, value in values(weights).items():
                drawn[name][metric].append(value)
    arrays = {name: {metric: np.array(values) for metric, values in each.items()} for name, each in drawn.items()}
    result: dict[str, Any] = {"metrics": {}, "groups": {}, "comparison": {}}
    for name in models:
        entries: dict[str, Any] = {
            # How many rows a group has is a count, not an estimate.
            metric: int(value) if metric.endswith("/rows") else interval(value, arrays[name][metric])
            for metric, value in points[name].items()
        }
        result["metrics"][name] = {metric: entry for metric, entry in entries.items() if not is_of_group(metric)}
        result["groups"][name] = by_group(entries)
        if name != "model":
            result["comparison"][name] = {
                metric: interval(
                    points["model"][metric] - points[name][metric], arrays["model"][metric] - arrays[name][metric]
                )
                for metric in score.compared
                if metric in points["model"]
            }
    return result


def best_baseline(metrics: Mapping[str, Any], score: Score) -> str | None:
    """The baseline that the model is held against first: of validation's metrics the best one."""
    known = {
        name: score.sign(score.metric) * values[score.metric]["value"]
        for name, values in metrics.items()
        if name != "model" and values.get(score.metric, {}).get("value") is not None
    }
    return max(known, key=lambda name: known[name]) if known else None


def _gain(measured: Mapping[str, Any], score: Score) -> list[str]:
    """Where there are several baselines, the sentence on the best of them; chosen on the validation split, so that the
    test split is not asked twice."""
    best = best_baseline(measured["validation"]["metrics"], score)
    differences = measured["test"]["comparison"].get(best, {})
    if len(measured["test"]["comparison"]) < 2 or score.metric not in differences:
        return []
    entry = differences[score.metric]
    verb = _verb(entry, score.sign(score.metric))
    return [
        f"Against the best baseline on the validation split, {best}, the model {verb} it on the test split: "
        f"{score.metric} {show_interval(entry, signed=True)}."
    ]


def _verb(entry: Mapping[str, Any], sign: float) -> str:
    ends = [sign * entry[end] for end in ("low", "high") if entry[end] is not None]
    if ends and min(ends) > 0:
        return "beats"
    return "is WORSE than" if ends and max(ends) < 0 else "is not shown to differ from"


def _verdicts(measured: Mapping[str, Any], score: Score) -> list[str]:
    """Plain sentences: does the model beat each baseline, on each compared metric?"""
    sentences = []
    for name, differences in measured["comparison"].items():
        for metric, entry in differences.items():
            model, other = (measured["metrics"][each][metric]["value"] for each in ("model", name))
            verb = _verb(entry, score.sign(metric))
            shown = ["not defined" if value is None else f"{value:.4f}" for value in (model, other)]
            sentences.append(
                f"The model {verb} the {name} baseline ({score.about_baselines[name]}) on {metric}: {shown[0]} against "
                f"{shown[1]}, difference {show_interval(entry, signed=True)}."
            )
    return sentences


def _last_attempts(run: RunDir) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in the order of steps; where a step stands twice, that of the last attempt."""
    newest = {(line["split"], line["step"]): line for line in read_lines(run.metrics)}
    return sorted(newest.values(), key=lambda line: (line["step"], line["split"]))


def _training(run: RunDir, lines: list[dict[str, Any]]) -> dict[str, Any]:
    events = list(read_lines(run.events))
    training = [line for line in lines if line["split"] == "train"]
    exports = [event for event in events if event["event"] == "exported"]
    starts = [event["time"] for event in events if event["event"] == "run_started"]

    def mean(key: str) -> float | None:
        values = [line[key] for line in training if line.get(key) is not None]
        return round(float(np.mean(values)), 4) if values else None

    return {
        "best_step": exports[-1]["step"] if exports else None,
        "kept_by": next((event["metric"] for event in reversed(events) if event.get("improved")), None),
        "last_step": training[-1]["step"] if training else 0,
        "samples": training[-1]["samples"] if training else 0,
        "samples_per_s": mean("samples_per_s"),
        "tokens_per_s": mean("tokens_per_s"),
        "padding_share": mean("padding_share"),
        "input_wait_share": mean("input_wait_share"),
        "memory_gib": max((line["memory_gib"] for line in training if line.get("memory_gib")), default=None),
        "attempts": len(starts),
        # Up to the first model folder: a report that is made again later says the same.
        "seconds_to_model": round(exports[0]["time"] - starts[0], 1) if starts and exports else None,
        "skipped_steps": [event["step"] for event in events if event["event"] == "nonfinite_step"],
    }


def render(name: str, context: Mapping[str, Any]) -> str:
    """The template of this name, filled."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["interval"] = show_interval
    environment.filters["entry"] = lambda value: str(value) if isinstance(value, int) else show_interval(value)
    # A cell of a Markdown table ends at a bar or a line's end.
    environment.filters["cell"] = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    return environment.get_template(name).render(context)
