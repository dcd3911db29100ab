"""Augmentation of whole batches, on any device: each image's is a function of its own seed alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dist_train.data import mix64
from recipes.defect_detection.config import AugmentConfig

_FLIP_Y, _FLIP_X, _TURN, _GAIN, _OFFSET, _BLUR, _NOISE, _NOISE_SEED = range(8)


def draw_parameters(seeds: np.ndarray, config: AugmentConfig, square: bool) -> dict[str, Tensor]:
    """What `apply` does to each image of the seeds [n] (uint64), as tensors [n]; an effect that is off has none."""
    parameters: dict[str, Tensor] = {}
    if config.flips:
        for name, stream in (("augment_flip_y", _FLIP_Y), ("augment_flip_x", _FLIP_X)):
            parameters[name] = torch.from_numpy(_uniform(seeds, stream) < 0.5)
    if config.turns:
        quarters = np.floor(_uniform(seeds, _TURN) * (4 if square else 2)) * (1 if square else 2)
        parameters["augment_turn"] = torch.from_numpy(quarters.astype(np.int64))
    for name, stream, most in (
        ("augment_gain", _GAIN, config.exposure),
        ("augment_offset", _OFFSET, config.exposure),
        ("augment_blur_px", _BLUR, config.blur_px),
        ("augment_noise", _NOISE, config.noise),
    ):
        if most:
            low = -most if name in ("augment_gain", "augment_offset") else 0.0
            drawn = low + (most - low) * _uniform(seeds, stream)
            parameters[name] = torch.from_numpy(drawn.astype(np.float32))
    if config.noise:
        # 31 bits: integer tensors have no unsigned arithmetic everywhere.
        parameters["augment_noise_seed"] = torch.from_numpy(
            (_hashed(seeds, _NOISE_SEED) >> np.uint64(33)).astype(np.int64)
        )
    return parameters


def apply(images: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    """The images [n, channels, height, width], floats in 0..1, changed as their parameters say. What other images are
    in the batch makes no difference."""
    if "augment_turn" in parameters:
        images = _turned(images, parameters["augment_turn"])
    for name, axis in (("augment_flip_y", 2), ("augment_flip_x", 3)):
        if name in parameters:
            images = torch.where(_each(parameters[name]), images.flip(axis), images)
    if "augment_gain" in parameters:
        # About the image's own mean: contrast and brightness change apart from each other.
        mean = images.mean((1, 2, 3), keepdim=True)
        offset = mean * (1 + _each(parameters["augment_offset"]))
        images = (images - mean) * (1 + _each(parameters["augment_gain"])) + offset
    if "augment_blur_px" in parameters:
        images = _blurred(images, parameters["augment_blur_px"])
    if "augment_noise" in parameters:
        images = images + _each(parameters["augment_noise"]) * _normal(parameters["augment_noise_seed"], images)
    return images


def _turned(images: Tensor, quarters: Tensor) -> Tensor:
    """Turned by so many right angles. As a transposition and two flips, so that each is one choice for the batch."""
    if images.shape[2] == images.shape[3]:
        images = torch.where(_each(quarters % 2 == 1), images.transpose(2, 3), images)
    images = torch.where(_each((quarters == 1) | (quarters == 2)), images.flip(2), images)
    return torch.where(_each(quarters >= 2), images.flip(3), images)


def _blurred(images: Tensor, deviations: Tensor) -> Tensor:
    """Gaussian blur of each image by its own standard deviation in pixels; the edge is mirrored."""
    rows, channels, height, width = images.shape
    radius = min(max(1, math.ceil(3 * 2.0)), height - 1, width - 1)
    places = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernels = torch.exp(-0.5 * (places / deviations.clamp(min=1e-3)[:, None]) ** 2)
    kernels = (kernels / kernels.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]
    stacked = images.reshape(1, rows * channels, height, width)
    for shape, padding in (
        (kernels[:, :, :, None], (0, 0, radius, radius)),
        (kernels[:, :, None], (radius, radius, 0, 0)),
    ):
        stacked = F.conv2d(F.pad(stacked, padding, mode="reflect"), shape, groups=rows * channels)
    return stacked.reshape(images.shape)


def _normal(seeds: Tensor, like: Tensor) -> Tensor:
    """Standard normal numbers of the images' shape: a hash of each image's seed and the pixel's number, and the method
    of Box and Muller (1958). No generator, so that no other image matters."""
    count = math.prod(like.shape[1:])
    pixels = torch.arange(count, device=like.device, dtype=torch.int64)
    first = _mixed(seeds[:, None] * 2 + 1, pixels)
    second = _mixed(seeds[:, None] * 2 + 2, pixels)
    radius = torch.sqrt(-2 * torch.log((first.float() + 1) / 2**24))
    return (radius * torch.cos(second.float() * (2 * math.pi / 2**24))).to(like.dtype).view(like.shape)


def _mixed(seeds: Tensor, pixels: Tensor) -> Tensor:
    """24 bits of a hash (the finalizer of MurmurHash3) of each seed and pixel, in int64 arithmetic of 32 bits."""
    mask = 0xFFFFFFFF
    value = (pixels * 0x9E3779B1 + seeds * 0x85EBCA77) & mask
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        value = ((value ^ (value >> 15)) * multiplier) & mask
    return (value ^ (value >> 16)) >> 8


def _uniform(seeds: np.ndarray, stream: int) -> np.ndarray:
    """A number in 0..1 of each seed, apart for each stream: float64 [n]."""
    return (_hashed(seeds, stream) >> np.uint64(11)) * 2.0**-53


def _hashed(seeds: np.ndarray, stream: int) -> np.ndarray:
    return mix64(seeds.astype(np.uint64) ^ mix64(np.array([stream + 1], dtype=np.uint64)))


def _each(values: Tensor) -> Tensor:
    """Values [n] so that they count for whole images."""
    return values[:, None, None, None]
