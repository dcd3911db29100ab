"""Files from a hub on this machine, with the hub's real client: fetched once, verified, refused in clear words."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_train import fetch
from dist_train import hub as hub_module
from dist_train.errors import DataError, StorageError, UnsafeInputError
from dist_train.fetch import Fetched, fetch_model
from tests.front_door import mounted
from tests.hub_server import Hub, serving

MOST_SECONDS = 10
NAME = "own/encoder"
KEPT = {"config.json", "tokenizer.json", "vocab.txt", "model.safetensors"}
SECRET = "hf_abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        yield served


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model's folder with all that a repository may hold beside."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "vocab.txt", "README.md", "modeling.py", "pytorch_model.bin"):
        (folder / name).write_text(f"{name} of the first version")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8000)
    return folder


def _fetch(cache: Path, revision: str | None = None, offline: bool = False) -> Fetched:
    return fetch_model(NAME, revision, cache, offline, lambda text: None)


def test_a_model_is_fetched_once_and_a_pinned_commit_needs_no_network(hub: Hub, model: Path, tmp_path: Path) -> None:
    commit = hub.put(NAME, model)
    fetched = _fetch(tmp_path / "cache")
    assert fetched.revision == commit
    assert set(hub.downloads) == set(fetched.files) == KEPT, "code and pickle stay where they are"
    assert {path.name for path in fetched.folder.iterdir()} == KEPT | {"fetched.json"}
    assert (fetched.folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    record = json.loads((fetched.folder / "fetched.json").read_text())
    assert (record["name"], record["commit"], record["files"]) == (NAME, commit, fetched.files)
    hub.requests.clear()
    assert _fetch(tmp_path / "cache") == fetched
    assert hub.requests == [f"GET /api/models/{NAME}"], "only what the newest is was asked"
    hub.requests.clear()
    assert _fetch(tmp_path / "cache", commit) == fetched
    assert hub.requests == []


def test_a_flipped_bit_is_noticed_and_that_file_alone_is_fetched_again(hub: Hub, model: Path, tmp_path: Path) -> None:
    commit = hub.put(NAME, model)
    fetched = _fetch(tmp_path / "cache")
    weights = fetched.folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    with pytest.raises(DataError, match=f"{commit} is damaged"):
        _fetch(tmp_path / "cache", offline=True)
    hub.requests.clear()
    said: list[str] = []
    assert fetch_model(NAME, commit, tmp_path / "cache", False, said.append) == fetched
    assert weights.read_bytes() == content
    assert hub.downloads == ["model.safetensors"]
    assert any("model.safetensors is damaged" in line for line in said)


def test_another_revision_is_another_folder(hub: Hub, model: Path, tmp_path: Path) -> None:
    first = hub.put(NAME, model)
    before = _fetch(tmp_path / "cache")
    newer = tmp_path / "newer"
    newer.mkdir()
    for path in model.iterdir():
        (newer / path.name).write_bytes(path.read_bytes())
    (newer / "model.safetensors").write_bytes(b"other weights")
    second = hub.put(NAME, newer)
    hub.put(NAME, model, "refs/pr/1")
    after = _fetch(tmp_path / "cache")
    assert (before.revision, after.revision) == (first, second)
    assert (after.folder / "model.safetensors").read_bytes() == b"other weights"
    assert _fetch(tmp_path / "cache", "refs/pr/1") == before
    assert _fetch(tmp_path / "cache", offline=True) == after, "the newest that was seen"
    assert _fetch(tmp_path / "cache", "refs/pr/1", offline=True) == before


def test_what_is_no_safe_model_is_refused(hub: Hub, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    hub.put(NAME, model)
    with pytest.raises(UnsafeInputError, match=r"only pytorch_model.bin; pickle weights can run code") as refusal:
        _fetch(tmp_path / "cache")
    assert refusal.value.exit_code == 4
    (model / "pytorch_model.bin").unlink()
    hub.put(NAME, model)
    with pytest.raises(DataError, match="no model of Transformers"):
        _fetch(tmp_path / "cache")
    tokenizer = fetch_model(NAME, None, tmp_path / "cache", False, str, key="data.tokenizer", weights=False)
    assert set(tokenizer.files) == KEPT - {"model.safetensors"}


def test_shards_come_with_their_index(hub: Hub, model: Path, tmp_path: Path) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    os.rename(model / "model.safetensors", model / shards[0])
    (model / shards[1]).write_bytes(b"second")
    (model / "model.safetensors.index.json").write_text("{}")
    (model / "pytorch_model.bin.index.json").write_text("{}")
    hub.put(NAME, model)
    weights = {*shards, "model.safetensors.index.json"}
    assert set(_fetch(tmp_path / "cache").files) == KEPT - {"model.safetensors"} | weights


def test_offline_names_what_is_missing_and_asks_nothing(hub: Hub, model: Path, tmp_path: Path) -> None:
    commit = hub.put(NAME, model)
    for revision in (None, commit):
        with pytest.raises(DataError, match=r"switched off \(data.offline or HF_HUB_OFFLINE\)") as missing:
            _fetch(tmp_path / "cache", revision, offline=True)
        assert NAME in str(missing.value)
        assert str(tmp_path / "cache") in str(missing.value)
    assert hub.requests == []
    _fetch(tmp_path / "cache")
    with pytest.raises(DataError, match=f"Fetched before: {commit}"):
        _fetch(tmp_path / "cache", "v2", offline=True)


def test_without_network_a_clear_message_comes_within_seconds(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
        closed.close()
        addresses = {
            f"http://me:{SECRET}@127.0.0.1:{port}": "connection refused",
            "https://hub.invalid": "",  # the resolver's own words
            f"http://127.0.0.1:{silent.getsockname()[1]}": "timed out",
        }
        assert fetch._ANSWER_S < MOST_SECONDS
        monkeypatch.setattr(fetch, "_ANSWER_S", 0.5)  # of the silent one
        for address, cause in addresses.items():
            monkeypatch.setenv("HF_ENDPOINT", address)
            began = time.monotonic()
            with pytest.raises(DataError, match=f"model.pretrained is {NAME}.*cannot reach.*{cause}") as error:
                _fetch(tmp_path / "cache")
            assert time.monotonic() - began < MOST_SECONDS, address
            for word in ("dist-train prepare", "set model.pretrained to its folder", "HF_ENDPOINT"):
                assert word in str(error.value)
            assert SECRET not in str(error.value)


def test_a_name_that_blocks_the_resolver_blocks_nobody(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_module, "CONNECT_S", 0.2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: time.sleep(30) or [])
    began = time.monotonic()
    with pytest.raises(DataError, match="no answer within"):
        hub_module.check_reachable("x is y", "")
    assert time.monotonic() - began < 5


def test_behind_a_proxy_the_proxy_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.site:3128")
    monkeypatch.setenv("no_proxy", "mirror.site")
    assert hub_module._first_hop("https://huggingface.co") == ("proxy.site", 3128)
    assert hub_module._first_hop("https://mirror.site/hub") == ("mirror.site", 443)


def test_a_connection_that_breaks_goes_on_where_it_broke(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.put(NAME, model)
    hub.cut_after = 100_000
    fetched = _fetch(tmp_path / "cache")
    assert hub.downloads.count("model.safetensors") == 2
    assert (fetched.folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_a_file_that_arrives_damaged_is_no_file_and_the_next_call_fetches_the_rest(
    hub: Hub, model: Path, tmp_path: Path
) -> None:
    commit = hub.put(NAME, model)
    hub.spoiled = "tokenizer.json"
    with pytest.raises(DataError, match=r"tokenizer.json of own/encoder .* arrived damaged twice"):
        _fetch(tmp_path / "cache")
    assert not (tmp_path / "cache" / "hub" / "models--own--encoder" / commit).exists()
    hub.spoiled = None
    there = set(hub.downloads) - {"tokenizer.json"}
    assert there
    hub.requests.clear()
    assert set(_fetch(tmp_path / "cache").files) == KEPT
    assert set(hub.downloads) == KEPT - there


def test_a_download_that_was_killed_goes_on_with_the_files_that_lack(hub: Hub, model: Path, tmp_path: Path) -> None:
    commit = hub.put(NAME, model)
    hub.stalling.set()
    code = "from pathlib import Path; from dist_train.fetch import fetch_model\n"
    code += f"fetch_model({NAME!r}, None, Path({str(tmp_path / 'cache')!r}), False)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
    assert hub.half_sent.wait(30)
    process.kill()
    process.wait()
    hub.stalling.clear()
    store = tmp_path / "cache" / "hub" / "models--own--encoder"
    assert not (store / commit).exists()
    there = {path.name for path in (store / f".tmp-{commit}").iterdir()} & KEPT
    assert there
    hub.requests.clear()
    fetched = _fetch(tmp_path / "cache")
    assert set(hub.downloads) == KEPT - there
    assert {path.name for path in fetched.folder.iterdir()} == KEPT | {"fetched.json"}
    assert (fetched.folder / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_two_at_once_download_once(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.put(NAME, model)
    found: list[Fetched] = []
    threads = [threading.Thread(target=lambda: found.append(_fetch(tmp_path / "cache"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] == found[1]
    assert sorted(hub.downloads) == sorted(KEPT)


def test_a_refusal_of_the_hub_says_what_to_do_and_no_token_is_written(
    hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(DataError, match="has no such name: check the spelling") as unknown:
        _fetch(tmp_path / "cache")
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/elsewhere")
    with pytest.raises(DataError, match="answered HTTP 404: if that is no hub, set HF_ENDPOINT"):
        _fetch(tmp_path / "cache")
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    hub.put(NAME, model)
    with pytest.raises(DataError, match="is own/encoder at v9, but the hub has no such revision"):
        _fetch(tmp_path / "cache", "v9")
    hub.gated = True
    with pytest.raises(DataError, match="accept its conditions") as gated:
        _fetch(tmp_path / "cache")
    hub.gated = False
    _fetch(tmp_path / "cache")
    written = b"".join(path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())
    assert SECRET.encode() not in written
    output = capfd.readouterr()
    assert SECRET not in str(unknown.value) + str(gated.value) + output.out + output.err


def test_too_little_room_is_said_before_the_download(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.put(NAME, model)
    with mounted(tmp_path / "small", "size=1m") as cache:
        with pytest.raises(StorageError, match=r"free, but downloading own/encoder needs .* data.cache_dir"):
            _fetch(cache)
        assert hub.downloads == []
