"""Fetch a model or tokenizer from the hub into the cache folder: a pinned commit, only safe files, each verified.

Torch-free. A fetched folder is `<cache>/hub/<kind>s--<owner>--<name>/<commit>/` and exists whole or not at all; its
fetched.json lists size and hash of every file. What needs no network asks for none.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dist_train import hub
from dist_train.errors import DataError, StorageError, ToolkitError, UnsafeInputError
from dist_train.rundir import fsync_folder, read_json, write_atomic, write_json

RECORD = "fetched.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BRANCH = "main"
# Until the first byte: a hub that takes connections and says nothing is told of within ten seconds, all in all.
_ANSWER_S = 5.0
_DESCRIBING = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "*.model"),
)
_WEIGHTS = "model.safetensors"
_WEIGHTS_INDEX = "model.safetensors.index.json"
_WEIGHTS_SHARDS = "model-?????-of-?????.safetensors"
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")

Say = Callable[[str], None]


@dataclass(frozen=True)
class Fetched:
    """Files of one commit of the hub, on this machine's disk."""

    folder: Path
    revision: str
    """The full commit."""
    files: dict[str, dict[str, Any]]
    """Size in "bytes" and "sha256" of each file."""


@dataclass(frozen=True)
class _Remote:
    """A file as the hub describes it."""

    name: str
    size: int | None
    sha256: str | None
    """Of a large file; the hub knows a small one by its git blob id."""
    blob_id: str | None


def fetch_model(
    name: str,
    revision: str | None,
    cache: Path,
    offline: bool,
    say: Say = print,
    *,
    key: str = "model.pretrained",
    weights: bool = True,
) -> Fetched:
    """The files of `name` at `revision` (a branch, tag or commit; None: the newest), fetched where they are not here.

    A full commit that is here needs no network. key: the config key that names the model. weights: False for a
    tokenizer alone. UnsafeInputError where the hub has no safetensors weights of it, DataError where it cannot be had,
    StorageError where it cannot be kept.
    """
    what = f"{key} is {name}" + (f" at {revision}" if revision else "")
    store = cache / "hub" / f"{'model' if weights else 'tokenizer'}s--{name.replace('/', '--')}"
    commit = revision if revision and _COMMIT.fullmatch(revision) else None
    if offline and commit is None:
        commit = _known_commit(store, revision)
    found = _whole(store / commit, say) if commit is not None else None
    if found is not None:
        return found
    if offline:
        raise _missing_offline(what, store, commit)
    instead = f"set {key} to its folder"
    hub.check_reachable(what, instead)
    from huggingface_hub import HfApi

    try:
        api = HfApi(endpoint=hub.endpoint())
        listing = api.model_info(name, revision=revision, files_metadata=True, timeout=_ANSWER_S)
    except Exception as error:  # the library raises many kinds
        raise hub.refusal(what, error, store, instead) from error
    commit = str(listing.sha)
    remote = [_remote(sibling) for sibling in listing.siblings or []]
    wanted = _wanted(remote, weights, what, key)
    try:
        (store / "refs").mkdir(parents=True, exist_ok=True)
        return _fetch(name, store, commit, revision, wanted, say)
    except ToolkitError:
        raise
    except Exception as error:
        raise hub.refusal(what, error, store, instead) from error


def find_fetched(folder: Path) -> Fetched | None:
    """What was fetched into `folder`, by its record and the files' sizes; None where it is not whole."""
    try:
        record = read_json(folder / RECORD)
        sizes = {name: (folder / name).stat().st_size for name in record["files"]}
    except (StorageError, OSError, KeyError):
        return None
    if any(sizes[name] != described["bytes"] for name, described in record["files"].items()):
        return None
    return Fetched(folder, record["commit"], record["files"])


def _whole(folder: Path, say: Say) -> Fetched | None:
    """What was fetched into `folder`, if every hash is what it was; what is damaged is named."""
    found = find_fetched(folder)
    if found is None:
        return None
    damaged = [name for name, known in found.files.items() if _hashes(folder / name)[0] != known["sha256"]]
    for name in damaged:
        say(f"warning        {folder / name} is damaged: its content is not what was downloaded")
    return None if damaged else found


def _fetch(name: str, store: Path, commit: str, revision: str | None, wanted: list[_Remote], say: Say) -> Fetched:
    """Download what is not here into a folder beside, which takes its place when all of it is verified."""
    from filelock import FileLock

    folder, partial = store / commit, store / f".tmp-{commit}"
    with FileLock(store / ".lock"):
        found = _whole(folder, say)
        if found is None:
            partial.mkdir(exist_ok=True)
            _take_over(folder, partial, wanted)
            hashes = {file.name: _verify(partial / file.name, file) for file in wanted}
            missing = [file for file in wanted if hashes[file.name] is None]
            size = sum(file.size or 0 for file in missing)
            hub.check_room(partial, size, f"downloading {name}")
            began = time.monotonic()
            say(f"hub            fetching {name} at {commit[:12]}: {len(missing)} files, {size / 2**20:.1f} MiB")
            for file in missing:
                hashes[file.name] = _download(name, commit, file, partial)
            files = {
                file: {"bytes": (partial / file).stat().st_size, "sha256": digest} for file, digest in hashes.items()
            }
            shutil.rmtree(partial / ".cache", ignore_errors=True)  # the client's own notes
            write_json(partial / RECORD, {"name": name, "asked": revision, "commit": commit, "files": files})
            _put_in_place(partial, folder)
            found = Fetched(folder, commit, files)
            say(f"hub            fetched in {time.monotonic() - began:.1f} s: {folder}")
        else:
            say(f"hub            {name} at {commit[:12]} was fetched before: {folder}")
        write_atomic(store / "refs" / quote(revision or _BRANCH, safe=""), commit)
    return found


