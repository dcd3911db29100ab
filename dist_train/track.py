"""metrics.jsonl always, W&B beside it on rank 0. Tracking never stops or slows the training."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, cast

from dist_train.config import RunConfig
from dist_train.config_io import flatten
from dist_train.events import append_line, log_event
from dist_train.rundir import RunDir, write_atomic

_CLOSE_TIMEOUT_S = 10.0


class Tracker:
    """Writes the metric lines of rank 0."""

    def __init__(self, run: RunDir, config: RunConfig, attempt: int) -> None:
        self.run = run
        self.attempt = attempt
        self._upload = config.track.upload
        self._wandb = _start_wandb(run, config)

    def log(self, split: str, step: int, samples: int, values: Mapping[str, float | None]) -> None:
        """One line: the values of `split` after `step` optimizer steps and `samples` samples."""
        record = {"step": step, "samples": samples, "split": split, **values}
        append_line(self.run.metrics, {**record, "attempt": self.attempt, "time": round(time.time(), 3)})
        if self._wandb is not None:
            named = {f"{split}/{name}": value for name, value in values.items()}
            self._guard(lambda: self._wandb.log({**named, "samples": samples}, step=step))

    def finish(self, report: Mapping[str, Any]) -> None:
        """Send the test metrics, and of the report what `track.upload` allows; then close."""
        if self._wandb is not None:
            self._guard(lambda: self._send(report))

    def close(self, failed: bool) -> None:
        """Hand over what was logged when the run ends before `finish`. A host that does not answer gets seconds."""
        if self._wandb is not None:
            ending = threading.Thread(target=self._guard, args=(lambda: self._wandb.finish(exit_code=int(failed)),))
            ending.daemon = True
            ending.start()
            ending.join(_CLOSE_TIMEOUT_S)

    def _send(self, report: Mapping[str, Any]) -> None:
        import wandb

        metrics = report.get("metrics", {}).get("test", {})
        self._wandb.summary.update({f"test/{name}": entry["value"] for name, entry in metrics.items()})
        if self._upload in ("tables", "all"):
            for group, entries in report["groups"]["test"].items():
                self._wandb.log({f"test/by {group}": _group_table(group, entries)})
        if self._upload == "all":
            artifact = wandb.Artifact(f"report-{self._wandb.id}", type="report")
            artifact.add_file(str(self.run.report_html))
            self._wandb.log_artifact(artifact)
        self._wandb.finish()

    def _guard(self, action: Any) -> None:
        try:
            action()
        except Exception as error:  # whatever W&B meets, the training goes on
            print(f"W&B is off for the rest of this run: {error}", file=sys.stderr)
            log_event(self.run.events, "tracking_lost", message=str(error))
            self._wandb = None


def _group_table(group: str, entries: Mapping[str, Mapping[str, Any]]) -> Any:
    import wandb

    names = list(next(iter(entries.values())))
    rows = [
        [name, *(entry[metric]["value"] if isinstance(entry[metric], Mapping) else entry[metric] for metric in names)]
        for name, entry in entries.items()
    ]
    return wandb.Table(columns=[group, *names], data=rows)


def wandb_mode(config: RunConfig) -> str:
    """online, offline or disabled: the config, then WANDB_MODE, then whether there is a key."""
    chosen = config.track.wandb
    if chosen != "auto":
        return chosen
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].split("/")[0]
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _init_timeout_s() -> float:
    """W&B would wait a minute and a half for a host that does not answer."""
    return float(os.environ.get("WANDB_INIT_TIMEOUT", "15"))


def _start_wandb(run: RunDir, config: RunConfig) -> Any:
    mode = wandb_mode(config)
    if mode == "disabled":
        return None
    try:
        return _open_wandb(run, config, mode)
    except Exception as error:  # no key, no host, no space: the metrics are in metrics.jsonl all the same
        print(f"W&B is off: {error}", file=sys.stderr)
        log_event(run.events, "tracking_lost", message=str(error))
        return None


def _open_wandb(run: RunDir, config: RunConfig, mode: str) -> Any:
    if run.wandb_id.is_file():
        run_id = run.wandb_id.read_text().strip()
    else:
        run_id = os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:8]
        write_atomic(run.wandb_id, run_id + "\n")
    variables = os.environ
    own = {
        "id": run_id,
        "dir": str(run.path),
        "name": variables.get("WANDB_NAME") or run.name,
        "group": config.track.group or variables.get("WANDB_RUN_GROUP"),
        "job_type": config.track.job_type or variables.get("WANDB_JOB_TYPE") or "train",
        "tags": config.track.tags or [tag for tag in variables.get("WANDB_TAGS", "").split(",") if tag],
        "config": flatten(config),
    }
    return open_wandb(own, config, mode, lambda error: log_event(run.events, "tracking_offline", message=str(error)))


def open_wandb(own: Mapping[str, Any], config: RunConfig, mode: str, tell: Callable[[Exception], None]) -> Any:
    """A run of W&B. own: what is this run's alone, as wandb.init takes it. tell: hears why a run that was to be online
    is not."""
    import wandb

    start = functools.partial(
        wandb.init,
        resume="allow",
        # W&B reads its variables once a process, so they are handed over.
        project=config.track.project or os.environ.get("WANDB_PROJECT") or "dist-train",
        entity=config.track.entity or os.environ.get("WANDB_ENTITY"),
        settings=wandb.Settings(init_timeout=_init_timeout_s(), silent=True, disable_git=True, console="off"),
        **own,
    )
    # The service that W&B starts inherits what is blocked: whoever ends a whole job must not end it before us.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT))
    try:
        return start(mode=cast(Any, mode))
    except Exception as error:  # no host answers, or the key is wrong
        if mode != "online":
            raise
        tell(error)
        return start(mode="offline")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
