"""A study: ordinary runs below one folder. Whatever ends it, the same command goes on: finished runs are kept, a run
that was broken off is resumed, one that another process is at is left to it."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from dist_train import config_io
from dist_train.config import RunConfig
from dist_train.errors import BusyError, ConfigError, DataError, Preempted, ToolkitError
from dist_train.prepared import is_of_now
from dist_train.recipe import load_recipe
from dist_train.rundir import RunDir, read_json, write_atomic, write_json
from launcher import start
from launcher.process import start_detached
from launcher.summary import open_console


@dataclass(frozen=True)
class Member:
    """One run of a study."""

    index: int
    title: str
    """For the user, for example `hybrid, seed 0`."""
    recipe: str
    settings: tuple[str, ...]
    """As they would be typed, without where the run lies."""
    run: RunDir

    @property
    def words(self) -> list[str]:
        return [*self.settings, f"output_dir={self.run.path.parent}", f"name={self.run.name}"]

    @property
    def is_done(self) -> bool:
        """Whether its run has a report, of the settings that are asked for and the data of now."""
        return self.run.report_json.is_file() and self.has_its_settings() and self.has_its_data

    def has_its_settings(self) -> bool:
        wanted = config_io.result_fingerprint(config_io.load(self.recipe, self.words).config)
        return _without_pins(config_io.load_run_config(self.run), wanted) == wanted

    @functools.cached_property
    def has_its_data(self) -> bool:
        """Whether its run was trained on what its paths hold now; where they hold nothing any more, it is kept."""
        config = config_io.load_run_config(self.run)
        try:
            return is_of_now(Path(read_json(self.run.data_facts)["folder"]), config, load_recipe(config.recipe))
        except DataError:
            return True


def study_folder(config: RunConfig, recipe: str, kind: str) -> Path:
    """Where the runs of a study of this recipe lie, unless it has a name."""
    return config.output_dir / (config.name or f"{recipe.removesuffix('.yaml').strip('./').replace('/', '-')}-{kind}")


def print_list(members: Sequence[Member]) -> None:
    for member in members:
        print(f"{member.index:3d}  {member.run.name:40s} {' '.join(member.settings)}")


def choose(members: Sequence[Member], only: int | None) -> list[Member]:
    """All, or the one at an index. ConfigError for an index that there is not."""
    if only is None:
        return list(members)
    if not 0 <= only < len(members):
        raise ConfigError(f"--only is {only}, but this study has the runs 0 to {len(members) - 1} (--list).")
    return [members[only]]


def run_members(chosen: Sequence[Member], total: int, again: Sequence[str]) -> dict[str, ToolkitError]:
    """Bring each to its end, one after the other. Returns what failed, by the run's name.

    again: the words that go on with the study, for whoever is stopped in the middle.
    """
    failed: dict[str, ToolkitError] = {}
    for member in chosen:
        print(f"\n== run {member.index + 1} of {total}: {member.title} ==", flush=True)
        try:
            _bring_to_its_end(member)
        except Preempted as error:
            raise Preempted(f"{error}\nGo on with the study: {shlex.join(['dist-train', *again])}") from error
        except BusyError as error:
            print(f"left to the process that is at it: {error}", flush=True)
        except ToolkitError as error:
            failed[member.run.name] = error
            print(f"{error.title}: {error}", file=sys.stderr, flush=True)
    return failed


def run_in_background(folder: Path, words: Sequence[str], count: int) -> None:
    """Start the command of these words on its own."""
    folder.mkdir(parents=True, exist_ok=True)
    log = (folder / f"{words[0]}.log").absolute()
    pid = start_detached([sys.executable, "-P", "-m", "launcher", *words], log)
    print(f"{count} runs go on in the background.")
    print(f"follow them:   tail -f {shlex.quote(str(log))}, or dist-train runs --output-dir {folder}")
    print(f"stop them:     kill -INT {pid}   (the step under way is saved; the same command goes on)")


def write_table(
    folder: Path,
    name: str,
    rows: Sequence[Sequence[str]],
    sentences: Sequence[str],
    note: str,
    values: dict[str, Any],
    picture: str | None = None,
) -> None:
    """Keep what a study says as NAME.json and NAME.md, and print it. rows: a header first. picture: a file beside."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{name}.json", values)
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if rows:
        lines.insert(1, f"|{'---|' * len(rows[0])}")
    shown = [f"![]({picture})", ""] if picture else []
    text = [f"# {name.capitalize()}", "", *lines, "", note, "", *shown, *(f"- {line}" for line in sentences), ""]
    write_atomic(folder / f"{name}.md", "\n".join(text))
    print_table(rows, f"{folder}: test split", (*sentences, note))
    print(f"\nkept in {folder / name}.md and {name}.json")


def print_table(rows: Sequence[Sequence[str]], title: str, sentences: Sequence[str]) -> None:
    """rows: a header first; none where there is no table."""
    console = open_console()
    if rows:
        table = Table(*rows[0], title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    for line in sentences:
        console.print(line, soft_wrap=True)


def _bring_to_its_end(member: Member) -> None:
    run = member.run
    if not run.config.is_file():
        start.run(member.recipe, member.words)
        return
    if not member.has_its_settings():
        raise ConfigError(
            f"{run.path} is a run of other settings than this study's: give the study another name=..., or delete that "
            f"run. To see them: dist-train recipes --keys {member.recipe}, and {run.config}."
        )
    if run.report_json.is_file():
        if not member.has_its_data:
            raise ConfigError(
                f"the data behind {run.path}, or how it is prepared, has changed since, and what is measured on both "
                "cannot be compared. Bring the old data back, or give the study another name=..., or delete that run."
            )
        print(f"kept           {run.path}", flush=True)
        return
    start.resume(str(run.path), [], [])


def _without_pins(known: RunConfig, wanted: str) -> str:
    """The fingerprint of a run's config; a commit that its start has looked up for a hub name is no other setting."""
    own = config_io.result_fingerprint(known)
    if own == wanted or not hasattr(known.model, "revision"):
        return own
    unpinned = known.model_copy(update={"model": known.model.model_copy(update={"revision": None})})
    return config_io.result_fingerprint(unpinned)
