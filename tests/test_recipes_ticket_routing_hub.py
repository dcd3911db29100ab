"""A pretrained encoder from the hub: fetched in the preparation, pinned in the run's config, asked for by no rank."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from dist_train import config_io
from dist_train.datasets_source import open_dataset
from dist_train.errors import DataError, UnsafeInputError
from dist_train.prepared import load_facts
from dist_train.prepared import prepare as prepare_recipe
from dist_train.recipe import load_recipe
from recipes.ticket_routing import hub as recipe_hub
from recipes.ticket_routing.config import Config
from recipes.ticket_routing.task import TicketTask
from tests.front_door import dist_train, lines, losses
from tests.hub_server import Hub, serving

NAME = "own/bert"
DATA = ["data.path=synthetic", "data.rows=300", "data.vocab_size=400", "data.max_tokens=64"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository's folder: a small BERT with a tokenizer of the generated tickets."""
    folder = tmp_path_factory.mktemp("bert")
    settings = [*DATA, f"data.cache_dir={folder}/prepared", "model.width=32", "model.heads=2"]
    config: Any = config_io.load("ticket_routing", settings, site=False).config
    prepared = prepare(config)
    model = folder / "model"
    shutil.copytree(prepared / "tokenizer", model)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    described = transformers.BertConfig(vocab_size=load_facts(prepared)["vocabulary"], **shape)
    transformers.BertModel(described).save_pretrained(model)
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    return model


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serving() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        yield served


def prepare(config: Any) -> Path:
    return prepare_recipe(config, load_recipe("ticket_routing"), lambda text: None)


def _config(cache: Path, *settings: str) -> Config:
    loaded: Any = config_io.load("ticket_routing", [*DATA, f"data.cache_dir={cache}", *settings], site=False).config
    return loaded


def _newer(bert: Path, folder: Path) -> Path:
    """The same model with other weights."""
    shutil.copytree(bert, folder)
    torch.manual_seed(1)
    described = transformers.BertConfig.from_pretrained(bert)
    transformers.BertModel(described).save_pretrained(folder)
    return folder


def _embeddings(task: TicketTask) -> torch.Tensor:
    return task.build_model().state_dict()["encoder.model.bert.embeddings.word_embeddings.weight"]


def test_an_encoder_is_fetched_in_the_preparation_and_no_rank_asks_the_hub(
    hub: Hub, bert: Path, tmp_path: Path
) -> None:
    commit = hub.put(NAME, bert)
    config = _config(tmp_path, f"model.pretrained={NAME}")
    prepared = prepare(config)
    facts = load_facts(prepared)
    assert facts["pretrained"]["name"] == NAME
    assert facts["pretrained"]["revision"] == commit
    assert set(facts["pretrained"]["files"]) >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert "pytorch_model.bin" not in hub.downloads
    hub.requests.clear()
    task = TicketTask(config, prepared)
    original = transformers.AutoModel.from_pretrained(bert).state_dict()["embeddings.word_embeddings.weight"]
    assert torch.equal(_embeddings(task), original)
    task.save_model(task.build_model(), tmp_path)
    assert json.loads((tmp_path / "source.json").read_text()) == {"pretrained": NAME, "revision": commit}
    assert hub.requests == []
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(DataError, match=r"which is gone: `dist-train prepare`"):
        task.build_model()


def test_another_commit_is_other_data_and_the_cache_folder_may_move(hub: Hub, bert: Path, tmp_path: Path) -> None:
    first = hub.put(NAME, bert)
    config = _config(tmp_path / "cache", f"model.pretrained={NAME}")
    prepared = prepare(config)
    before = _embeddings(TicketTask(config, prepared))
    hub.put(NAME, _newer(bert, tmp_path / "newer"))
    newer = prepare(config)
    assert load_facts(newer)["fingerprint"] != load_facts(prepared)["fingerprint"]
    assert not torch.equal(_embeddings(TicketTask(config, newer)), before)
    pinned = _config(tmp_path / "cache", f"model.pretrained={NAME}", f"model.revision={first}")
    assert prepare(pinned) == prepared
    shutil.move(tmp_path / "cache", tmp_path / "moved")
    hub.requests.clear()
    moved = _config(tmp_path / "moved", f"model.pretrained={NAME}", f"model.revision={first}")
    again = prepare(moved)
    assert again == tmp_path / "moved" / prepared.name
    assert torch.equal(_embeddings(TicketTask(moved, again)), before)
    assert hub.requests == []


