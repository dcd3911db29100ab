"""The softmax over a catalogue in blocks, beside torch's own over all logits: equal, as fast, and flat in memory.

    python -m benchmarks.catalogue_loss

Prints one JSON line for each of: memory at 1,000,000 items beyond queries, item table and their gradients; the largest
differences of loss and gradients at 10,000; seconds at 50,000, in turns with torch's.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.recsys.losses import full_softmax

TARGETS, WIDTH = 2048, 64


def main() -> None:
    torch.manual_seed(0)
    # First, before the allocator keeps anything that others have freed.
    print(json.dumps(_memory(1_000_000)), flush=True)
    print(json.dumps(_difference(10_000)), flush=True)
    print(json.dumps(_times(50_000, 7)), flush=True)


def _blocks(queries: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    return full_softmax(queries, table, targets, None, None)


def _plain(queries: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(queries @ table.T, targets, reduction="none")


def _leaves(items: int) -> tuple[Tensor, Tensor, Tensor]:
    queries, table = torch.randn(TARGETS, WIDTH) * 0.3, torch.randn(items, WIDTH)
    return queries.requires_grad_(), table.requires_grad_(), torch.randint(0, items, (TARGETS,))


def _difference(items: int) -> dict[str, float]:
    queries, table, targets = _leaves(items)
    results = []
    for loss in (_blocks, _plain):
        value = loss(queries, table, targets)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), (queries, table))))
    names = ("loss", "queries_gradient", "table_gradient")
    pairs = zip(names, *results, strict=True)
    return {"items": items} | {name: float((ours - plain).abs().max()) for name, ours, plain in pairs}


def _times(items: int, repeats: int) -> dict[str, float]:
    queries, table, targets = _leaves(items)
    seconds: dict[str, list[float]] = {"blocks_s": [], "torch_s": []}

    def once(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
        queries.grad = table.grad = None
        began = time.perf_counter()
        loss(queries, table, targets).sum().backward()
        return time.perf_counter() - began

    for _ in range(repeats):
        for name, loss in (("blocks_s", _blocks), ("torch_s", _plain)):
            seconds[name].append(once(loss))
    medians = {name: sorted(values)[repeats // 2] for name, values in seconds.items()}
    return {
        "items": items,
        "threads": torch.get_num_threads(),
        **medians,
        "ratio": medians["blocks_s"] / medians["torch_s"],
    }


def _memory(items: int) -> dict[str, float]:
    """The largest private memory while the loss runs, less what it was before and the gradients that it leaves."""
    queries, table, targets = _leaves(items)
    process, peak, done = psutil.Process(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, process.memory_full_info().uss)

    before = process.memory_full_info().uss
    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    _blocks(queries, table, targets).sum().backward()
    seconds = time.perf_counter() - began
    done.set()
    watcher.join()
    gradients = (queries.numel() + table.numel()) * 4
    return {
        "items": items,
        "beyond_mib": (peak - before - gradients) / 2**20,
        "gradients_mib": gradients / 2**20,
        "s": seconds,
    }


if __name__ == "__main__":
    main()
