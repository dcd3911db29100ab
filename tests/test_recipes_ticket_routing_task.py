"""The ticket models: padding changes nothing, eight tickets are learnt by heart, and the model folder is whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from dist_train import config_io
from dist_train.errors import ConfigError, DataError, UnsafeInputError
from dist_train.events import read_lines
from dist_train.hardware import Hardware
from dist_train.heartbeat import Heartbeat
from dist_train.loop import train
from dist_train.plan import make_plan
from dist_train.prepared import prepare
from dist_train.recipe import list_recipes, load_recipe
from dist_train.resume import build_training
from dist_train.rundir import RunDir
from dist_train.stop import StopFlag
from recipes.ticket_routing.encoder import TransformerEncoder
from recipes.ticket_routing.model import TicketClassifier
from recipes.ticket_routing.task import TicketTask
from tests.encoders import make_encoder
from tests.front_door import write_tickets
from tests.ranks import run_ranks

LARGE = ("ticket_routing/large", "ticket_routing/xl")
SMALL = ["data.path=synthetic", "data.rows=400", "data.vocab_size=600", "model.width=32", "model.heads=2"]
SMALL += ["model.feedforward=64", "model.dropout=0", "task.label_smoothing=0"]
# Losses of the first steps of ticket_routing/demo on one CPU rank; a change that "does not change results" keeps them.
GOLDEN = [2.039615608751774, 2.417993016541004, 2.195087641477585]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared tickets, and a small BERT with the very tokenizer of these tickets."""
    folder = tmp_path_factory.mktemp("tickets")
    make_encoder(folder / "bert", _task(folder, "transformer").prepared / "tokenizer")
    return folder


def _task(folder: Path, kind: str, *extra: str) -> TicketTask:
    settings = [*SMALL, f"data.cache_dir={folder}/prepared", f"model.kind={kind}", *extra]
    if kind == "pretrained":
        settings.insert(0, f"model.pretrained={folder}/bert")
    config: Any = config_io.load("ticket_routing", settings, site=False).config
    return TicketTask(config, prepare(config, load_recipe(config.recipe), lambda text: None))


def _batch(task: TicketTask, indices: list[int]) -> dict[str, torch.Tensor]:
    batch = task.collate(task.rows("train").take(np.array(indices)), np.zeros(len(indices), dtype=np.uint64))
    return {**batch, "weight": torch.ones(len(indices))}


def _probability(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch)["probability"]


KINDS = pytest.mark.parametrize("kind", ["transformer", "lstm", "pretrained"])


@KINDS
def test_padding_changes_no_probability(desk: Path, kind: str) -> None:
    task = _task(desk, kind)
    torch.manual_seed(0)
    model = task.build_model()
    lengths = task.rows("train").lengths
    order = [int(lengths.argmin()), int(lengths.argmax())]
    assert lengths[order[0]] < lengths[order[1]]
    together, alone = _probability(model, _batch(task, order)), _probability(model, _batch(task, order[:1]))
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-7)