def test_a_tokenizer_of_its_own_is_fetched_without_weights(hub: Hub, bert: Path, tmp_path: Path) -> None:
    commit = hub.put("own/words", bert)
    config = _config(tmp_path, "data.tokenizer=own/words", "model.width=32", "model.heads=2")
    prepared = prepare(config)
    assert "model.safetensors" not in hub.downloads
    assert recipe_hub.pins(config, lambda text: None) == {"data.tokenizer_revision": commit}
    theirs, ours = (json.loads((f / "tokenizer.json").read_text())["model"] for f in (bert, prepared / "tokenizer"))
    assert theirs == ours
    assert "pretrained" not in load_facts(prepared)


def test_a_folder_of_pickle_is_refused_before_any_rank(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(UnsafeInputError, match="pickle weights can run code"):
        prepare(_config(tmp_path, f"model.pretrained={tmp_path}/pickled"))
    with pytest.raises(DataError, match="there is no such folder"):
        prepare(_config(tmp_path, f"model.pretrained={tmp_path}/nowhere"))


def test_a_hub_data_set_is_refused_within_seconds_where_the_hub_is_out_of_reach(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
    began = time.monotonic()
    with pytest.raises(DataError, match=r"data.path is hub:own/tickets.*cannot reach .*connection refused"):
        open_dataset("hub:own/tickets", None)
    assert time.monotonic() - began < 5


@pytest.mark.front_door
def test_what_is_prepared_trains_offline_pinned_and_repeats_without_network(
    hub: Hub, bert: Path, tmp_path: Path
) -> None:
    commit = hub.put(NAME, bert)
    settings = [*DATA, f"model.pretrained={NAME}", "data.cache_dir=cache", "train.steps=2", "train.epochs=null"]
    settings += ["eval.bootstrap_samples=100", "track.log_every_steps=1", "model.dropout=0"]
    home = {"HF_HOME": str(tmp_path / "hf")}
    missing = dist_train(["run", "ticket_routing", *settings, "name=none", "data.offline=true"], tmp_path, **home)
    assert missing.returncode == DataError.exit_code
    assert f"model.pretrained is {NAME}" in missing.stderr
    assert "switched off" in missing.stderr
    assert hub.requests == []
    prepared = dist_train(["prepare", "ticket_routing", *settings], tmp_path, **home)
    assert prepared.returncode == 0, prepared.stdout + prepared.stderr
    asked = [line for line in hub.requests if "/api/models/" in line]
    assert asked == [f"GET /api/models/{NAME}"], "what the newest is is asked once"
    hub.requests.clear()
    offline = ["data.offline=true", "data.stage_to=node", "name=first"]
    done = dist_train(["run", "ticket_routing", *settings, *offline], tmp_path, **home)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prepared before" in done.stdout
    assert hub.requests == []
    text = (tmp_path / "runs" / "first" / "config.yaml").read_text()
    assert yaml.safe_load(text)["model"]["revision"] == commit
    assert f"revision: {commit}  # the hub's newest" in text
    assert list((tmp_path / "node" / "hub").rglob("model.safetensors"))
    hub.put(NAME, _newer(bert, tmp_path / "newer"))
    hub.requests.clear()
    again = ["run", "runs/first/config.yaml", "name=again", "data.stage_to=null", "data.offline=false"]
    done = dist_train(again, tmp_path, HF_ENDPOINT="http://127.0.0.1:9", **home)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = tmp_path / "runs" / "first", tmp_path / "runs" / "again"
    assert losses(second) == losses(first)
    facts = [json.loads((run / "data.json").read_text())["pretrained"] for run in (first, second)]
    assert facts[0] == facts[1]
    assert facts[0]["revision"] == commit
    assert any(line["event"] == "staged" for line in lines(first / "events.jsonl"))
    assert hub.requests == []
