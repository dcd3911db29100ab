"""Own networks of defect detection. This file imports torch alone: a service reads a model folder with a copy of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_GROUPS = 8


def build_backbone(
    kind: str, in_channels: int, widths: Sequence[int], depths: Sequence[int], stem_stride: int, drop_path: float = 0.0
) -> nn.Module:
    """images [B, in_channels, H, W] -> features [B, out_channels, H / stride, W / stride], rounded up.

    kind: resnet or convnext. widths, depths: the channels and the blocks of each stage; each stage but the first
    halves the image. stem_stride: 1, 2 or 4. drop_path: the probability that an image skips the last block in
    training; it rises linearly from 0 at the first. The module tells its `out_channels` and `stride`, and in `middle`
    where the middle of its first feature lies, in pixels from the image's edge. Its weights depend on torch's seed
    alone, and the features of an image on that image alone.
    """
    channels = [width for width, depth in zip(widths, depths, strict=True) for _ in range(depth)]
    strides = [2 if stage > 0 and block == 0 else 1 for stage, depth in enumerate(depths) for block in range(depth)]
    last = max(len(channels) - 1, 1)
    drops = [drop_path * block / last for block in range(len(channels))]
    network = ConvNeXt if kind == "convnext" else ResNet
    return network(in_channels, channels, strides, drops, stem_stride)


def drop_paths(change: Tensor, probability: float, training: bool) -> Tensor:
    """Leave out what a residual block adds, for whole images at random (Huang et al. 2016). change: [B, C, h, w]."""
    if not training or probability == 0.0:
        return change
    kept = torch.rand(change.shape[0], 1, 1, 1, device=change.device) >= probability
    return change * (kept / (1.0 - probability)).to(change.dtype)


def fill_up(features: Tensor, multiple: int) -> Tensor:
    """[B, C, h, w] with zeros below and to the right, up to a multiple of both sides."""
    height, width = features.shape[2:]
    return F.pad(features, (0, -width % multiple, 0, -height % multiple))


def normalise_channels(features: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LayerNorm over the channels of [B, C, h, w] at each place."""
    return norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class StandardisedConv(nn.Module):
    """A convolution whose filters have mean 0 and the length `gain` (Qiao et al. 2019; Brock et al. 2021).

    They are brought there in forward, when a sharded weight is whole.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, gain: float = 1.0) -> None:
        super().__init__()
        self.stride, self.padding = stride, kernel // 2
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
        self.gain = nn.Parameter(torch.full((out_channels,), gain))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.normal_(self.weight, std=(in_channels * kernel * kernel) ** -0.5)

    def forward(self, features: Tensor) -> Tensor:
        filters = self.weight.flatten(1)
        filters = filters - filters.mean(dim=1, keepdim=True)
        scale = self.gain[:, None] * torch.rsqrt(filters.square().sum(dim=1, keepdim=True) + 1e-6)
        return F.conv2d(features, (filters * scale).view_as(self.weight), self.bias, self.stride, self.padding)


class ResidualBlock(nn.Module):
    """A pre-activation block (He et al. 2016) of standardised convolutions and GroupNorm (Wu and He 2018)."""

    def __init__(self, in_channels: int, channels: int, stride: int, drop: float) -> None:
        super().__init__()
        self.drop = drop
        self.norm_in = nn.GroupNorm(math.gcd(_GROUPS, in_channels), in_channels)
        self.conv_in = StandardisedConv(in_channels, channels, 3, stride)
        self.norm_out = nn.GroupNorm(math.gcd(_GROUPS, channels), channels)
        # A block starts as its shortcut (De and Smith 2020).
        self.conv_out = StandardisedConv(channels, channels, 3, gain=0.0)
        same = stride == 1 and in_channels == channels
        self.shortcut = None if same else StandardisedConv(in_channels, channels, 1, stride)

    def forward(self, features: Tensor) -> Tensor:
        active = F.relu(self.norm_in(features))
        kept = features if self.shortcut is None else self.shortcut(active)
        change = self.conv_out(F.relu(self.norm_out(self.conv_in(active))))
        return kept + drop_paths(change, self.drop, self.training)


class ResNet(nn.Module):
    """A residual network without batch statistics, which would depend on the number of ranks."""

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        strides: Sequence[int],
        drops: Sequence[float],
        stem_stride: int,
    ) -> None:
        super().__init__()
        self.out_channels, self.stride = channels[-1], stem_stride * math.prod(strides)
        self.middle = 0.5  # filters of odd sizes stay centred on each second feature
        first = channels[0] if stem_stride < 4 else channels[0] // 2
        self.stem = nn.Conv2d(in_channels, first, 5, min(stem_stride, 2), padding=2)
        self.stem_halving = nn.Conv2d(first, channels[0], 3, 2, padding=1) if stem_stride == 4 else None
        inputs = [channels[0], *channels]
        self.blocks = nn.ModuleList(
            ResidualBlock(*block) for block in zip(inputs[:-1], channels, strides, drops, strict=True)
        )
        self.norm = nn.GroupNorm(math.gcd(_GROUPS, channels[-1]), channels[-1])

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        if self.stem_halving is not None:
            features = self.stem_halving(F.relu(features))
        for block in self.blocks:
            features = block(features)
        return F.relu(self.norm(features))


class ResponseNorm(nn.Module):
    """Global response normalisation of [B, h, w, C] (Woo et al. 2023): a channel that stands out in an image gains."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, features: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(features, dim=(1, 2), keepdim=True, dtype=torch.float32)
        factor = 1.0 + self.weight * (length / (length.mean(dim=-1, keepdim=True) + 1e-6))
        return features * factor.to(features.dtype) + self.bias.to(features.dtype)


