"""Training state to checkpoint and back, by fully qualified name: the same format for every strategy and world size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from dist_train import checkpoint_files as files
from dist_train.engine import Engine
from dist_train.rundir import storage_error

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64",
           torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip


def named_state(
    module: nn.Module, optimizer: torch.optim.Optimizer, ema: dict[str, Tensor] | None
) -> dict[str, Tensor]:
    """Every tensor of the state under model/, buffer/, ema/ and optim/<kind>/ plus its parameter's name."""
    state = {f"model/{name}": parameter.detach() for name, parameter in module.named_parameters()}
    state |= {f"buffer/{name}": buffer for name, buffer in module.named_buffers()}
    state |= {f"ema/{name}": tensor for name, tensor in (ema or {}).items()}
    for name, parameter in module.named_parameters():
        # Sorted: a loaded state has its kinds in another order than one that grew, and the files shall be the same.
        for kind, value in sorted(optimizer.state.get(parameter, {}).items()):
            if isinstance(value, Tensor):
                state[f"optim/{kind}/{name}"] = value
    return state


def save(
    root: Path,
    engine: Engine,
    tensors: dict[str, Tensor],
    step: int,
    meta: dict[str, Any],
    committed: Callable[[str], None],
) -> None:
    """Write the checkpoint of `step` with `meta` in its manifest, each rank an equal share of the bytes.

    `committed(folder name)` is called on rank 0 once the checkpoint exists.
    StorageError on all ranks if one of them could not write.
    """
    final = files.step_folder(root, step)
    temporary = root / f".tmp-{final.name}"
    error = None

    def begin() -> None:
        root.mkdir(exist_ok=True)
        files.clean(root)
        temporary.mkdir()

    if engine.rank == 0:
        error = _attempt(begin)
    _raise_together(engine, final, error)
    shard = {}

    def write() -> None:
        name = f"rank-{engine.rank:05d}-of-{engine.world_size:05d}.safetensors"
        shard.update(files.write_shard(temporary / name, _share(tensors, engine.rank, engine.world_size)))

    _raise_together(engine, final, _attempt(write))
    shards = engine.gather_objects(shard)
    error = None
    if engine.rank == 0:
        payload = {"step": step, "world_size": engine.world_size, **meta}

        def finish() -> None:
            files.write_manifest(temporary, {**payload, "shards": shards})
            files.commit(temporary, final)

        error = _attempt(finish)
    _raise_together(engine, final, error)
    if engine.rank == 0:
        committed(final.name)


def _share(tensors: dict[str, Tensor], rank: int, world_size: int) -> list[tuple[files.Piece, memoryview]]:
    """This rank's equal part of all elements, as ranges of the tensors, which lie end to end."""
    total = sum(tensor.numel() for tensor in tensors.values())
    low, high = rank * total // world_size, (rank + 1) * total // world_size
    pieces, offset = [], 0
    for name, tensor in tensors.items():
        start, stop = max(low - offset, 0), min(high - offset, tensor.numel())
        offset += tensor.numel()
        if start >= stop:
            continue
        flat = tensor.detach().reshape(-1)[start:stop].cpu().contiguous()
        piece = files.Piece(name, tuple(tensor.shape), _DTYPES[tensor.dtype], start, stop - start)
        pieces.append((piece, flat.view(torch.uint8).numpy().data))
    return pieces


def _attempt(action: Callable[[], Any]) -> OSError | None:
    try:
        action()
    except OSError as error:
        return error
    return None


def _raise_together(engine: Engine, path: Path, error: OSError | None) -> None:
    """If one rank failed, all raise: a rank that went on alone would wait for ever."""
    errors = engine.gather_objects(None if error is None else (error.errno, error.strerror))
    first = next((entry for entry in errors if entry is not None), None)
    if first is not None:
        raise storage_error(path, OSError(*first))


def read_tensors(folder: Path, manifest: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    """The whole tensors whose names start with `prefix`, put together from the pieces of all ranks that saved."""
    result: dict[str, Tensor] = {}
    for shard in manifest["shards"]:
        wanted = [files.Piece(**entry) for entry in shard["pieces"] if entry["name"].startswith(prefix)]
        if not wanted:
            continue
        with safe_open(folder / shard["file"], framework="pt") as stream:
            for piece in wanted:
                data = stream.get_tensor(piece.key)
                if piece.name not in result:
                    result[piece.name] = torch.empty(tuple(piece.shape), dtype=data.dtype)
                result[piece.name].view(-1)[piece.start : piece.start + piece.length] = data
    return {name.removeprefix(prefix): tensor for name, tensor in result.items()}


def load_weights(module: nn.Module, folder: Path, manifest: dict[str, Any], use_ema: bool) -> None:
    """Parameters (their moving average if asked) and buffers into the bare module."""
    weights = read_tensors(folder, manifest, "ema/" if use_ema else "model/")
    buffers = read_tensors(folder, manifest, "buffer/")
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])


def load_optimizer(module: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, manifest: dict[str, Any]) -> int:
    """The optimizer's state by parameter name. Returns how many tensors were restored."""
    saved = read_tensors(folder, manifest, "optim/")
    kinds = sorted({name.split("/", 1)[0] for name in saved})
    for name, parameter in module.named_parameters():
        for kind in kinds:
            tensor = saved.get(f"{kind}/{name}")
            if tensor is not None:
                # AdamW's step counter is a CPU tensor unless the optimizer is fused.
                device = "cpu" if kind == "step" and not optimizer.defaults.get("fused") else parameter.device
                optimizer.state[parameter][kind] = tensor.to(device)
    return len(saved)
