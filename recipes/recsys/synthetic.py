"""A generated log: drifting interests, a long tail, items that appear over time, content that tells part of it."""

from __future__ import annotations

import numpy as np

from recipes.recsys.config import SyntheticConfig

# Changes whenever the same keys would give another log.
VERSION = 2
_BEGIN_S = 1_704_067_200  # 2024-01-01
_SUCCESSORS = 3
_WORDS_A_TITLE = 8
_OTHER_WORDS = 400
_PRICES = (2.0, 0.5)
_FAMILIES = 4
_AT_ONCE = 100_000
# Items that have not appeared yet are drawn anew, so often.
_TRIES = 8
# Of one user, where two and a half are the mean: with many users one would have most of the log.
_MOST_VISITS = 100.0


def item_names(config: SyntheticConfig) -> list[str]:
    return [f"i{index}" for index in range(config.items)]


def items(config: SyntheticConfig) -> dict[str, list[str]]:
    """Columns of the item table: item_id, title, category, price, available_from."""
    world = _World(config)
    generator = np.random.default_rng([config.seed, 2])
    shape = (config.items, _WORDS_A_TITLE)
    tells = generator.random(shape) < config.content_share
    is_line = generator.random(shape) < 0.5
    kind = generator.integers(6, size=config.items)
    other = generator.integers(_OTHER_WORDS, size=shape)
    price = generator.lognormal(_PRICES[0] + 0.1 * (world.topic % 5), _PRICES[1])
    titles: list[str] = []
    for start in range(0, config.items, _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        columns = (world.topic, world.family, kind, tells, is_line, other)
        for topic, family, its_kind, *words in zip(*(column[part].tolist() for column in columns), strict=True):
            own = (f"kind{topic}x{its_kind}", f"line{topic}x{family}")
            titles.append(
                " ".join(own[line] if tell else f"word{word}" for tell, line, word in zip(*words, strict=True))
            )
    return {
        "item_id": item_names(config),
        "title": titles,
        "category": [f"c{topic // 3}" for topic in world.topic.tolist()],
        "price": [f"{value:.2f}" for value in price.tolist()],
        "available_from": [str(_BEGIN_S + int(appears)) for appears in world.appears.tolist()],
    }


def events(count: int, config: SyntheticConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """users, items [count] int32 and times [count] int64 in milliseconds, user by user."""
    world = _World(config)
    generator = np.random.default_rng([config.seed, 1])
    users, moments = _visits(count, config, generator)
    chosen = np.zeros(count, dtype=np.int32)
    starts = np.flatnonzero(np.append(True, users[1:] != users[:-1]))
    sizes = np.diff(np.append(starts, count))
    # Those who come oftest first: the n-th event of all who have one is made at once.
    order = np.argsort(-sizes, kind="stable")
    starts, sizes = starts[order], sizes[order]
    topic = generator.integers(config.topics, size=len(starts))
    before = np.full(len(starts), -1)
    for turn in range(int(sizes[0]) if len(sizes) else 0):
        going = int(np.searchsorted(-sizes, -turn))
        place, own = starts[:going] + turn, topic[:going]
        drifts, follows, where, among = generator.random((4, going))
        own = np.where(drifts < config.drift, (own + 1) % config.topics, own)
        own = np.where(drifts < config.drift / 2, (among * config.topics).astype(np.int64), own)
        item = world.popular(own, moments[place], generator)
        sequel = world.successors[before[:going], (where * _SUCCESSORS).astype(np.int64)]
        is_sequel = (before[:going] >= 0) & (follows < config.sequel_share) & (world.appears[sequel] <= moments[place])
        item = np.where(is_sequel, sequel, item)
        chosen[place], before[:going] = item, item
        topic[:going] = np.where(is_sequel, world.topic[item], own)
    return users, chosen, _BEGIN_S * 1000 + (moments * 1000).astype(np.int64)


def _visits(count: int, config: SyntheticConfig, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """users [count] and moments [count] in seconds. Some come often, most seldom; a user is active for a part of the
    time."""
    share = np.minimum(generator.pareto(1.5, config.users) + 0.3, _MOST_VISITS)
    users = np.sort(generator.choice(config.users, count, p=share / share.sum())).astype(np.int32)
    span = config.days * 86_400
    begins = generator.uniform(-0.2, 0.9, config.users) * span
    lasts = begins + generator.exponential(0.4, config.users) * span
    low, high = np.clip(begins, 0, 0.95 * span), np.clip(lasts, 0.05 * span, span)
    moments = low[users] + generator.random(count) * np.maximum(high - low, 3600)[users]
    moments = np.clip(moments, 0, span - 1)
    return users, moments[np.lexsort((moments, users))]


class _World:
    """What is true of the items: topic, family, popularity, when each appears and what follows it."""

    def __init__(self, config: SyntheticConfig) -> None:
        generator = np.random.default_rng([config.seed, 0])
        count, span = config.items, config.days * 86_400
        self.topic = generator.integers(config.topics, size=count)
        self.family = generator.integers(_FAMILIES, size=count)
        is_new = generator.random(count) < config.new_share
        self.appears = np.where(is_new, generator.random(count) * span, 0.0)
        rank = generator.permutation(count) // config.topics + 1
        popularity = rank**-config.popularity_exponent
        self._by_topic = _Drawn(self.topic, config.topics, popularity)
        # Successors are of one family of a topic: content tells them as it tells the topic.
        groups = config.topics * _FAMILIES
        target = _Drawn(self.topic * _FAMILIES + self.family, groups, popularity)
        wanted = (self.topic * 7 + 3) % config.topics * _FAMILIES + self.family
        self.successors = np.stack([target.draw(wanted, generator.random(count)) for _ in range(_SUCCESSORS)], axis=1)
        old = np.flatnonzero(~is_new)
        self._always = old if len(old) else np.array([int(self.appears.argmin())])

    def popular(self, topics: np.ndarray, moments: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """An item of each topic that is there by then, the popular ones more often; where there is none, any."""
        item = self._always[generator.integers(len(self._always), size=len(topics))]
        missing = np.arange(len(topics))
        for _ in range(_TRIES):
            if not len(missing):
                break
            drawn = self._by_topic.draw(topics[missing], generator.random(len(missing)))
            there = self.appears[drawn] <= moments[missing]
            item[missing[there]] = drawn[there]
            missing = missing[~there]
        return item


class _Drawn:
    """Items by groups, to be drawn by their weights within a group."""

    def __init__(self, group: np.ndarray, groups: int, weight: np.ndarray) -> None:
        self._items = np.argsort(group, kind="stable")
        self._ends = np.searchsorted(group[self._items], np.arange(groups + 1))
        self._total = np.append(0.0, np.cumsum(weight[self._items]))

    def draw(self, groups: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """One item of each of `groups`, by draws in [0, 1); of an empty group the item beside it."""
        low, high = self._ends[groups], self._ends[groups + 1]
        aim = self._total[low] + draws * (self._total[high] - self._total[low])
        found = np.searchsorted(self._total, aim, side="right") - 1
        return self._items[np.clip(found, low, np.maximum(high - 1, low)).clip(max=len(self._items) - 1)]
