"""Generated tickets: any number, the same for one seed and version; row i does not depend on how many there are.

What tells the queue: (1) topic words and product codes, blurred by words that every queue uses; (2) in a part of the
tickets only a contrast, "the trouble comes from the A … does not come from the B", in either order: which noun is
negated is told by words apart from it, so adjacent word pairs cannot say, a model that reads the sentence can. The
share of wrong labels bounds what any model can reach.
"""

from __future__ import annotations

from collections.abc import Iterator

from recipes.ticket_routing.config import SyntheticConfig

# Changes whenever the same seed gives other tickets.
VERSION = 1

_CONTRAST_SHARE = 0.3
_MASK = (1 << 64) - 1
_QUEUES = {
    "Hardware": "laptop monitor keyboard dock battery headset webcam charger mouse desktop",
    "Network": "vpn router wifi switch firewall proxy cable gateway modem bandwidth",
    "Access": "password account badge login token role permission certificate lockout directory",
    "Software": "installer licence plugin browser spreadsheet update patch editor viewer client",
    "Email": "mailbox calendar signature attachment inbox distribution spam archive outbox meeting",
    "Printing": "printer toner scanner tray paper spooler copier label queue cartridge",
    "Telephony": "phone voicemail extension conference handset dialtone roaming sim speaker ringtone",
    "Purchasing": "invoice order quote supplier budget delivery approval contract asset refund",
}
_COMMON_TEXT = """hello team please help since monday yesterday again urgent user cannot work office site system error
message shows tried restart still same problem need support today colleague screen slow issue request ticket thanks
regards after before during morning floor desk remote home started stopped failed sometimes always every customer"""
_COMMON = _COMMON_TEXT.split()
_PRODUCTS = ["Atlas", "Borealis", "Cobalt", "Dynamo", "Ember", "Falcon", "Granite", "Helix", "Indigo", "Juniper"]
_CAUSE = ("the trouble comes from the {}", "we are sure that the cause is the {}", "what fails here is the {}")
_NO_CAUSE = (
    "the trouble does not at all come from the {}",
    "we are sure that the cause is by no means the {}",
    "what certainly never fails here is the {}",
)


class _Draws:
    """A stream of random numbers from one integer (SplitMix64), the same in every version of Python."""

    def __init__(self, *parts: int) -> None:
        self._state = 0
        for part in parts:
            self._state = (self._state ^ part) & _MASK
            self._state = self._next()

    def _next(self) -> int:
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        value = self._state
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        return value ^ (value >> 31)

    def unit(self) -> float:
        return self._next() / 2.0**64

    def below(self, count: int) -> int:
        return self._next() % count

    def pick(self, words: list[str] | tuple[str, ...]) -> str:
        return words[self._next() % len(words)]


class Generator:
    """Tickets by their number."""

    def __init__(self, config: SyntheticConfig) -> None:
        self._config = config
        self.queues = [_queue_name(index) for index in range(config.queues)]
        self._nouns = [_queue_nouns(index) for index in range(config.queues)]
        weights = [1.0 / (index + 1) ** 0.7 for index in range(config.queues)]
        total = sum(weights)
        self._shares = [weight / total for weight in weights]

    def row(self, index: int) -> tuple[str, str]:
        """(text, queue) of ticket `index`."""
        config = self._config
        draws = _Draws(config.seed, VERSION, 1, index)
        if index > 0 and draws.unit() < config.near_duplicate_share:
            text, queue = self._original(draws.below(index))
            return self._edited(text, draws), queue
        return self._original(index)

    def _original(self, index: int) -> tuple[str, str]:
        config = self._config
        draws = _Draws(config.seed, VERSION, 2, index)
        queue = self._draw_queue(draws)
        words = self._contrast(queue, draws) if draws.unit() < _CONTRAST_SHARE else self._topical(queue, draws)
        if draws.unit() < 0.2:
            words += ["code", f"ERR-{1000 * (1 + self._blurred(queue, draws) % 9) + draws.below(1000)}"]
        words = [_typo(word, draws) if draws.unit() < config.typo_share else word for word in words]
        label = queue
        if draws.unit() < config.wrong_label_share:
            label = (queue + 1 + draws.below(config.queues - 1)) % config.queues
        return " ".join(words), self.queues[label]

    def _draw_queue(self, draws: _Draws) -> int:
        place = draws.unit()
        for index, share in enumerate(self._shares):
            place -= share
            if place < 0:
                return index
        return 0

    def _length(self, draws: _Draws) -> int:
        """Filler words: long-tailed, 4 to 120."""
        return min(120, int(4 / max(1e-9, draws.unit()) ** 0.7))

    def _topical(self, queue: int, draws: _Draws) -> list[str]:
        words = [draws.pick(_COMMON) for _ in range(self._length(draws))]
        for _ in range(3 + draws.below(3)):
            # With the chance `overlap` the word belongs to any queue at all.
            source = draws.below(self._config.queues) if draws.unit() < self._config.overlap else queue
            words.insert(draws.below(len(words) + 1), draws.pick(self._nouns[source]))
        if draws.unit() < 0.3:
            words += ["on", draws.pick(_PRODUCTS)]
        return words

    def _contrast(self, queue: int, draws: _Draws) -> list[str]:
        other = (queue + 1 + draws.below(self._config.queues - 1)) % self._config.queues
        form = draws.below(len(_CAUSE))
        clauses = [
            _CAUSE[form].format(draws.pick(self._nouns[queue])),
            _NO_CAUSE[draws.below(len(_NO_CAUSE))].format(draws.pick(self._nouns[other])),
        ]
        if draws.unit() < 0.5:
            clauses.reverse()
        filler = [draws.pick(_COMMON) for _ in range(self._length(draws))]
        cut, end = draws.below(len(filler) + 1), draws.below(len(filler) + 1)
        cut, end = min(cut, end), max(cut, end)
        return [*filler[:cut], *clauses[0].split(), *filler[cut:end], *clauses[1].split(), *filler[end:]]

    def _blurred(self, queue: int, draws: _Draws) -> int:
        return queue if draws.unit() < 0.7 else draws.below(self._config.queues)

    def _edited(self, text: str, draws: _Draws) -> str:
        """Case, punctuation and at most one word in twenty."""
        words = text.split()
        if len(words) >= 20:
            words[draws.below(len(words))] = draws.pick(_COMMON)
        words[0] = words[0].capitalize()
        return " ".join(words) + draws.pick(("!", ".", " .", "!!"))


def generate(config: SyntheticConfig, start: int, stop: int) -> Iterator[tuple[str, str]]:
    """(text, queue) of the tickets start..stop."""
    generator = Generator(config)
    for index in range(start, stop):
        yield generator.row(index)


def _queue_name(index: int) -> str:
    names = list(_QUEUES)
    return names[index] if index < len(names) else f"Queue {index + 1}"


def _queue_nouns(index: int) -> list[str]:
    known = list(_QUEUES.values())
    if index < len(known):
        return known[index].split()
    draws = _Draws(VERSION, 3, index)
    syllables = ("ba", "do", "ke", "li", "mo", "nu", "pa", "re", "si", "to", "vu", "za")
    return ["".join(draws.pick(syllables) for _ in range(3)) for _ in range(10)]


def _typo(word: str, draws: _Draws) -> str:
    if len(word) < 4:
        return word
    place = 1 + draws.below(len(word) - 2)
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :] if place + 1 < len(word) else word
