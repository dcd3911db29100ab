"""Random turns, mirroring, exposure, blur and noise on batches of images, from one seed a row.

A row's result depends on its own pixels and seed alone, to the bit, so that it is the same for any number of ranks and
any batch. Hence nothing here sums in an order that the shape of a batch could change: sums are made by adding slices.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor
from torch.nn.functional import pad

from dist_train.data import mix64
from recipes.defect_detection.config import AugmentConfig

_FLIP_X, _FLIP_Y, _TURN, _GAIN, _BRIGHTNESS, _BLUR, _NOISE, _NOISE_SEED, _SHIFT_Y, _SHIFT_X = range(10)


def draw_parameters(seeds: np.ndarray, config: AugmentConfig, square: bool) -> dict[str, Tensor]:
    """What happens to each row, from its uint64 seed alone; only the entries of effects that are on.

    augment_flip_x, augment_flip_y: int64 [n], 1 mirrors left to right, and top to bottom. augment_turn: int64 [n],
    right angles; 0 or 2 unless square. augment_shift: int64 [n, 2], pixels up and to the left. augment_exposure:
    float32 [n, 2], factors of contrast and of mean brightness.
    augment_blur: float32 [n, radius + 1], half of a Gaussian kernel. augment_noise: float32 [n], standard deviation,
    and augment_noise_seed: int64 [n].
    """
    parameters: dict[str, np.ndarray] = {}
    if config.flips:
        parameters["augment_flip_x"] = (_uniform(seeds, _FLIP_X) < 0.5).astype(np.int64)
        parameters["augment_flip_y"] = (_uniform(seeds, _FLIP_Y) < 0.5).astype(np.int64)
    if config.turns:
        turns = np.floor(_uniform(seeds, _TURN) * 4).astype(np.int64)
        parameters["augment_turn"] = turns if square else turns % 2 * 2
    if config.shift_px > 0:
        draws = np.stack([_uniform(seeds, _SHIFT_Y), _uniform(seeds, _SHIFT_X)], axis=1)
        parameters["augment_shift"] = np.floor(draws * (2 * config.shift_px + 1)).astype(np.int64) - config.shift_px
    if config.exposure > 0:
        draws = np.stack([_uniform(seeds, _GAIN), _uniform(seeds, _BRIGHTNESS)], axis=1)
        parameters["augment_exposure"] = ((1 + config.exposure) ** (2 * draws - 1)).astype(np.float32)
    if config.blur_px > 0:
        parameters["augment_blur"] = _half_kernels(config.blur_px * _uniform(seeds, _BLUR), config.blur_px)
    if config.noise > 0:
        parameters["augment_noise"] = (config.noise * _uniform(seeds, _NOISE)).astype(np.float32)
        parameters["augment_noise_seed"] = _stream(seeds, _NOISE_SEED).view(np.int64)
    return {name: torch.from_numpy(values) for name, values in parameters.items()}


def apply(images: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """The images float [n, channels, height, width] in 0..1 under the parameters of `draw_parameters`.

    In the order: turn, mirror, shift (the edge is repeated), exposure, blur, noise. The input is left as it is; with no
    parameters it is the result.
    """
    moved = any(name in parameters for name in ("augment_turn", "augment_flip_x", "augment_flip_y", "augment_shift"))
    result = _move(images, parameters) if moved else images
    exposure, kernels = parameters.get("augment_exposure"), parameters.get("augment_blur")
    if exposure is not None:
        result = _expose(result, exposure)
    if kernels is not None:
        result = _blur(_blur(result, kernels, 2), kernels, 3)
    if "augment_noise" in parameters:
        deviation = parameters["augment_noise"][:, None, None, None]
        result = result + _normal_like(result, parameters["augment_noise_seed"]) * deviation
    return result.clamp_(0, 1) if exposure is not None or "augment_noise" in parameters else result


def _stream(seeds: np.ndarray, number: int) -> np.ndarray:
    """A uint64 a seed, for one of several uses."""
    return mix64(seeds ^ mix64(np.array([number], dtype=np.uint64)))


def _uniform(seeds: np.ndarray, number: int) -> np.ndarray:
    return (_stream(seeds, number) >> np.uint64(11)) * 2.0**-53


def _half_kernels(deviations: np.ndarray, largest: float) -> np.ndarray:
    """Gaussian weights float32 [n, radius + 1] from the middle on; zero beyond four standard deviations of each row."""
    radius = int(4 * largest + 0.5)
    steps = np.arange(radius + 1)[None, :]
    reach = np.floor(4 * deviations + 0.5)[:, None]
    weights = np.exp(-0.5 * (steps / np.maximum(deviations, 1e-6)[:, None]) ** 2) * (steps <= reach)
    return (weights / (2 * weights.sum(axis=1, keepdims=True) - 1)).astype(np.float32)


def _move(images: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """Turned, mirrored and shifted: each pixel of the result is one of the same row."""
    turn, flip_x, flip_y, shift = (parameters.get(f"augment_{name}") for name in ("turn", "flip_x", "flip_y", "shift"))
    reverse_x = _either(flip_x, None if turn is None else turn // 2)
    # A turn by one right angle, counter-clockwise, is a transpose and then top to bottom; by two, both reversals.
    reverse_y = _either(flip_y, None if turn is None else (turn + 1) // 2 % 2)
    height, width = images.shape[2:]
    y = _places(reverse_y, None if shift is None else shift[:, 0], height, images)
    x = _places(reverse_x, None if shift is None else shift[:, 1], width, images)
    if turn is None or height != width:
        source = (y * width)[:, :, None] + x[:, None, :]
    else:
        transposed = (turn % 2)[:, None]
        stride_y, stride_x = width - transposed * (width - 1), 1 + transposed * (width - 1)
        source = (y * stride_y)[:, :, None] + (x * stride_x)[:, None, :]
    index = source.flatten(1)[:, None, :].expand(len(source), images.shape[1], height * width)
    return images.flatten(2).gather(2, index).view(images.shape)


def _either(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Reversed by exactly one of the two."""
    if one is None or other is None:
        return other if one is None else one
    return one ^ other


