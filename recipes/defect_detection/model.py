"""The module of defect detection: the loss sum in training; probabilities and heat maps in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.task import Batch, weighted_sum
from recipes.defect_detection import augment, losses

# Of the texture features in training: there are many, and few images.
_TEXTURE_DROPOUT = 0.3
HEAT_SIDE = 24
"""Cells of a kept heat map along the image's longer side."""


@dataclass(frozen=True)
class Tiles:
    """How an image is cut into tiles."""

    size: int
    overlap: float
    top: int


class DefectNetwork(nn.Module):
    """A backbone, and a linear head at each place of its feature map. An image's logits are the mean over the places,
    or over those that speak most for a defect, so that the map of logits, the class activation map (Zhou et al. 2016),
    sums up to the decision exactly."""

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        good: int | None,
        mean: Sequence[float],
        std: Sequence[float],
        dropout: float = 0.0,
        top_share: float = 1.0,
        tiles: Tiles | None = None,
        standardise: bool = False,
    ) -> None:
        """good: index of the class of parts without a defect. mean, std: of each channel, images being in 0..1.
        top_share: the share of the places that count. standardise: see `standardised`, instead of mean and std."""
        super().__init__()
        described: Any = backbone
        self.backbone = backbone
        self.head = nn.Linear(described.out_channels, num_classes)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)
        self.good, self.dropout, self.top_share, self.standardise = good, dropout, top_share, standardise
        self.tiles, self.stride, self.middle = tiles, int(described.stride), float(described.middle)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32)[:, None, None])
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32)[:, None, None])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """images [n, channels, height, width] in 0..1 -> logits [n, classes], heat [n, h, w], features [n, width].

        Heat is how far each place speaks for a defect: its highest logit of a defect above that of good. Without a good
        class it speaks for the predicted class.
        """
        images = standardised(images) if self.standardise else (images - self.mean) / self.std
        if self.tiles is None:
            maps, features = self._look(images)
            logits = self._pool(maps)
            return logits, self._heat(maps, logits), features
        return self._look_at_tiles(images, self.tiles)

    def _look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits at each place [n, classes, h, w], and the mean features [n, width]."""
        states = self.backbone(images)
        dropped = F.dropout2d(states, self.dropout, self.training)
        return F.conv2d(dropped, self.head.weight[:, :, None, None], self.head.bias).float(), states.mean(
            (2, 3)
        ).float()

    def _pool(self, maps: Tensor) -> Tensor:
        """Logits [n, classes] of maps [n, classes, h, w]."""
        places = maps.flatten(2)
        if self.top_share == 1:
            return places.mean(2)
        count = max(1, round(self.top_share * places.shape[2]))
        chosen = self._margin(places.movedim(1, 0)).topk(count, dim=1).indices
        return places.gather(2, chosen[:, None].expand(-1, places.shape[1], -1)).mean(2)

    def _look_at_tiles(self, images: Tensor, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
        """The logits of an image are the mean of its few highest-scored tiles: a small defect is not averaged away, and
        no single tile decides."""
        rows, _, height, width = images.shape
        tops = tile_starts(height, tiles, self.stride)
        lefts = tile_starts(width, tiles, self.stride)
        places = [(top, left) for top in tops for left in lefts]
        size = tiles.size
        cut = torch.stack([images[:, :, top : top + size, left : left + size] for top, left in places], 1)
        maps, features = self._look(cut.flatten(0, 1))
        per_tile = self._pool(maps).unflatten(0, (rows, len(places)))
        chosen = self._margin(per_tile.movedim(2, 0)).topk(min(tiles.top, len(places)), dim=1).indices
        logits = per_tile.gather(1, chosen[:, :, None].expand(-1, -1, per_tile.shape[2])).mean(1)
        feature = features.unflatten(0, (rows, len(places)))
        feature = feature.gather(1, chosen[:, :, None].expand(-1, -1, feature.shape[2])).mean(1)
        heat = self._heat(maps, logits.repeat_interleave(len(places), 0)).unflatten(0, (rows, len(places)))
        return logits, self._joined(heat, places, height, width), feature

    def _joined(self, heat: Tensor, places: list[tuple[int, int]], height: int, width: int) -> Tensor:
        """One heat map of tiles' maps [n, tiles, h, w]; where they overlap the higher one counts."""
        side, step = heat.shape[2:], self.stride
        # Rounded up: the last tile, which may begin between two places, then reaches the last place.
        corners = [(-(-top // step), -(-left // step)) for top, left in places]
        # A network that rounds down leaves the edge of a tile out, at the image's own edge too.
        reached = (max(row for row, _ in corners) + side[0], max(column for _, column in corners) + side[1])
        shape = (heat.shape[0], min(-(-height // step), reached[0]), min(-(-width // step), reached[1]))
        whole = heat.new_full(shape, torch.finfo(heat.dtype).min)
        for index, (row, column) in enumerate(corners):
            part = (slice(None), slice(row, row + side[0]), slice(column, column + side[1]))
            whole[part] = torch.maximum(whole[part], heat[:, index, : whole[part].shape[1], : whole[part].shape[2]])
        return whole

    def _heat(self, maps: Tensor, logits: Tensor) -> Tensor:
        if self.good is not None:
            return self._margin(maps.movedim(1, 0))
        chosen = logits.argmax(1)[:, None, None, None].expand(-1, 1, *maps.shape[2:])
        return maps.gather(1, chosen)[:, 0]

    def _margin(self, scores: Tensor) -> Tensor:
        """scores [classes, ...] -> how far the highest defect lies above good; without good, above the mean."""
        if self.good is None:
            return scores.amax(0) - scores.mean(0)
        others = torch.cat([scores[: self.good], scores[self.good + 1 :]])
        return others.amax(0) - scores[self.good]


def standardised(images: Tensor) -> Tensor:
    """Each image [n, channels, height, width] in 0..1 less its own mean, over its own standard deviation: how bright
    and how rough a part is no longer hides what is small on it."""
    centred = images - augment.row_means(images)[:, None, None, None]
    return centred / augment.row_means(centred.square()).sqrt().clamp(min=1 / 255)[:, None, None, None]


class TextureHead(nn.Module):
    """Logits from classical texture features: standardised, then a small hidden layer."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], num_classes: int, width: int = 64) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))
        self.hidden = nn.Linear(len(mean), width)
        self.out = nn.Linear(width, num_classes)
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.zeros_(self.out.bias)

    def forward(self, textures: Tensor) -> Tensor:
        standard = ((textures - self.mean) / self.std).clamp(-5, 5)
        return self.out(F.gelu(self.hidden(F.dropout(standard, _TEXTURE_DROPOUT, self.training))))


class DefectClassifier(nn.Module):
    """Networks side by side with augmentation before them, and the loss or the answers behind them.

    Each learns by its own loss, and the mean of their logits answers (Lakshminarayanan et al. 2017, "deep ensembles"):
    on few images they err in different places, the more so a head that reads classical texture features.
    """

    def __init__(
        self,
        networks: Sequence[DefectNetwork],
        loss: Callable[[Tensor, Tensor], Tensor] = losses.cross_entropy,
        label_smoothing: float = 0.0,
        adjustment: Sequence[float] | None = None,
        correction: Sequence[float] | None = None,
        gives_features: bool = False,
        texture: TextureHead | None = None,
    ) -> None:
        """adjustment: added to the logits in training; correction: in evaluation [classes]. gives_features: also answer
        the pooled features."""
        super().__init__()
        self.networks, self.texture = nn.ModuleList(networks), texture
        self.stride, self.middle = networks[0].stride, networks[0].middle
        self.loss, self.label_smoothing, self.gives_features = loss, label_smoothing, gives_features
        zero = [0.0] * networks[0].head.out_features
        self.adjustment: Tensor
        self.correction: Tensor
        self.register_buffer("adjustment", torch.tensor(adjustment or zero, dtype=torch.float32))
        self.register_buffer("correction", torch.tensor(correction or zero, dtype=torch.float32))

    def forward(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        """batch: image [n, channels, height, width] uint8, target [n, classes], readable [n], weight [n], perhaps
        texture [n, d], and what `augment.draw_parameters` gives."""
        images = batch["image"].float() / 255
        if self.training:
            images = augment.apply(images, batch)
            target = losses.smooth(batch["target"], self.label_smoothing)
            rows = [self.loss(logits + self.adjustment, target) for logits in self._members(images, batch)[0]]
            return weighted_sum(torch.stack(rows).mean(0), batch["weight"] * batch["readable"])
        members, heats, features = self._members(images, batch)
        logits, heat = torch.stack(members).mean(0), torch.stack(heats).mean(0)
        size = torch.tensor(images.shape[2:], device=heat.device)
        answers = {
            "probability": (logits + self.correction).softmax(1),
            "peak": peak(heat, self.stride, self.middle) / size,
            "heat": spread(heat, self.stride, self.middle, *images.shape[2:]),
        }
        answers |= {name: batch[name] for name in ("readable", "place") if name in batch}
        return {**answers, "feature": torch.cat(features, 1)} if self.gives_features else answers

    def _members(self, images: Tensor, batch: Batch) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Logits of each member, the texture's last, and heat maps and features of the networks."""
        logits, heats, features = (list(each) for each in zip(*(seen(images) for seen in self.networks), strict=True))
        if self.texture is not None:
            logits.append(self.texture(batch["texture"]).float())
        return logits, heats, features


def tile_starts(length: int, tiles: Tiles, step: int) -> list[int]:
    """Where tiles begin along a side: multiples of `step`, but for the last, which ends with the side; neighbours share
    at least the overlap. A side that is no longer than a tile has one."""
    if length <= tiles.size:
        return [0]
    stride = max(step, int(tiles.size * (1 - tiles.overlap)) // step * step)
    return [*range(0, length - tiles.size, stride), length - tiles.size]


def peak(heat: Tensor, stride: int, middle: float) -> Tensor:
    """Where each map [n, h, w] of logits is hottest, as (y, x) in pixels [n, 2]: the mean of the hottest place and its
    neighbours, weighed by the exponentials of their logits.

    stride: pixels from one place to the next; middle: from the image's edge to the middle of the first.
    """
    _, height, width = heat.shape
    place = heat.flatten(1).argmax(1)
    centre = torch.stack([place // width, place % width], 1)
    around = torch.arange(-1, 2, device=heat.device)
    rows, columns = centre[:, :1] + around, centre[:, 1:] + around
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    flat = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]
    near = heat.flatten(1).gather(1, flat.flatten(1)).masked_fill(~inside.flatten(1), -torch.inf)
    weight = near.softmax(1).view(-1, 3, 3)
    aside = torch.stack([weight.sum(2) @ around.float(), weight.sum(1) @ around.float()], 1)
    return (centre + aside) * stride + middle


def spread(heat: Tensor, stride: int, middle: float, height: int, width: int) -> Tensor:
    """The map [n, h, w] on even cells over the image: [n, rows, columns], HEAT_SIDE along the longer side.

    stride, middle: see `peak`. Larger maps are made smaller by their maxima; between places it is interpolated.
    """
    most = -(-max(heat.shape[1:]) // HEAT_SIDE)
    maps = F.max_pool2d(heat[:, None], most, ceil_mode=True)
    step, first = stride * most, middle + (most - 1) * stride / 2
    rows, columns = (max(1, round(HEAT_SIDE * side / max(height, width))) for side in (height, width))

    def places(cells: int, pixels: int, count: int) -> Tensor:
        """Where the middles of the cells lie in the map, as grid_sample wants it: its edges are at -1 and 1."""
        at = (torch.arange(cells, device=heat.device) + 0.5) * pixels / cells
        return ((at - first) / step + 0.5) * 2 / count - 1

    y, x = places(rows, height, maps.shape[2]), places(columns, width, maps.shape[3])
    grid = torch.stack([x.expand(rows, columns), y[:, None].expand(rows, columns)], 2)
    wide = F.grid_sample(
        maps, grid.expand(len(maps), -1, -1, -1), mode="bilinear", padding_mode="border", align_corners=False
    )
    return wide[:, 0]
