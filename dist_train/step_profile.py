"""Where the time of a few steps went, on each rank: the torch profiler's trace, and a summary of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from dist_train.engine import Engine
from dist_train.rundir import write_json

FIRST = 4
"""Steps of an attempt before the profiled ones: what happens once is over, the measurement of memory among it."""
_MOST_OPERATIONS = 10
# What a step consists of, and the engine's method that does it.
_PHASES = {"forward": "forward", "backward": "backward", "optimizer": "step"}
_COMMUNICATION = ("nccl", "gloo:", "mpi:", "shm:")
Span = tuple[float, float]


class StepProfile:
    """Profiles `steps` steps; none where that is None. Then it leaves no trace in the loop."""

    def __init__(self, engine: Engine, folder: Path, steps: int | None) -> None:
        self._engine, self._folder = engine, folder
        self._stop = None if steps is None else FIRST + steps
        self._profiler: Any = None

    def at(self, index: int) -> None:
        """Called before each step. index: how many steps this attempt has done."""
        if self._stop is None:
            return
        if index == FIRST:
            self._begin()
        elif index == self._stop:
            self.close()

    def close(self) -> None:
        """Write RUN/profile/rankR.json and its trace, where a profile is under way."""
        if self._profiler is None:
            return
        profiler, self._profiler = self._profiler, None
        _wait(self._engine.device)
        profiler.stop()
        for name in _PHASES.values():
            delattr(self._engine, name)  # what stood before the class's own
        self._folder.mkdir(exist_ok=True)
        name = f"rank{self._engine.rank}"
        profiler.export_chrome_trace(str(self._folder / f"{name}.trace.json.gz"))
        write_json(self._folder / f"{name}.json", _summary(profiler, self._engine.device))

    def _begin(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._engine.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        for phase, name in _PHASES.items():
            setattr(self._engine, name, _named(phase, getattr(self._engine, name)))
        _wait(self._engine.device)
        self._profiler = torch.profiler.profile(activities=activities, acc_events=True)
        self._profiler.start()


def _named(phase: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def inner(*arguments: Any, **options: Any) -> Any:
        with torch.profiler.record_function(f"phase:{phase}"):
            return method(*arguments, **options)

    return inner


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(profiler: Any, device: torch.device) -> dict[str, Any]:
    """Seconds of communication, and of it what nothing was computed beside; by phase what is left; the longest
    operations."""
    events = [event for event in profiler.events() if event.time_range.end > event.time_range.start]
    on_device = device.type == "cuda"
    communication, compute = _split(events, on_device)
    exposed = _without(communication, compute)
    spans = {phase: _spans(event for event in events if event.name == f"phase:{phase}") for phase in _PHASES}
    spans["backward"] = _without(spans["backward"], spans["forward"])  # which it calls
    whole = [event.time_range for event in events]
    averages = profiler.key_averages()
    key = "self_device_time_total" if on_device else "self_cpu_time_total"
    longest = sorted((each for each in averages if not each.key.startswith("phase:")), key=lambda e: -getattr(e, key))
    return {
        "steps": sum(event.name == "phase:optimizer" for event in events),
        "seconds": (max(each.end for each in whole) - min(each.start for each in whole)) / 1e6,
        "phases_s": {phase: _seconds(_without(own, exposed)) for phase, own in spans.items()},
        "communication_s": _seconds(communication),
        "exposed_communication_s": _seconds(exposed),
        "operations": [
            {"name": each.key, "calls": each.count, "seconds": getattr(each, key) / 1e6}
            for each in longest[:_MOST_OPERATIONS]
        ],
    }


def _split(events: list[Any], on_device: bool) -> tuple[list[Span], list[Span]]:
    """Spans of communication, and of computing: kernels on a GPU, operations of torch's own on a CPU."""
    if on_device:
        kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
        kernels = [event for event in kernels if not event.name.startswith("phase:")]
        sent = [event for event in kernels if event.name.lower().startswith(_COMMUNICATION)]
        return _spans(sent), _spans(event for event in kernels if event not in sent)
    sent = [event for event in events if event.name.startswith(_COMMUNICATION)]
    return _spans(sent), _spans(event for event in events if event.name.startswith("aten::"))


def _spans(events: Iterable[Any]) -> list[Span]:
    """The union of the events' times: disjoint, in order."""
    result: list[Span] = []
    for start, end in sorted((event.time_range.start, event.time_range.end) for event in events):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((start, end))
    return result


def _seconds(spans: Iterable[Span]) -> float:
    return sum(end - start for start, end in spans) / 1e6


def _without(first: list[Span], second: list[Span]) -> list[Span]:
    """What of `first` lies outside `second`."""
    result: list[Span] = []
    place = 0
    for start, end in first:
        while place < len(second) and second[place][1] <= start:
            place += 1
        here = place
        while here < len(second) and second[here][0] < end:
            if second[here][0] > start:
                result.append((start, second[here][0]))
            start = max(start, second[here][1])
            here += 1
        if start < end:
            result.append((start, end))
    return result