class ConvNeXtBlock(nn.Module):
    """A block of ConvNeXt V2 (Woo et al. 2023). With a stride of 2 it halves the image first."""

    def __init__(self, in_channels: int, channels: int, stride: int, drop: float) -> None:
        super().__init__()
        self.drop = drop
        self.norm_in = nn.LayerNorm(in_channels) if stride == 2 else None
        self.halving = nn.Conv2d(in_channels, channels, 2, 2) if stride == 2 else None
        self.spatial = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 4 * channels)
        self.response = ResponseNorm(4 * channels)
        self.reduce = nn.Linear(4 * channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        if self.norm_in is not None and self.halving is not None:
            features = self.halving(fill_up(normalise_channels(features, self.norm_in), 2))
        inner = self.norm(self.spatial(features).permute(0, 2, 3, 1))
        change = self.reduce(self.response(F.gelu(self.expand(inner)))).permute(0, 3, 1, 2)
        return features + drop_paths(change, self.drop, self.training)


class ConvNeXt(nn.Module):
    """A ConvNeXt V2; depths 3, 3, 27, 3 and widths 192, 384, 768, 1536 with a stem stride of 4 give the size L."""

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        strides: Sequence[int],
        drops: Sequence[float],
        stem_stride: int,
    ) -> None:
        super().__init__()
        self.out_channels, self.stride = channels[-1], stem_stride * math.prod(strides)
        self.stem_stride = stem_stride
        overlaps = stem_stride < 4
        # A filter of 2 x 2 features lies between them.
        self.middle = 0.5 + (self.stride - stem_stride) / 2 if overlaps else self.stride / 2
        self.stem = nn.Conv2d(in_channels, channels[0], 3 if overlaps else 4, stem_stride, padding=1 if overlaps else 0)
        self.stem_norm = nn.LayerNorm(channels[0])
        inputs = [channels[0], *channels]
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(*block) for block in zip(inputs[:-1], channels, strides, drops, strict=True)
        )
        self.norm = nn.LayerNorm(channels[-1])
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        features = normalise_channels(self.stem(fill_up(images, self.stem_stride)), self.stem_norm)
        for block in self.blocks:
            features = block(features)
        return normalise_channels(features, self.norm)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