def _take_over(folder: Path, partial: Path, wanted: list[_Remote]) -> None:
    """Links to the files of a damaged folder that are still good."""
    for file in wanted:
        if not (partial / file.name).exists() and _verify(folder / file.name, file) is not None:
            try:
                os.link(folder / file.name, partial / file.name)
            except OSError:  # a file system without links
                shutil.copyfile(folder / file.name, partial / file.name)


def _download(name: str, commit: str, file: _Remote, partial: Path) -> str:
    """One file, verified; once more, past every cache, when it arrives damaged. Returns its sha256."""
    from huggingface_hub import hf_hub_download

    for force in (False, True):
        (partial / file.name).unlink(missing_ok=True)
        hf_hub_download(
            name, file.name, revision=commit, local_dir=partial, endpoint=hub.endpoint(), force_download=force
        )
        digest = _verify(partial / file.name, file)
        if digest is not None:
            return digest
    (partial / file.name).unlink()
    raise DataError(
        f"{file.name} of {name} at {commit} arrived damaged twice: it is not the file that the hub's own hash "
        "describes. Try again, or set HF_ENDPOINT to another mirror."
    )


def _put_in_place(partial: Path, folder: Path) -> None:
    for path in partial.iterdir():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
    old = folder.with_name(f".old-{folder.name}")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)  # a damaged one
    os.rename(partial, folder)
    fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _remote(sibling: Any) -> _Remote:
    large = sibling.lfs
    return _Remote(sibling.rfilename, sibling.size, large.sha256 if large else None, sibling.blob_id)


def _wanted(remote: list[_Remote], weights: bool, what: str, key: str) -> list[_Remote]:
    """The files that say what the model is, and its safetensors weights; never pickle, never code."""
    names = {file.name for file in remote}
    if not weights:
        chosen = _matching(names, _DESCRIBING)
    elif _WEIGHTS in names:
        chosen = {*_matching(names, _DESCRIBING), _WEIGHTS}
    elif _WEIGHTS_INDEX in names:
        chosen = _matching(names, (*_DESCRIBING, _WEIGHTS_INDEX, _WEIGHTS_SHARDS))
    else:
        raise _no_weights(what, key, names)
    return [file for file in remote if file.name in chosen]


def _matching(names: Iterable[str], patterns: Iterable[str]) -> set[str]:
    # Those at the top alone: below lie exports for other programs.
    return {name for name in names if "/" not in name and any(fnmatch.fnmatchcase(name, p) for p in patterns)}


def _no_weights(what: str, key: str, names: set[str]) -> ToolkitError:
    others = sorted(_matching(names, _OTHER_WEIGHTS))
    if not others:
        return DataError(f"{what}, but that holds no {_WEIGHTS}: it is no model of Transformers. Name another.")
    section = key.rpartition(".")[0]
    return UnsafeInputError(
        f"{what}, which holds no safetensors weights, only {', '.join(others)}; pickle weights can run code and are "
        f"not read.\nName a revision that has safetensors ({section}.revision; the hub's converter makes refs/pr/N), "
        f"or convert them once: load the model where you trust it, call save_pretrained(FOLDER), and set {key}=FOLDER."
    )


def _verify(path: Path, file: _Remote) -> str | None:
    """The file's sha256 if it is what the hub describes, else None."""
    if not path.is_file() or (file.size is not None and path.stat().st_size != file.size):
        return None
    sha256, blob_id = _hashes(path)
    if file.sha256 is not None:
        return sha256 if sha256 == file.sha256 else None
    return sha256 if file.blob_id in (None, blob_id) else None


def _hashes(path: Path) -> tuple[str, str]:
    """sha256 of the content, and git's id of it as a blob."""
    state = path.stat()
    return _read_hashes(path, state.st_size, state.st_mtime_ns, state.st_ino)


@functools.lru_cache(maxsize=256)  # a preparation looks at the same files several times
def _read_hashes(path: Path, size: int, modified: int, inode: int) -> tuple[str, str]:
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb") as stream:
        while block := stream.read(1 << 20):
            sha256.update(block)
            blob.update(block)
    return sha256.hexdigest(), blob.hexdigest()


def _known_commit(store: Path, revision: str | None) -> str | None:
    """What the branch or tag was when it was last fetched."""
    try:
        return (store / "refs" / quote(revision or _BRANCH, safe="")).read_text().strip()
    except OSError:
        return None


def _missing_offline(what: str, store: Path, commit: str | None) -> DataError:
    commits = sorted(path.name for path in store.glob("*") if find_fetched(path) is not None)
    where = store / (commit or "")
    state = "is damaged" if commit in commits else "is not there"
    known = f" Fetched before: {', '.join(commits)}." if commits else ""
    return DataError(
        f"{what}, but asking the hub is switched off (data.offline or HF_HUB_OFFLINE), and {where} {state}.{known}\n"
        "Run `dist-train prepare` with data.offline=false where there is network, with the same data.cache_dir."
    )
