"""Measure once what a training step needs beside weights: python -m dist_train.activation_profile CONFIG FOLDER …

Under fake tensors, which have shapes and no memory, so that a model of any size is measured in seconds anywhere; where
a model's shapes depend on its data, by a small real pass on the CPU.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_train.blocks import checkpoint_activations, repeated_blocks
from dist_train.config import OptimConfig, RunConfig
from dist_train.config_io import load
from dist_train.errors import ToolkitError, UnmeasuredError
from dist_train.layers import prepare_layers
from dist_train.model_profile import (
    NO_GRADIENT,
    OUTSIDE,
    ModelProfile,
    Parameter,
    Timeline,
    store_profile,
)
from dist_train.recipe import load_recipe
from dist_train.task import Batch, Task

# Rows at which the peaks are measured: with few rows copies of weights rule, with many the activations do.
_FAKE_ROWS = (1, 4, 32)
_REAL_ROWS = (1, 4, 16)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, for as long as they live. What a kernel takes for itself
    inside one operation is not seen."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, Any] = {}
        self._known = {_key(tensor) for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        return result

    def add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key in self._known or key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self._references[key] = weakref.ref(storage, lambda _: self.remove(key))
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)

    def remove(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
        self._references.pop(key, None)

    def forget(self, tensor: Tensor) -> None:
        """Count this tensor no more: it is a finished gradient."""
        key = _key(tensor)
        self.remove(key)
        self._known.add(key)

    def take_peak(self) -> int:
        peak, self.peak = self.peak, self.live
        return peak


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class Recorder:
    """Cuts one step into the intervals of a Timeline."""

    def __init__(self, model: nn.Module, block_of: dict[str, int]) -> None:
        self.tracker = StorageTracker([*model.parameters(), *model.buffers()])
        self.in_backward = False
        self.block = OUTSIDE
        self.intervals: list[tuple[bool, int, int]] = []
        self.peaks: list[int] = []
        self.starts: list[int] = []
        self._start = 0
        self._handles: list[Any] = []
        for index, block in enumerate(repeated_blocks(model)):
            self._handles.append(block.register_forward_pre_hook(self._entering(index)))
            self._handles.append(block.register_forward_hook(self._leaving()))
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.requires_grad:
                hook = self._finished(index, block_of[name])
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def cut(self, gradient: int = NO_GRADIENT, block: int | None = None) -> None:
        self.intervals.append((self.in_backward, self.block if block is None else block, gradient))
        self.peaks.append(self.tracker.take_peak())
        self.starts.append(self._start)
        self._start = self.tracker.live

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _entering(self, index: int) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self.cut()
            self.block = index

        return hook

    def _leaving(self) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.cut()
            self.block = OUTSIDE

        return hook

    def _finished(self, index: int, block: int) -> Any:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self.tracker.forget(parameter.grad)
            self.cut(index, block)

        return hook


def measure(
    task: Task, precision: str, checkpointing: bool, lengths: tuple[int, int], optim: OptimConfig
) -> ModelProfile:
    """The profile of `task`'s model, as far as `optim` trains it. lengths: (shortest, longest) row."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return _measure(task, precision, checkpointing, lengths, optim, _FAKE_ROWS, mode)
    except ToolkitError:
        raise
    except Exception as error:
        # Not every model runs on fake tensors: shapes that depend on data, numpy, kernels of its own.
        print(f"no profile under fake tensors ({type(error).__name__}: {error}); a small real pass instead")
        return _measure(task, precision, checkpointing, lengths, optim, _REAL_ROWS, None)


