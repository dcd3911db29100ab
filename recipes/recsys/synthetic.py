"""A generated log: drifting interests, a long tail, items that appear over time, content that tells part of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from recipes.recsys.config import SyntheticConfig

# Changes whenever the same keys would give another log.
VERSION = 1
_BEGIN_S = 1_704_067_200  # 2024-01-01
_SUCCESSORS = 3
_WORDS_A_TITLE = 8
_OTHER_WORDS = 400
_PRICES = (2.0, 0.5)


def item_names(config: SyntheticConfig) -> list[str]:
    return [f"i{index}" for index in range(config.items)]


def items(config: SyntheticConfig) -> list[dict[str, Any]]:
    """Rows of the item table: item_id, title, category, price, available_from."""
    world = _World(config)
    generator = np.random.default_rng([config.seed, 2])
    rows = []
    for index, name in enumerate(item_names(config)):
        topic, family = int(world.topic[index]), int(world.family[index])
        telling = generator.random(_WORDS_A_TITLE) < config.content_share
        own = [f"kind{topic}x{generator.integers(6)}", f"line{topic}x{family}"]
        words = [
            own[int(generator.integers(2))] if tells else f"word{generator.integers(_OTHER_WORDS)}"
            for tells in telling.tolist()
        ]
        price = generator.lognormal(_PRICES[0] + 0.1 * (topic % 5), _PRICES[1])
        rows.append(
            {
                "item_id": name,
                "title": " ".join(words),
                "category": f"c{topic // 3}",
                "price": f"{price:.2f}",
                "available_from": str(_BEGIN_S + int(world.appears[index])),
            }
        )
    return rows


def events(count: int, config: SyntheticConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """users, items [count] int32 and times [count] int64 in milliseconds, user by user."""
    world = _World(config)
    generator = np.random.default_rng([config.seed, 1])
    # Some users come often, most seldom; a user is active for a part of the time.
    share = generator.pareto(1.5, config.users) + 0.3
    users = np.sort(generator.choice(config.users, count, p=share / share.sum())).astype(np.int32)
    span = config.days * 86_400
    begins = generator.uniform(-0.2, 0.9, config.users) * span
    lasts = begins + generator.exponential(0.4, config.users) * span
    low, high = np.clip(begins, 0, 0.95 * span), np.clip(lasts, 0.05 * span, span)
    moments = low[users] + generator.random(count) * np.maximum(high - low, 3600)[users]
    moments = np.clip(moments, 0, span - 1)
    order = np.lexsort((moments, users))
    moments = moments[order]
    chosen = np.zeros(count, dtype=np.int32)
    draws = generator.random((count, 4))
    favourite = generator.integers(config.topics, size=config.users)
    topic, before = -1, -1
    for place in range(count):
        user = users[place]
        if place == 0 or users[place - 1] != user:
            topic, before = int(favourite[user]), -1
        drifts, follows, where, among = draws[place]
        if drifts < config.drift:
            topic = int(among * config.topics) if drifts < config.drift / 2 else (topic + 1) % config.topics
        item = -1
        if before >= 0 and follows < config.sequel_share:
            item = int(world.successors[before, int(where * _SUCCESSORS)])
            item = item if world.appears[item] <= moments[place] else -1
        if item < 0:
            item = world.popular(topic, where, moments[place])
        else:
            topic = int(world.topic[item])
        chosen[place], before = item, item
    return users, chosen, _BEGIN_S * 1000 + (moments * 1000).astype(np.int64)


class _World:
    """What is true of the items: topic, family, popularity, when each appears and what follows it."""

    def __init__(self, config: SyntheticConfig) -> None:
        generator = np.random.default_rng([config.seed, 0])
        count, span = config.items, config.days * 86_400
        self.topic = generator.integers(config.topics, size=count)
        self.family = generator.integers(4, size=count)
        is_new = generator.random(count) < config.new_share
        self.appears = np.where(is_new, generator.random(count) * span, 0.0)
        rank = generator.permutation(count) // config.topics + 1
        self._popularity = rank**-config.popularity_exponent
        self._of_topic = [np.flatnonzero(self.topic == topic) for topic in range(config.topics)]
        # Successors are of one family of a topic: content tells them as it tells the topic.
        self.successors = np.zeros((count, _SUCCESSORS), dtype=np.int64)
        for topic in range(config.topics):
            for family in range(4):
                members = np.flatnonzero((self.topic == topic) & (self.family == family))
                target = np.flatnonzero((self.topic == (topic * 7 + 3) % config.topics) & (self.family == family))
                target = target if len(target) else np.arange(count)
                weight = self._popularity[target] / self._popularity[target].sum()
                for item in members:
                    self.successors[item] = generator.choice(target, _SUCCESSORS, p=weight)
        self._all = np.arange(count)

    def popular(self, topic: int, draw: float, moment: float) -> int:
        """An item of the topic that is there by then, the popular ones more often."""
        members = self._of_topic[topic]
        members = members[self.appears[members] <= moment]
        if not len(members):
            members = self._all[self.appears <= moment]
        total = np.cumsum(self._popularity[members])
        return int(members[np.searchsorted(total, draw * total[-1], side="right").clip(max=len(members) - 1)])
