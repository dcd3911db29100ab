"""The module of recommendation: item vectors, the session's encoder, the loss over the catalogue, the ranking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_train.task import Batch
from recipes.recsys.encoders import build_encoder
from recipes.recsys.losses import full_softmax, sampled_softmax
from recipes.recsys.mixture import mix, rule_scores
from recipes.recsys.ranking import Ranked, can_be_listed, rank, rank_rows


class Catalogue(nn.Module):
    """The items' vectors: an own one of each item that was trained on, and one made of its content.

    Items are 1 to n; those that were trained on come first. 0 is no item, of zeros.
    """

    numbers: Tensor
    categories: Tensor

    def __init__(
        self,
        width: int,
        trained: int,
        numbers: Tensor | None,
        categories: Tensor | None,
        category_sizes: Sequence[int],
        has_ids: bool,
        id_dropout: float,
        content_scale: float,
    ) -> None:
        """numbers [n + 1, features] float, categories [n + 1, columns] int: the content, row 0 of no item."""
        super().__init__()
        self.trained, self.id_dropout, self.content_scale = trained, id_dropout, content_scale
        self.own = nn.Embedding(trained + 1, width) if has_ids else None
        self.content = nn.Linear(numbers.shape[1], width) if numbers is not None and numbers.shape[1] else None
        self.category = nn.ModuleList(nn.Embedding(size, width) for size in category_sizes)
        # Data, and no weights: they come from the prepared folder or the model folder.
        self.register_buffer("numbers", numbers if self.content is not None else None, persistent=False)
        self.register_buffer("categories", categories if len(category_sizes) else None, persistent=False)
        for table in (*self.category, *([self.own] if self.own is not None else [])):
            nn.init.normal_(table.weight, std=0.02)
        if self.content is not None:
            nn.init.normal_(self.content.weight, std=0.02 / self.content_scale)
            nn.init.zeros_(self.content.bias)

    @property
    def has_content(self) -> bool:
        return self.content is not None or len(self.category) > 0

    def draw_kept(self, device: torch.device) -> Tensor | None:
        """Whether each trained item keeps its own vector in this training step: [trained + 1]; None: all do."""
        if not (self.training and self.own is not None and self.has_content and self.id_dropout):
            return None
        return torch.rand(self.trained + 1, device=device) >= self.id_dropout

    def forward(self, items: Tensor, kept: Tensor | None = None) -> Tensor:
        """Vectors of items [any shape] int64: [any shape, width]."""
        parts = []
        if self.own is not None:
            has_own = (items > 0) & (items <= self.trained)
            known = torch.where(has_own, items, 0)
            if kept is not None:
                has_own = has_own & kept[known]
            parts.append(self.own(known) * has_own[..., None])
        content = []
        if self.content is not None:
            content.append(self.content(self.numbers[items] * self.content_scale))
        content += [table(self.categories[items, column].long()) for column, table in enumerate(self.category)]
        if content:
            parts.append(sum(content[1:], content[0]) * (items > 0)[..., None])
        return sum(parts[1:], parts[0])


class Recommender(nn.Module):
    """Reads a session's items and ranks all items as the next one. Item vectors are tied: those that are read are those
    that are ranked."""

    log_shares: Tensor | None
    appearance: Tensor | None
    available_from: Tensor | None
    available_until: Tensor | None
    rules_after: Tensor | None
    rules_value: Tensor | None

    def __init__(
        self,
        catalogue: Catalogue,
        config: Any,
        longest: int,
        items: int,
        k: int,
        mask_seen: bool,
        log_shares: Tensor | None = None,
        negatives: int = 0,
        available: tuple[Tensor, Tensor] | None = None,
        appearance: Tensor | None = None,
        rules: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """config: the recipe's `model` section. items: how many there are. longest: most events of a session.

        log_shares [trained]: under sampled softmax, the logarithm of each trained item's share of the targets, by which
        items are drawn; None: full softmax. available: from when and until when each item [items + 1] may be
        recommended, milliseconds since 1970. appearance [trained] int32: which trained item appeared first, second …
        rules: what follows each trained item and how much it counts, both [trained + 1, most]; None: the network ranks
        alone.
        """
        super().__init__()
        self.items, self.k, self.mask_seen, self.negatives = items, k, mask_seen, negatives
        self.catalogue = catalogue
        self.start = nn.Parameter(torch.zeros(1, config.width))
        self.encoder = build_encoder(config, longest + 1)
        # How far logits reach is learnt; a power, so that it stays positive.
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.input_scale, self.rules_share = config.input_scale, config.rules_share
        self.register_buffer("log_shares", log_shares, persistent=False)
        self.register_buffer("appearance", appearance, persistent=False)
        self.register_buffer("available_from", available[0] if available else None, persistent=False)
        self.register_buffer("available_until", available[1] if available else None, persistent=False)
        self.register_buffer("rules_after", rules[0] if rules else None, persistent=False)
        self.register_buffer("rules_value", rules[1] if rules else None, persistent=False)

    def forward(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        """batch: items [rows, events] int64, 0 behind a row's last event; gaps [rows, events + 1] int64.

        In training: target [n] int64; place [n] int64, in rows x (events + 1) states, of what comes before each; row
        [n] int64; share [n] float, of each target in its row's weight; weight [rows]; appeared [n] int32, how many
        trained items had appeared when the target came: others are not held against it.
        In evaluation: last [rows] int64, the number of events; asked [rows, targets], the targets, 0 for none; seen
        [rows, any]; moment [rows]; most_targets [rows, most] anything: how many there are in any batch.
        """
        kept = self.catalogue.draw_kept(batch["items"].device)
        events = self.catalogue(batch["items"], kept) * self.input_scale
        start = self.start[None].expand(len(events), 1, -1)
        states = self.encoder(torch.cat([start.to(events.dtype), events], dim=1), batch["gaps"])
        if self.training:
            return self._loss(states, batch, kept)
        last = states[torch.arange(len(states), device=states.device), batch["last"]]
        return self._rank(last * self.log_scale.exp(), batch)

    def vectors(self) -> Tensor:
        """Of every item: [items, width]. With a session's state their products are the network's scores."""
        return self.catalogue(torch.arange(1, self.items + 1, device=self.start.device))

    def _loss(self, states: Tensor, batch: Batch, kept: Tensor | None) -> Tensor:
        queries = states.flatten(0, 1)[batch["place"]] * self.log_scale.exp()
        targets = batch["target"] - 1
        if self.log_shares is None:
            trained = torch.arange(1, self.catalogue.trained + 1, device=queries.device)
            losses = full_softmax(queries, self.catalogue(trained, kept), targets, self.appearance, batch["appeared"])
        else:
            drawn = self._draw(queries.device)
            vectors = self.catalogue(torch.cat([targets, drawn]) + 1, kept)
            positive, negatives = vectors[: len(targets)], vectors[len(targets) :]
            expected = self.log_shares[drawn] + torch.log(torch.tensor(float(self.negatives), device=queries.device))
            hidden = None
            if self.appearance is not None:
                hidden = self.appearance[drawn] >= batch["appeared"][:, None]
            losses = sampled_softmax(queries, positive, targets, negatives, drawn, expected, hidden)
        weight = batch["weight"][batch["row"]]
        # A row of weight 0 is selected away: NaN * 0 would be NaN.
        return torch.where(weight > 0, losses * weight * batch["share"], torch.zeros_like(losses)).sum()

    def _is_trained(self) -> Tensor:
        return torch.arange(self.items, device=self.start.device) < self.catalogue.trained

    def _draw(self, device: torch.device) -> Tensor:
        """Items by their shares, with replacement: the inverse of the cumulative shares."""
        assert self.log_shares is not None
        total = self.log_shares.double().exp().cumsum(0)
        drawn = torch.rand(self.negatives, device=device, dtype=torch.float64) * total[-1]
        return torch.searchsorted(total, drawn).clamp(max=self.catalogue.trained - 1)

    def _rank(self, queries: Tensor, batch: Batch) -> dict[str, Tensor]:
        table = self.vectors()
        excluded = batch["seen"] if self.mask_seen else batch["seen"][:, :0]
        parts: list[Ranked] = []
        # Without content an item that was not trained on has no vector, and its score of 0 would mean nothing.
        known = None if self.catalogue.has_content else self._is_trained()
        for rows in torch.arange(len(queries), device=queries.device).split(rank_rows(self.items)):
            candidates = None if known is None else known.expand(len(rows), -1)
            if self.available_from is not None and self.available_until is not None:
                moment = batch["moment"][rows, None]
                there = (self.available_from[1:] <= moment) & (moment < self.available_until[1:])
                candidates = there if candidates is None else candidates & there
            asked = batch["asked"][rows]
            listed = can_be_listed(self.items, asked, excluded[rows], candidates)
            scores = queries[rows] @ table.T
            if self.rules_after is not None and self.rules_value is not None:
                events, last = batch["items"][rows], batch["last"][rows]
                spoken = rule_scores(events, last, self.rules_after, self.rules_value, self.items)
                scores = mix(scores, spoken, self.rules_share, listed)
            parts.append(rank(scores, asked, listed, self.k))
        above, tied, best, best_scores = (torch.cat(part) for part in zip(*parts, strict=True))
        # As wide in every batch: rows of several batches stand in one array.
        wide = (0, int(batch["most_targets"].shape[1]) - above.shape[1])
        above, tied = F.pad(above, wide), F.pad(tied, wide)
        return {"above": above, "tied": tied, "best": best, "best_score": best_scores}
