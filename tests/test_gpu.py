"""What only an NVIDIA GPU can show: bf16, fp16 with its loss scale, NCCL, offload, compile. Run by `make gpu-check`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_train.hardware import detect_hardware
from tests.fakes import TinyTask, curve, train_tiny
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU and a CUDA build of torch"),
]

STRATEGIES = ["single", "ddp", "zero1", "zero2", "zero3", "fsdp"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fp32_on_a_gpu_has_the_losses_of_the_cpu(tmp_path: Path, strategy: str) -> None:
    run_ranks(1, _train, tmp_path / "cpu", "single", "fp32", False)
    run_ranks(1, _train, tmp_path / "gpu", strategy, "fp32", True)
    np.testing.assert_allclose(curve(tmp_path / "gpu"), curve(tmp_path / "cpu"), rtol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision_learns_as_fp32_does(tmp_path: Path, strategy: str, precision: str) -> None:
    run_ranks(1, _train, tmp_path / "cpu", "single", "fp32", False)
    run_ranks(1, _train, tmp_path / "gpu", strategy, precision, True)
    whole, half = curve(tmp_path / "cpu"), curve(tmp_path / "gpu")
    finite = [pair for pair in zip(whole, half, strict=True) if pair[1] is not None]
    assert len(finite) > 10
    assert abs(np.mean([a - b for a, b in finite[-5:]])) < 0.05 * np.mean(whole[-5:])


@pytest.mark.parametrize(("strategy", "offload"), [("zero2", "optimizer"), ("zero3", "parameters")])
def test_offload_on_a_gpu_has_the_losses_of_the_cpu(tmp_path: Path, strategy: str, offload: str) -> None:
    run_ranks(1, _train, tmp_path / "cpu", "single", "fp32", False)
    run_ranks(1, _train, tmp_path / "gpu", strategy, "fp32", True, {"offload": offload})
    np.testing.assert_allclose(curve(tmp_path / "gpu"), curve(tmp_path / "cpu"), rtol=1e-3)


def test_deterministic_kernels_give_the_same_bits_twice(tmp_path: Path) -> None:
    for name in ("first", "second"):
        run_ranks(1, _train, tmp_path / name, "ddp", "bf16", True, {}, {"deterministic": True})
    assert curve(tmp_path / "first") == curve(tmp_path / "second")


def _train(
    path: Path,
    strategy: str,
    precision: str,
    gpu: bool,
    parallel: dict[str, str] | None = None,
    train: dict[str, bool] | None = None,
) -> None:
    import os

    if gpu:
        os.environ["DS_ACCELERATOR"] = "cuda"
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    hardware = {"hardware": detect_hardware()} if gpu else {}
    sections = {
        "parallel": {"strategy": strategy, **(parallel or {})},
        "train": {"precision": precision, **(train or {})},
    }
    train_tiny(path, 1, TinyTask(model="transformer"), optim={"lr": 1e-3}, **sections, **hardware)
