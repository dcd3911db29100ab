"""A recipe file for the user's own tickets, made by looking at them. Torch-free."""

from __future__ import annotations

from dist_train.errors import ConfigError
from dist_train.file_profile import Column, FileProfile

_LABEL_NAMES = ("label", "queue", "category", "intent", "class", "topic", "department", "team", "group", "assigned")
_TIME_NAMES = ("time", "date", "created", "opened", "timestamp")
_MOST_LABELS = 1000
# Steps after which a small model has learnt most of what it can from a few ten thousand short texts.
_GOAL_STEPS, _BATCH = 3000, 64


def write_starter(profile: FileProfile, path: str, label: str | None, text: list[str]) -> str:
    """The text of recipe.yaml. path: as it shall stand in the file. label, text: columns that the user names himself.

    ConfigError when no column looks like labels or texts, with what each looks like.
    """
    labels = _given(profile, label, "--label") if label else _find_label(profile)
    texts = [_given(profile, name, "--text") for name in text] or _find_texts(profile, labels)
    rows = f"{profile.rows:,} rows" if profile.is_whole else f"more than {profile.rows:,} rows"
    lines = [
        f"# Tickets of {_one_line(path)}, routed by {_one_line(labels.name)}.",
        "#",
        "#   dist-train plan recipe.yaml     every setting, the data's check, and what would run",
        "#   dist-train run recipe.yaml      train, evaluate, report",
        "#",
        f"# Made by looking at the file: {rows}. What each column looks like:",
        *(f"#   {_one_line(column.name)}: {_describe(column)}" for column in profile.columns),
        "# Every key with its meaning: dist-train recipes --keys ticket_routing",
        "extends: ticket_routing",
        "data:",
        f"  path: {_quoted(path)}",
        f"  text_columns: [{', '.join(_quoted(column.name) for column in texts)}]  # joined into the text of a ticket",
        f"  label_column: {_quoted(labels.name)}  # {_describe_labels(labels)}",
        *_id_line(profile, labels, texts),
        *_time_line(profile),
        *_rare_line(labels),
        "train:",
        f"  epochs: {_epochs(profile.rows)}  # passes over the training split; fewer for more data",
    ]
    smallest, largest = min(labels.counts.values()), max(labels.counts.values())
    if largest >= 20 * smallest:
        lines += [
            "task:",
            f"  class_weights: balanced  # the largest class has {largest:,} rows, the smallest {smallest:,}",
        ]
    return "\n".join(lines) + "\n"


def _given(profile: FileProfile, name: str, flag: str) -> Column:
    column = profile.column(name)
    if column is None:
        raise ConfigError(f"{flag} is {name}, but the file has the columns {', '.join(_names(profile))}.")
    return column


def _find_label(profile: FileProfile) -> Column:
    """The column whose few values repeat; a name that says so comes first."""
    found = [column for column in profile.columns if _is_label(column)]
    if not found:
        raise ConfigError(f"no column looks like labels: name it with --label COLUMN.\n{_overview(profile)}")
    return min(found, key=lambda column: (not _is_named(column, _LABEL_NAMES), column.mean_words, column.distinct))


def _is_label(column: Column) -> bool:
    if not 2 <= column.distinct <= min(_MOST_LABELS, column.rows // 2) or column.filled_share < 0.5:
        return False
    return (
        column.mean_words <= 5 and column.time_share < 0.9 and not (column.number_share > 0.9 and column.distinct > 50)
    )


def _find_texts(profile: FileProfile, label: Column) -> list[Column]:
    found = [
        column
        for column in profile.columns
        if column is not label
        and column.mean_words >= 2
        and column.time_share < 0.5
        and column.number_share < 0.5
        and column.distinct > min(column.rows / 5, 50)
    ]
    if not found:
        raise ConfigError(f"no column looks like text: name it with --text COLUMN.\n{_overview(profile)}")
    return found


def _id_line(profile: FileProfile, label: Column, texts: list[Column]) -> list[str]:
    taken = {label.name, *(column.name for column in texts)}
    ids = [
        column
        for column in profile.columns
        if column.name not in taken and column.is_unique() and column.time_share < 0.5
    ]
    ids.sort(key=lambda column: "id" not in column.name.lower())
    return [f"  id_column: {_quoted(ids[0].name)}  # names a ticket in predictions"] if ids else []


def _time_line(profile: FileProfile) -> list[str]:
    for column in profile.columns:
        seconds = column.number_share > 0.99 and _is_named(column, _TIME_NAMES)
        if column.filled_share == 1.0 and (column.time_share > 0.99 or seconds):
            return [f"  time_column: {_quoted(column.name)}  # older tickets train, newer ones test"]
    return []


def _rare_line(label: Column) -> list[str]:
    alone = [name for name, count in label.counts.items() if count < 5]
    if not alone:
        return []
    return [f"  drop_labels_below: 5  # {len(alone)} classes have fewer rows: too few to learn from and to test on"]


def _epochs(rows: int) -> int:
    return max(4, min(40, round(_GOAL_STEPS * _BATCH / max(1, rows))))


def _describe(column: Column) -> str:
    kind = f"{column.mean_words:.1f} words"
    if column.time_share > 0.9:
        kind = "times"
    elif column.number_share > 0.9:
        kind = "numbers"
    unique = ", no two alike" if column.is_unique() else f", {column.distinct:,} different"
    empty = f", {1 - column.filled_share:.0%} empty" if column.filled_share < 1 else ""
    return kind + unique + empty


def _describe_labels(label: Column) -> str:
    first, *_, last = label.counts
    shown = [f"{label.counts[name]:,} rows ({_one_line(name)})" for name in (first, last)]
    return f"{label.distinct} classes, from {' to '.join(shown)}"


def _one_line(text: str) -> str:
    """For a comment: a value must not end it."""
    return " ".join(text.split())


def _overview(profile: FileProfile) -> str:
    return "The columns: " + "; ".join(f"{column.name} ({_describe(column)})" for column in profile.columns)


def _is_named(column: Column, names: tuple[str, ...]) -> bool:
    return any(name in column.name.lower() for name in names)


def _names(profile: FileProfile) -> list[str]:
    return [column.name for column in profile.columns]


def _quoted(text: str) -> str:
    import yaml

    return str(yaml.safe_dump(text, default_flow_style=True, width=10**9)).removesuffix("\n").removesuffix("\n...")