def _measure(
    task: Task,
    precision: str,
    checkpointing: bool,
    lengths: tuple[int, int],
    optim: OptimConfig,
    rows: tuple[int, ...],
    mode: FakeTensorMode | None,
) -> ModelProfile:
    model = task.build_model()
    layers = prepare_layers(model, getattr(task, "is_head", None), optim)
    block_of = _blocks_of_parameters(model)
    parameters = tuple(
        Parameter(name, tuple(p.shape), block_of[name], p.requires_grad, p.numel(), layers.depth[name])
        for name, p in model.named_parameters()
    )
    if checkpointing:
        checkpoint_activations(model)
    points = _length_points(*lengths)

    def batch(count: int, length: int) -> Batch:
        with torch.utils._python_dispatch._disable_current_modes():
            made = task.example_batch(count, length)
            made["weight"] = torch.ones(count)
        return made if mode is None else {name: mode.from_tensor(tensor) for name, tensor in made.items()}

    def timeline(caches: bool) -> Timeline:
        table = [
            [_step(model, block_of, batch(count, length), precision, caches) for length in points] for count in rows
        ]
        intervals = table[0][0][0]
        assert all(cell[0] == intervals for line in table for cell in line), "the model's steps differ in their order"
        return Timeline(
            backward=tuple(interval[0] for interval in intervals),
            blocks=tuple(interval[1] for interval in intervals),
            gradients=tuple(interval[2] for interval in intervals),
            peaks=[[cell[1] for cell in line] for line in table],
            starts=[[cell[2] for cell in line] for line in table],
            kept=[[cell[3] for cell in line] for line in table],
        )

    return ModelProfile(
        parameters=parameters,
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        rows=rows,
        lengths=points,
        cached=timeline(True),
        uncached=timeline(False) if precision in _DTYPES else None,
        evaluation=[[_evaluation(model, batch(count, length), precision) for length in points] for count in rows],
        method="fake tensors" if mode is not None else "a small real pass",
    )


def _step(
    model: nn.Module, block_of: dict[str, int], batch: Batch, precision: str, caches: bool
) -> tuple[list[tuple[bool, int, int]], list[int], list[int], int]:
    """One forward and backward pass: its intervals, their peaks and starts, and what the forward pass kept."""
    model.train()
    recorder = Recorder(model, block_of)
    for tensor in batch.values():
        recorder.tracker.add(tensor)
    try:
        with recorder.tracker:
            with _autocast(precision, caches):
                loss = model(batch)
            recorder.cut()
            kept = recorder.tracker.live
            recorder.in_backward = True
            # As the engine does: the sum over the weights of the whole step.
            (loss * 0.5).backward()
            recorder.cut()
    finally:
        recorder.close()
        for parameter in model.parameters():
            parameter.grad = None
    return recorder.intervals, recorder.peaks, recorder.starts, kept


def _evaluation(model: nn.Module, batch: Batch, precision: str) -> int:
    model.eval()
    tracker = StorageTracker([*model.parameters(), *model.buffers()])
    for tensor in batch.values():
        tracker.add(tensor)
    with torch.no_grad(), tracker, _autocast(precision, True):
        model(batch)
    return tracker.peak


@contextlib.contextmanager
def _autocast(precision: str, caches: bool) -> Iterator[None]:
    if precision not in _DTYPES:
        yield
        return
    # On fake tensors of the CPU, whose autocast lists are nearly those of a GPU; fp16 has the sizes of bf16.
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=caches):
        yield


def _blocks_of_parameters(model: nn.Module) -> dict[str, int]:
    inside = {id(p): index for index, block in enumerate(repeated_blocks(model)) for p in block.parameters()}
    return {name: inside.get(id(parameter), OUTSIDE) for name, parameter in model.named_parameters()}


def _length_points(shortest: int, longest: int) -> tuple[int, ...]:
    """Three points up to the longest row; one where all rows are alike."""
    if shortest == longest:
        return (longest,)
    return tuple(sorted({max(1, longest // 4), max(1, longest // 2), longest}))


def measure_for(config: RunConfig, prepared: Path, out: Path, precision: str) -> None:
    """Measure the model of `config` and keep the profile in `out`. UnmeasuredError when it cannot be, and the model's
    own refusal of a setting."""
    task = load_recipe(config.recipe).make_task(config, prepared)
    lengths = task.rows("train").lengths
    span = (int(lengths.min()), int(lengths.max()))
    try:
        profile = measure(task, precision, config.train.activation_checkpointing, span, config.optim)
    except ToolkitError:
        raise
    except Exception as error:  # whatever a recipe's model needs that is not here
        raise UnmeasuredError(f"the model could not be measured: {type(error).__name__}: {error}") from error
    store_profile(out, profile)


def main(arguments: list[str]) -> int:
    """arguments: a resolved config.yaml, the folder of the prepared data, the file to write, the precision."""
    file, prepared, out, precision = arguments
    try:
        measure_for(load(file, [], site=False).config, Path(prepared), Path(out), precision)
    except ToolkitError as error:
        # The launcher shows the last line.
        print(" ".join(str(error).splitlines()), file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
