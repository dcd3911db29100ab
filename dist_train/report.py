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
from dist_train.errors import DataError
from dist_train.events import read_lines
from dist_train.metrics import bootstrap_weights, interval
from dist_train.plan import LaunchPlan
from dist_train.recipe import Recipe
from dist_train.rundir import RunDir, read_json, write_atomic, write_json

SPLITS = ("validation", "test")
# Apart from the run's seed: the same predictions have the same intervals, whoever trained them.
_BOOTSTRAP_SEED = 20_240_229
_TEMPLATES = Path(__file__).parent / "templates"

Interval = dict[str, float | None]


def build_report(
    run: RunDir, recipe: Recipe, config: RunConfig, say: Callable[[str], None], results: RunDir | None = None
) -> dict[str, Any]:
    """Train the baselines if need be, measure all, and write the three files. Returns what report.json holds.

    results: where predictions lie and the files go, if not in the run itself (a checkpoint that is not the best one).
    """
    results = results or run
    score = recipe.score
    facts = read_json(run.data_facts)
    baselines = score.baselines(Path(facts["folder"]), say)
    say(f"writing the report ({config.eval.bootstrap_samples} bootstrap samples a split)")
    measures, measured = {}, {}
    for split in SPLITS:
        tables = {"model": _read_predictions(run, results.prediction_file(split))}
        tables |= {name: tables_of[split] for name, tables_of in baselines.items()}
        for name, table in tables.items():
            if not table["row"].equals(tables["model"]["row"]):
                raise DataError(f"the {name} predictions of the {split} split are of other rows than the model's.")
        measures[split] = {name: score.measure(table) for name, table in tables.items()}
        measured[split] = measure_models(measures[split], config.eval.bootstrap_samples, score.COMPARED)
    lines = _last_attempts(run)
    report = {
        "run": run.name if results is run else f"{run.name}, {results.name}",
        "recipe": config.recipe,
        "headline": list(score.HEADLINE),
        "metrics": {split: measured[split]["metrics"]["model"] for split in SPLITS},
        "classes": {split: measured[split]["classes"]["model"] for split in SPLITS},
        "confusion": {split: measures[split]["model"].confusion().astype(int).tolist() for split in SPLITS},
        "baselines": {name: {split: measured[split]["metrics"][name] for split in SPLITS} for name in baselines},
        "about_baselines": dict(score.BASELINES),
        "comparison": measured["test"]["comparison"],
        "verdicts": _verdicts(measured["test"], score.BASELINES),
        "intervals": f"95 %, {config.eval.bootstrap_samples} bootstrap samples of rows; differences are paired",
        "data": facts,
        "training": _training(run, lines),
        "plan": LaunchPlan.from_json(read_json(run.plan)).to_json(),
        "environment": read_json(run.environment),
        "repeat": [f"dist-train run {run.path}/config.yaml", f"dist-train report {run.path}"],
    }
    figures = [plots.curves(lines, config.eval.metric or score.METRIC, report["training"]["best_step"])]
    figures += score.figures(measures["test"], report["classes"]["test"])
    write_json(results.report_json, report)
    context = {"report": report, "table": summary_table(report), "config": run.config.read_text()}
    write_atomic(results.report_md, _render("report.md.j2", context))
    write_atomic(results.report_html, _render("report.html.j2", {**context, "figures": figures}))
    return report


def _read_predictions(run: RunDir, path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error})"
        raise DataError(f"{path} {what}: evaluate again with dist-train eval {run.path}") from error


def summary_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Model and baselines on the test split with intervals, then each paired difference; a header row first."""
    names = report["headline"]
    rows = [["test split", *names]]
    tables = {"model": report["metrics"]["test"]}
    tables |= {name: splits["test"] for name, splits in report["baselines"].items()}
    for name, metrics in tables.items():
        rows.append([name, *(show_interval(metrics[metric]) for metric in names)])
    for name, differences in report["comparison"].items():
        shown = (show_interval(differences[m], signed=True) if m in differences else "" for m in names)
        rows.append([f"model - {name}", *shown])
    return rows


def show_interval(entry: Mapping[str, Any], signed: bool = False) -> str:
    if entry["value"] is None:
        return "not defined"
    sign = "+" if signed else ""
    return f"{entry['value']:{sign}.4f} [{entry['low']:{sign}.4f}, {entry['high']:{sign}.4f}]"


def measure_models(models: Mapping[str, Any], samples: int, compared: tuple[str, ...]) -> dict[str, Any]:
    """Values with intervals of each model of one split; every model meets the same draws, so differences are paired."""
    points = {name: model.values() for name, model in models.items()}
    drawn: dict[str, dict[str, list[float]]] = {name: {metric: [] for metric in points[name]} for name in models}
    for weights in bootstrap_weights(models["model"].rows, samples, _BOOTSTRAP_SEED):
        for name, model in models.items():
            for metric, value in model.values(weights).items():
                drawn[name][metric].append(value)
    arrays = {name: {metric: np.array(values) for metric, values in each.items()} for name, each in drawn.items()}
    result: dict[str, Any] = {"metrics": {}, "classes": {}, "comparison": {}}
    for name, model in models.items():
        entries = {metric: interval(value, arrays[name][metric]) for metric, value in points[name].items()}
        result["metrics"][name] = {
            metric: entry for metric, entry in entries.items() if not metric.startswith("class/")
        }
        support = model.confusion().sum(1)
        result["classes"][name] = {
            label: {
                "support": int(support[index]),
                **{metric: entries[f"class/{label}/{metric}"] for metric in ("precision", "recall", "f1")},
            }
            for index, label in enumerate(model.labels)
        }
        if name != "model":
            result["comparison"][name] = {
                metric: interval(
                    points["model"][metric] - points[name][metric], arrays["model"][metric] - arrays[name][metric]
                )
                for metric in compared
            }
    return result


def _verdicts(measured: Mapping[str, Any], about: Mapping[str, str]) -> list[str]:
    """Plain sentences: does the model beat each baseline, on each compared metric?"""
    sentences = []
    for name, differences in measured["comparison"].items():
        for metric, entry in differences.items():
            model, other = (measured["metrics"][each][metric]["value"] for each in ("model", name))
            if entry["low"] > 0:
                verb = "beats"
            elif entry["high"] < 0:
                verb = "is WORSE than"
            else:
                verb = "is not shown to differ from"
            sentences.append(
                f"The model {verb} the {name} baseline ({about[name]}) on {metric}: {model:.4f} against {other:.4f}, "
                f"difference {show_interval(entry, signed=True)}."
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
        "last_step": training[-1]["step"] if training else 0,
        "samples": training[-1]["samples"] if training else 0,
        "samples_per_s": mean("samples_per_s"),
        "tokens_per_s": mean("tokens_per_s"),
        "padding_share": mean("padding_share"),
        "memory_gib": max((line["memory_gib"] for line in training if line.get("memory_gib")), default=None),
        "attempts": len(starts),
        # Up to the first model folder: a report that is made again later says the same.
        "seconds_to_model": round(exports[0]["time"] - starts[0], 1) if starts and exports else None,
        "skipped_steps": [event["step"] for event in events if event["event"] == "nonfinite_step"],
    }


def _render(name: str, context: Mapping[str, Any]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["interval"] = show_interval
    # A cell of a Markdown table ends at a bar or a line's end.
    environment.filters["cell"] = lambda value: str(value).replace("|", "\\|").replace("\n", " ")
    return environment.get_template(name).render(context)
