"""Training state to checkpoint and back, by fully qualified name: the same format for every strategy and world size."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dist_train import checkpoint_files as files
from dist_train.engine import Strategy
from dist_train.errors import CheckpointError
from dist_train.held import Held, equal_share, state_buffers, whole

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
           torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip


def held_state(strategy: Strategy, ema: dict[str, Tensor] | None, rank: int) -> list[Held]:
    """All that this rank holds under model/, ema/, optim/<kind>/ plus its parameter's name, and buffer/."""
    weights = strategy.weights()
    held = [replace(entry, name=f"model/{entry.name}") for entry in weights]
    if ema is not None:
        held += [replace(entry, name=f"ema/{entry.name}", flat=ema[entry.name]) for entry in weights]
    held += [replace(entry, name=f"optim/{entry.name}") for entry in strategy.optimizer_state()]
    if rank == 0:
        # Rank 0's for all: those of a BatchNorm differ by rank.
        buffers = [whole(f"buffer/{name}", buffer) for name, buffer in state_buffers(strategy.module).items()]
        held += [replace(entry, replicated=False) for entry in buffers]
    return held


def pieces_of(held: list[Held], rank: int, world_size: int) -> list[tuple[files.Piece, Tensor]]:
    """What this rank writes: its equal share of what all hold alike, and all that it alone holds."""
    shared = equal_share([entry for entry in held if entry.replicated], rank, world_size)
    own = [entry for entry in held if not entry.replicated and entry.flat.numel()]
    return [
        (files.Piece(e.name, e.shape, _DTYPES[e.flat.dtype], e.start, e.flat.numel()), e.flat) for e in (*shared, *own)
    ]


class Reader:
    """The tensors of a checkpoint by name, whichever ranks wrote which parts of them; reads only what is asked for."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self._folder = folder
        self._places: dict[str, list[tuple[str, files.Piece]]] = {}
        for shard in manifest["shards"]:
            for entry in shard["pieces"]:
                piece = files.Piece(**entry)
                self._places.setdefault(piece.name, []).append((shard["file"], piece))
        self._open: dict[str, Any] = {}

    def names(self, prefix: str) -> list[str]:
        return [name for name in self._places if name.startswith(prefix)]

    def read(self, name: str, start: int, target: Tensor) -> None:
        """Copy elements start … start+len(target)-1 of the flattened tensor into `target` [n]."""
        stop, found = start + target.numel(), 0
        for file, piece in self._places.get(name, ()):
            low, high = max(start, piece.start), min(stop, piece.start + piece.length)
            if low < high:
                stored = self._stream(file).get_slice(piece.key)[low - piece.start : high - piece.start]
                target[low - start : high - start] = stored.to(target.device)
                found += high - low
        if found != target.numel():
            raise CheckpointError(
                f"{self._folder} holds {found} of the {target.numel()} elements of {name} that this model needs: it is "
                "of another model. Start a new run, or bring back the model's settings."
            )

    def whole(self, prefix: str) -> dict[str, Tensor]:
        """The whole tensors whose names start with `prefix`, without it."""
        result = {}
        for name in self.names(prefix):
            file, piece = self._places[name][0]
            dtype = self._stream(file).get_slice(piece.key)[0:1].dtype
            flat = torch.empty(math.prod(piece.shape), dtype=dtype)
            self.read(name, 0, flat)
            result[name.removeprefix(prefix)] = flat.view(tuple(piece.shape))
        return result

    def _stream(self, file: str) -> Any:
        if file not in self._open:
            self._open[file] = safe_open(self._folder / file, framework="pt")
        return self._open[file]


@torch.no_grad()
def load_weights(strategy: Strategy, reader: Reader, use_ema: bool) -> None:
    """Parameters (their moving average if asked) and buffers into the module."""
    prefix = "ema/" if use_ema else "model/"
    with strategy.changing_weights(for_good=True) as weights:
        for entry in weights:
            reader.read(prefix + entry.name, entry.start, entry.flat)
    for name, buffer in state_buffers(strategy.module).items():
        reader.read(f"buffer/{name}", 0, buffer.view(-1))


@torch.no_grad()
def load_optimizer(strategy: Strategy, reader: Reader) -> int:
    """The optimizer's state by parameter name. Returns how many tensors were restored."""
    names = reader.names("optim/")
    strategy.allocate_optimizer_state(sorted({name.split("/", 2)[1] for name in names}))
    known = set(names)
    for entry in strategy.optimizer_state():
        # A parameter that never had a gradient has no state: it stays as it is at the start.
        if f"optim/{entry.name}" in known:
            reader.read(f"optim/{entry.name}", entry.start, entry.flat)
    return len(names)


@torch.no_grad()
def load_average(strategy: Strategy, reader: Reader, ema: dict[str, Tensor]) -> None:
    for entry in strategy.weights():
        reader.read(f"ema/{entry.name}", entry.start, ema[entry.name])


def plain_model(module: nn.Module, reader: Reader, use_ema: bool) -> None:
    """The same into a bare module on the CPU that no strategy has touched."""
    weights = reader.whole("ema/" if use_ema else "model/") | reader.whole("buffer/")
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *state_buffers(module).items()):
            tensor.copy_(weights[name])
