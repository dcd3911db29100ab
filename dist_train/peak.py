"""The peak of one training step's memory: live tensor bytes on a CPU, max_memory_allocated on a GPU."""

from __future__ import annotations

import contextlib
import gc
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# The third step of an attempt.
_MEASURED = 2


@dataclass
class Peak:
    """Filled when the `with` block of `measured` has ended."""

    before: int = 0
    """Bytes of the tensors that lived when the block began."""
    peak: int = 0
    """Most bytes of tensors that lived at one time within it."""


def live_tensor_bytes(device_type: str = "cpu") -> int:
    """Bytes of all storages that a tensor of this process refers to. What C++ alone holds is not seen."""
    return sum(storage.nbytes() for storage in _storages(device_type).values())


@contextlib.contextmanager
def measured(device: torch.device, hidden: int = 0) -> Iterator[Peak]:
    """Measure one training step: `with measured(device) as peak: step()`; then read `peak.peak`. Slows the step.

    hidden: bytes that C++ alone holds all the time, such as DDP's buckets (see `bucket_bytes`); added on a CPU.
    """
    result = Peak()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        result.before = torch.cuda.memory_allocated(device)
        yield result
        torch.cuda.synchronize(device)
        result.peak = torch.cuda.max_memory_allocated(device)
        return
    gc.collect()
    freed: list[tuple[int, int]] = []
    # The profiler tells what is allocated within the block, and its end; the end of what lived before is told by weak
    # references, for it does not know these addresses.
    watches, result.before = _watched(freed)
    result.before += hidden
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        yield result
    watches.clear()
    events = [
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    ]
    live = peak = result.before
    for _, change in sorted(events + freed):
        live += change
        peak = max(peak, live)
    result.peak = peak


class StepPeak:
    """Measures one step of an attempt, when the optimizer has its state and the allocator its blocks."""

    def __init__(self, device: torch.device, hidden_bytes: Callable[[], int]) -> None:
        self._device = device
        self._hidden_bytes = hidden_bytes
        self.peak: int | None = None
        self.step = 0
        self.shapes: tuple[tuple[int, int], ...] = ()
        """(rows, longest row) of the step's micro-batches."""

    @contextlib.contextmanager
    def around(self, index: int, step: int, shapes: tuple[tuple[int, int], ...]) -> Iterator[None]:
        """index: how many steps this attempt has done before."""
        if index != _MEASURED:
            yield
            return
        with measured(self._device, self._hidden_bytes()) as peak:
            yield
        self.peak, self.step, self.shapes = peak.peak, step, shapes


def bucket_bytes(wrapped: torch.nn.Module) -> int:
    """Bytes of the gradient buckets that DDP keeps in C++ while no gradient refers to them."""
    if not isinstance(wrapped, torch.nn.parallel.DistributedDataParallel):
        return 0
    return sum(p.nbytes for p in wrapped.parameters() if p.requires_grad and p.grad is None)


def _watched(freed: list[tuple[int, int]]) -> tuple[list[Any], int]:
    """Weak references that note in `freed` when a storage ends, and the bytes of all storages. Holds none itself."""
    watches, total = [], 0
    for storage in _storages("cpu").values():
        total += storage.nbytes()
        watches.append(weakref.ref(storage, _note(freed, storage.nbytes())))
    return watches, total


def _note(freed: list[tuple[int, int]], size: int) -> Callable[[Any], None]:
    return lambda _: freed.append((time.time_ns(), -size))


def _storages(device_type: str) -> dict[int, torch.UntypedStorage]:
    found: dict[int, torch.UntypedStorage] = {}
    for value in gc.get_objects():
        # type() and not isinstance(), which would wake lazy proxies of other packages.
        if issubclass(type(value), Tensor):
            with contextlib.suppress(RuntimeError, NotImplementedError):  # fake tensors and other wrappers
                local = value._local_tensor if hasattr(value, "_local_tensor") else value
                if local.device.type == device_type:
                    storage = local.untyped_storage()
                    found[storage._cdata] = storage
    return found
