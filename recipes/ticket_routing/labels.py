"""Which labels the model has: those of the data, or the pinned list; and which of them may lack rows. Torch-free."""

from __future__ import annotations

import collections
import difflib
from collections.abc import Collection, Mapping

from dist_train.errors import DataError
from recipes.ticket_routing.config import DataConfig
from recipes.ticket_routing.tickets import Tickets

KEY = "data.labels"
_MOST_NAMES = 10


def choose_labels(tickets: Tickets, data: DataConfig, known: Collection[str]) -> tuple[list[str], list[str]]:
    """The model's labels in their order, and warnings: of what the config drops, and of the doubtful. DataError for
    what cannot be split, and for a label that a pinned list lacks. known: labels that an earlier model knows."""
    counts, empty, listed = tickets.counts(), tickets.empty(), data.labels or []
    warnings = [f"{empty} rows without text were left out"] if empty else []
    least = data.drop_labels_below or 0
    rare = {label: count for label, count in counts.items() if count < least and label not in listed}
    if rare:
        warnings.append(f"data.drop_labels_below left out {sum(rare.values())} rows of: {', '.join(sorted(rare))}")
    counts = {label: count for label, count in counts.items() if label not in rare}
    if len(counts) < 2:
        if not counts and empty:
            raise DataError(
                f"all {empty} rows are without text in {', '.join(data.text_columns)}: change data.text_columns."
            )
        what = f"all rows have the class {next(iter(counts))!r}" if counts else "no row is left"
        raise DataError(f"{what} in {data.label_column!r}: at least two classes are needed. Change data.label_column.")
    folded = collections.Counter(label.casefold() for label in counts)
    alike = sorted(label for label in counts if folded[label.casefold()] > 1)
    if alike:
        warnings.append(f"classes that differ in case alone count as different: {', '.join(map(repr, alike[:10]))}")
    if listed:
        _refuse_unlisted(tickets, counts, listed)
    alone = sorted(label for label, count in counts.items() if count == 1 and label not in known)
    if alone:
        raise DataError(
            f"a class with one row only cannot be split: {', '.join(map(repr, alone[:10]))}"
            f"{' …' if len(alone) > 10 else ''}.\nMerge them, or leave them out with data.drop_labels_below=2."
        )
    return data.labels or sorted(counts), warnings


def _refuse_unlisted(tickets: Tickets, counts: Mapping[str, int], listed: list[str]) -> None:
    unlisted = sorted(set(counts) - set(listed), key=lambda label: (-counts[label], label))
    if not unlisted:
        return
    lines = []
    for label in unlisted[:_MOST_NAMES]:
        near = difflib.get_close_matches(label, listed, n=1, cutoff=0.8)
        hint = f" (listed is {near[0]!r})" if near else ""
        lines.append(f"  {label!r}: {counts[label]} row(s), the first is row {tickets.first_row(label)}{hint}")
    more = f"\n  and {len(unlisted) - _MOST_NAMES} more" if len(unlisted) > _MOST_NAMES else ""
    raise DataError(
        f"the data has {len(unlisted)} label(s) that {KEY} does not list:\n" + "\n".join(lines) + more + "\n"
        f"Add them to {KEY}, or mend or leave out these rows; {KEY}=null takes the labels that the data has.",
        KEY,
    )


def check_missing(missing: list[str], known: Collection[str], pinned: bool) -> list[str]:
    """Warnings for labels without training rows that an earlier model knows; DataError for the others of a pinned
    list."""
    unlearnable = [name for name in missing if name not in known]
    if pinned and unlearnable:
        raise DataError(
            f"{KEY} lists {_some(unlearnable)}, but the training split has no row of it, and no earlier model "
            f"(model.init_from) knows it.\nAdd rows, or take it off {KEY}.",
            KEY,
            "model.init_from",
        )
    return [
        f"no training row of {label!r}: its weights are those of model.init_from, and training without its rows makes "
        "the model predict it less often"
        for label in missing
        if label in known
    ]


def departures(names: list[str], known: Collection[str]) -> list[str]:
    """A warning that names the earlier model's labels that this one does not have."""
    gone = sorted(set(known) - set(names))
    if not gone:
        return []
    return [f"the model of model.init_from knows {_some(gone)}, which this one will not: list it in {KEY} to keep it"]


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:_MOST_NAMES])) + (" …" if len(names) > _MOST_NAMES else "")