@KINDS
def test_eight_tickets_are_learnt_by_heart(desk: Path, kind: str) -> None:
    task = _task(desk, kind)
    torch.manual_seed(0)
    model = task.build_model()
    batch = _batch(task, list(range(8)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model.train()(batch).backward()
        optimizer.step()
    assert _probability(model, batch).argmax(1).tolist() == batch["label"].tolist()


@KINDS
def test_the_model_folder_alone_gives_the_same_predictions(desk: Path, tmp_path: Path, kind: str) -> None:
    task = _task(desk, kind)
    model = task.build_model()
    task.save_model(model, tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    assert [described["id2label"][str(index)] for index in range(len(task.labels))] == task.labels
    batch = _batch(task, [0, 1, 2])
    assert torch.equal(_probability(task.load_model(tmp_path), batch), _probability(model, batch))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path) if kind == "pretrained" else None
    tokenizer = tokenizer or transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "The printer on floor 3 does not answer"
    assert tokenizer(text)["input_ids"] == tokenizer.encode(text)
    assert not list(tmp_path.glob("*.bin")) + list(tmp_path.glob("*.pt"))


def test_a_pretrained_encoder_comes_in_with_its_weights_and_leaves_as_a_transformers_model(
    desk: Path, tmp_path: Path
) -> None:
    task = _task(desk, "pretrained")
    model = task.build_model()
    original = transformers.AutoModel.from_pretrained(desk / "bert").state_dict()
    mine = model.state_dict()
    name = "embeddings.word_embeddings.weight"
    assert torch.equal(mine[f"encoder.model.bert.{name}"], original[name])
    task.save_model(model, tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert list(loaded.config.id2label.values()) == task.labels


def test_a_pretrained_encoder_of_half_precision_is_trained_in_full(desk: Path) -> None:
    half = desk / "half"
    shutil.copytree(desk / "bert", half)
    transformers.BertModel.from_pretrained(desk / "bert").half().save_pretrained(half)
    model = _task(desk, "pretrained", f"model.pretrained={half}").build_model()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_classifier_of_other_labels_gets_a_head_for_ours_and_what_is_no_model_is_named(desk: Path) -> None:
    other = desk / "other"
    shutil.copytree(desk / "bert", other)
    config = transformers.BertConfig.from_pretrained(desk / "bert", num_labels=33)
    transformers.BertForSequenceClassification(config).save_pretrained(other)
    task = _task(desk, "pretrained", f"model.pretrained={other}")
    batch = _batch(task, [0, 1])
    assert _probability(task.build_model(), batch).shape == (2, len(task.labels))
    own = desk / "own"
    own.mkdir()
    plain = _task(desk, "transformer")
    plain.save_model(plain.build_model(), own)
    with pytest.raises(DataError, match="own, which could not be loaded"):
        _task(desk, "pretrained", f"model.pretrained={own}").build_model()


def test_pickled_weights_are_refused(desk: Path) -> None:
    folder = desk / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text((desk / "bert" / "config.json").read_text())
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    (folder / "tokenizer.json").write_bytes((desk / "bert" / "tokenizer.json").read_bytes())
    task = _task(desk, "transformer")
    model = task.config.model.model_copy(update={"kind": "pretrained", "pretrained": str(folder)})
    with pytest.raises(UnsafeInputError, match="pickle weights can run code") as refusal:
        TicketTask(task.config.model_copy(update={"model": model}), task.prepared).build_model()
    assert refusal.value.exit_code == 4


def test_more_tokens_than_the_pretrained_encoder_has_positions_are_refused(desk: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.max_tokens is 300, but .*bert has 192 positions"):
        _task(desk, "pretrained", "data.max_tokens=300").build_model()


def test_class_weights_make_every_queue_count_alike(desk: Path) -> None:
    rows = _task(desk, "transformer", "task.class_weights=balanced").rows("train")
    sums = [rows.weights[rows.labels == label].sum() for label in np.unique(rows.labels)]
    np.testing.assert_allclose(sums, sums[0])


def test_the_weights_are_a_function_of_the_seed(desk: Path) -> None:
    task = _task(desk, "transformer")
    models = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        models.append(task.build_model().state_dict()["encoder.head.weight"])
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])


@pytest.mark.parametrize("recipe", [each.name for each in list_recipes() if each.name.startswith("ticket_routing")])
def test_every_shipped_recipe_file_takes_steps(desk: Path, tmp_path: Path, recipe: str) -> None:
    settings = ["data.rows=300", "train.epochs=null", "train.steps=3", "track.log_every_steps=1"]
    settings += [f"data.cache_dir={desk}/prepared", "track.wandb=disabled", "model.dropout=0"]
    if recipe in LARGE:
        # Two cores cannot train these; what is theirs alone is shrunk, all else stays.
        settings += ["model.layers=1", "model.width=32", "model.heads=2", "model.feedforward=64"]
    if recipe.endswith("finetune"):
        settings += [f"model.pretrained={desk}/bert"]
    if not recipe.endswith("demo"):
        settings += [f"data.path={write_tickets(desk / 'tickets.csv')}", "data.label_column=queue"]
    run_ranks(1, _take_steps, recipe, settings, tmp_path)
    losses = [line["loss"] for line in read_lines(RunDir(tmp_path).metrics) if line["split"] == "train"]
    assert np.isfinite(losses).all()
    if recipe == "ticket_routing/demo":
        np.testing.assert_allclose(losses, GOLDEN, rtol=1e-6)


@pytest.mark.parametrize(("recipe", "billions"), [("ticket_routing/large", 0.355), ("ticket_routing/xl", 1.31)])
def test_the_large_variants_have_the_parameters_that_they_state(recipe: str, billions: float) -> None:
    config = config_io.load(recipe, [], site=False).config
    with torch.device("meta"):
        encoder = TransformerEncoder(config.model, 2000, config.data.max_tokens, 8)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == pytest.approx(billions * 1e9, rel=0.01)


def _take_steps(name: str, settings: list[str], path: Path) -> None:
    config = config_io.load(name, settings, site=False).config
    recipe = load_recipe(config.recipe)
    prepared = prepare(config, recipe, lambda text: None)
    task = recipe.make_task(config, prepared)
    run = RunDir(path)
    run.logs.mkdir(parents=True)
    rows = len(task.rows("train").ids)
    plan = make_plan(config, Hardware("host", "cpu", 2, 8.0), rows, 1)
    training = build_training(run, config, plan, task, 1, recipe.score, {}, StopFlag(), Heartbeat(run, 0))
    assert isinstance(training.engine.module, TicketClassifier)
    train(training)
