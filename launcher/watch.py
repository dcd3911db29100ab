"""Show a run while it trains: progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import codecs
import json
import sys
import time
from pathlib import Path
from typing import IO, Any

from dist_train.plan import LaunchPlan
from dist_train.rundir import RunDir

# Off a terminal, a line of progress at most so often.
_PLAIN_EVERY_S = 10.0
_CHUNK_BYTES = 1 << 20


class Follower:
    """Reads the lines that were added to a JSONL file since the last look."""

    def __init__(self, path: Any, from_end: bool) -> None:
        self.path = path
        self._position = path.stat().st_size if from_end and path.exists() else 0

    def new_lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with open(self.path, "rb") as stream:
            stream.seek(self._position)
            data = stream.read()
        whole, newline, _ = data.rpartition(b"\n")
        self._position += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines() if line]


class Watch:
    """Called often while the ranks run; prints what is new."""

    def __init__(self, run: RunDir, plan: LaunchPlan, last_step: int, stream: IO[str] | None = None) -> None:
        self._metrics = Follower(run.metrics, from_end=True)
        self._events = Follower(run.events, from_end=True)
        self._last_step = last_step
        self._plan = plan
        self._stream = stream or sys.stdout
        self._bar: Any = None
        self._shown_at = 0.0
        self._evaluation: tuple[float, int, Any] | None = None
        """When one was first told of, how far it was then, and its bar."""
        if self._stream.isatty():
            self._bar = _make_bar(last_step)

    def __call__(self) -> None:
        for record in self._events.new_lines():
            if record["event"] == "evaluating":
                self._show_evaluation(record)
                continue
            self._end_evaluation()
            text = _event_text(record)
            if text:
                self._say(text)
        for record in self._metrics.new_lines():
            if record["split"] == "train":
                self._show_step(record)
            else:
                self._say(_evaluation_text(record))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _show_step(self, record: dict[str, Any]) -> None:
        step, loss = record["step"], record.get("loss")
        rate = record.get("samples_per_s") or 0.0
        left = (self._last_step - step) * self._plan.global_batch_size / rate if rate else 0.0
        shown = "not finite" if loss is None else f"{loss:.4f}"
        if self._bar is not None:
            self._bar.start()
            task = self._bar.task_ids[0]
            text = f"loss {shown}  {rate:,.0f} samples/s  {_duration(left)} left"
            self._bar.update(task, completed=step, text=text)
            return
        now = time.monotonic()
        if now - self._shown_at >= _PLAIN_EVERY_S or step >= self._last_step:
            self._shown_at = now
            self._say(
                f"step {step}/{self._last_step}  loss {shown}  {rate:,.0f} samples/s  "
                f"padding {record.get('padding_share') or 0:.0%}  {_duration(left)} left"
            )

    def _show_evaluation(self, record: dict[str, Any]) -> None:
        done, total = record["done"], record["total"]
        if self._evaluation is None:
            bar = None
            if self._bar is not None:
                self._bar.start()
                bar = self._bar.add_task(f"evaluating {record['split']}", total=total, text="")
            self._evaluation = record["time"], done, bar
        began, first, bar = self._evaluation
        rate = (done - first) / max(record["time"] - began, 1e-9)
        left = f"{_duration((total - done) / rate)} left" if rate > 0 else ""
        if bar is not None:
            self._bar.update(bar, completed=done, text=left)
        elif time.monotonic() - self._shown_at >= _PLAIN_EVERY_S:
            self._shown_at = time.monotonic()
            self._say(f"evaluating the {record['split']} split: {done:,} of {total:,} batches  {left}".rstrip())

    def _end_evaluation(self) -> None:
        if self._evaluation is not None and self._evaluation[-1] is not None:
            self._bar.remove_task(self._evaluation[-1])
        self._evaluation = None

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self._stream, flush=True)


def _make_bar(last_step: int) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
    ]
    bar = Progress(*columns, refresh_per_second=4)
    bar.add_task("training", total=last_step, text="")
    return bar


def _event_text(record: dict[str, Any]) -> str | None:
    event = record["event"]
    if event == "resumed":
        return f"resumed at step {record['step']}: {record['summary']}"
    if event == "checkpoint_damaged":
        return f"damaged checkpoint passed over: {record['file']} {record['what']}"
    if event == "nonfinite_step":
        return f"step {record['step']} had a gradient that is not finite and was skipped (rows {record['rows'][:8]} …)"
    if event == "tracking_lost":
        return f"W&B is off for this attempt: {record['message']}"
    if event == "tracking_offline":
        return f"W&B works offline in this attempt, `wandb sync` sends it later: {record['message']}"
    if event == "progress":
        return str(record["message"])
    return None


def _evaluation_text(record: dict[str, Any]) -> str:
    hidden = ("step", "samples", "split", "attempt", "time")
    values = [f"{name} {value:.4f}" for name, value in record.items() if name not in hidden and _is_short(name, value)]
    return f"step {record['step']}  {record['split']}: " + "  ".join(values[:5])


def _is_short(name: str, value: Any) -> bool:
    return isinstance(value, float) and "/" not in name


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class LogTail:
    """Called often while the ranks run; shows what is new in a log."""

    def __init__(self, path: Path, stream: IO[str] | None = None) -> None:
        self._path = path
        self._stream = stream or sys.stdout
        self._position = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self) -> None:
        if not self._path.exists():
            return
        with open(self._path, "rb") as log:
            log.seek(self._position)
            while data := log.read(_CHUNK_BYTES):
                self._position += len(data)
                self._stream.write(self._decoder.decode(data))
        self._stream.flush()
