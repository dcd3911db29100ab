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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    return sum(storage.nbytes() for storage in _storages(device_type))


@contextlib.contextmanager
def measured(device: torch.device) -> Iterator[Peak]:
    """Measure one training step: `with measured(device) as peak: step()`; then read `peak.peak`. Slows a CPU's step.

    Begin after a first step: DDP's buckets, on a CPU, are seen once their gradients were looked at from Python.
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
    deaths = _Deaths()
    live = deaths.watch_all(_storages("cpu"))
    result.before = sum(live.values())
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler, deaths:
        yield result
    deaths.close()
    # The profiler sees what this thread allocates and frees, inside kernels too; what other threads free (a
    # collective's buffers) and what was allocated before is seen by its storage's death.
    changes = [(when, address, 0) for when, address in deaths.seen]
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        if event.name.startswith(("c10d::", "gloo:")):
            continue  # gloo's own copies, which its threads free unseen; NCCL makes none
        pending.extend(event.children)
        kind, fields = event.typed
        if kind == torch._C._profiler._EventType.Allocation and fields.device.type == "cpu":
            changes.append((event.start_time_ns, fields.ptr, max(0, fields.alloc_size)))
    now = result.peak = result.before
    for _, address, size in sorted(changes):
        now += size - live.pop(address, 0)
        if size:
            live[address] = size
        result.peak = max(result.peak, now)


class StepPeak:
    """Measures one step of an attempt, when the optimizer has its state and the allocator its blocks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
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
        with measured(self._device) as peak:
            yield
        self.peak, self.step, self.shapes = peak.peak, step, shapes


class _Deaths(TorchDispatchMode):
    """Notes when storages end: those that it was told to watch, and those that operations make meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []
        self._references: dict[int, Any] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if type(leaf) is Tensor and leaf.device.type == "cpu":
                self.watch(leaf.untyped_storage())
        return result

    def watch_all(self, storages: list[torch.UntypedStorage]) -> dict[int, int]:
        """Their sizes by address. Holds none of them."""
        for storage in storages:
            self.watch(storage)
        return {storage.data_ptr(): storage.nbytes() for storage in storages}

    def watch(self, storage: torch.UntypedStorage) -> None:
        key, address = storage._cdata, storage.data_ptr()
        if key not in self._references and address:
            self._references[key] = weakref.ref(storage, self._note(key, address))

    def close(self) -> None:
        self._references.clear()

    def _note(self, key: int, address: int) -> Callable[[Any], None]:
        def note(_: Any) -> None:
            self.seen.append((time.time_ns(), address))
            self._references.pop(key, None)

        return note


def _storages(device_type: str) -> list[torch.UntypedStorage]:
    found: dict[int, torch.UntypedStorage] = {}
    for value in gc.get_objects():
        # type() and not isinstance(), which would wake lazy proxies of other packages.
        if issubclass(type(value), Tensor):
            with contextlib.suppress(RuntimeError, NotImplementedError):  # fake tensors and other wrappers
                local = value._local_tensor if hasattr(value, "_local_tensor") else value
                if local.device.type == device_type:
                    storage = local.untyped_storage()
                    found[storage._cdata] = storage
    return list(found.values())