def _places(reverse: Tensor | None, shift: Tensor | None, size: int, images: Tensor) -> Tensor:
    """Positions int64 [n, size] along an axis, moved by the shift, from the other end in the rows to reverse."""
    forward = torch.arange(size, device=images.device).expand(len(images), size)
    if shift is not None:
        forward = (forward + shift[:, None]).clamp(0, size - 1)
    return forward if reverse is None else torch.where(reverse[:, None] == 1, size - 1 - forward, forward)


def _expose(images: Tensor, exposure: Tensor) -> Tensor:
    """Contrast about the mean, and brightness of the mean, times the factors [n, 2]."""
    gain, brightness = exposure[:, 0], exposure[:, 1]
    offset = row_means(images) * (brightness - gain)
    # Two operations: one fused would round differently in the last elements of a block, wherever that ends.
    return (images * gain[:, None, None, None]).add_(offset[:, None, None, None])


def row_means(images: Tensor) -> Tensor:
    """Mean of each row [n], by adding the halves to each other, which rounds alike for any batch and device."""
    sums = images.flatten(1)
    size = sums.shape[1]
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        odd = sums[:, 2 * half :]
        sums = sums[:, :half] + sums[:, half : 2 * half]
        if odd.shape[1]:
            sums[:, :1] += odd
    return sums[:, 0] / size


def _blur(images: Tensor, kernels: Tensor, axis: int) -> Tensor:
    """Each row smoothed along one axis by its own kernel; the edge is repeated."""
    radius, size = kernels.shape[1] - 1, images.shape[axis]
    if radius == 0:
        return images
    padded = pad(images, (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0), mode="replicate")
    weights = kernels[:, None, None, None, :]
    result = images * weights[..., 0]
    for step in range(1, radius + 1):
        pair = padded.narrow(axis, radius - step, size) + padded.narrow(axis, radius + step, size)
        result += pair.mul_(weights[..., step])
    return result


def _normal_like(images: Tensor, seeds: Tensor) -> Tensor:
    """Standard normal numbers of the images' shape, from the hash of (seed, pixel): no generator keeps a state.

    A hash of 64 bits gives four numbers: each 16 bits name a quantile in a table, which is alike on every device,
    where logarithm and cosine would differ in the last bits.
    """
    pixels = images[0].numel()
    counters = torch.arange(-(-pixels // 4), device=images.device, dtype=torch.int64)
    hashed = _mix64(_mix64(counters)[None, :] ^ seeds[:, None])
    index = hashed.view(torch.int16)[:, :pixels].to(torch.int64) + 32768
    return _normal_table(images.device).to(images.dtype)[index].view(images.shape)


@lru_cache(maxsize=8)
def _normal_table(device: torch.device) -> Tensor:
    """65,536 quantiles of the standard normal distribution, scaled to deviation 1."""
    quantiles = ndtri((np.arange(65536) + 0.5) / 65536)
    return torch.from_numpy((quantiles / quantiles.std()).astype(np.float32)).to(device)


def _mix64(value: Tensor) -> Tensor:
    """dist_train.data.mix64 on int64, whose products wrap around alike."""
    value = value + (0x9E3779B97F4A7C15 - (1 << 64))
    value = (value ^ ((value >> 30) & ((1 << 34) - 1))) * (0xBF58476D1CE4E5B9 - (1 << 64))
    value = (value ^ ((value >> 27) & ((1 << 37) - 1))) * (0x94D049BB133111EB - (1 << 64))
    return value ^ ((value >> 31) & ((1 << 33) - 1))
