"""Fine-tuning a pretrained encoder: its layers, adapters that are saved and merged, and what is refused."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from dist_train import config_io
from dist_train.activation_profile import measure
from dist_train.errors import ConfigError, UnmeasuredError
from dist_train.layers import prepare_layers
from dist_train.parameter_groups import describe_groups
from dist_train.prepared import prepare
from dist_train.recipe import load_recipe
from launcher.measure import measure_profile
from recipes.ticket_routing.pretrained import load_pretrained
from recipes.ticket_routing.task import TicketTask
from tests.front_door import write_tickets
from tests.ranks import run_ranks
from tests.recipe_steps import take_steps

LORA = ["model.lora_rank=4", "optim.layer_decay=null", "optim.lr=1e-3", "optim.head_lr=2e-3"]


@pytest.fixture(scope="module")
def settings(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("pretrained")
    table = write_tickets(folder / "tickets.csv", 300)
    return [
        f"model.pretrained={tiny_bert}",
        "model.dropout=0",
        f"data.path={table}",
        "data.label_column=queue",
        f"data.cache_dir={folder}/prepared",
        "track.wandb=disabled",
        "track.log_every_steps=1",
    ]


def _task(settings: Sequence[str], *extra: str) -> TicketTask:
    config: Any = config_io.load("ticket_routing/finetune", [*settings, *extra], site=False).config
    return TicketTask(config, prepare(config, load_recipe(config.recipe), lambda text: None))


def _batch(task: TicketTask, count: int = 8) -> dict[str, torch.Tensor]:
    batch = task.collate(task.rows("train").take(np.arange(count)), np.zeros(count, dtype=np.uint64))
    return {**batch, "weight": torch.ones(count)}


def _probability(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(batch)["probability"]


def _told(task: TicketTask) -> list[str]:
    model = task.build_model()
    layers = prepare_layers(model, task.is_head, task.config.optim)
    named = [(name, tuple(leaf.shape), leaf.requires_grad) for name, leaf in model.named_parameters()]
    return [line.removeprefix("optimizer      ") for line in describe_groups(named, layers, task.config.optim, 100)]


def test_the_layers_of_an_encoder_learn_at_rates_of_their_own(settings: list[str]) -> None:
    lines = _told(_task(settings))
    assert [line.partition(":")[0] for line in lines[::2]] == ["embeddings", "block 0", "block 1", "head"]
    rates = [line.partition("peak lr ")[2].partition(",")[0] for line in lines[::2]]
    assert rates == ["3.24e-05", "3.6e-05", "4e-05", "0.0004"]
    # The pooler, two tensors, stands above the last block and learns as it does.
    sizes = [int(line.partition(": ")[2].split()[0]) for line in lines]
    assert sizes[4] + sizes[5] == sizes[2] + sizes[3] + 2


def test_a_frozen_encoder_and_one_with_adapters_say_what_is_frozen(settings: list[str]) -> None:
    frozen = _told(_task(settings, "optim.freeze=backbone", "optim.layer_decay=null"))
    assert [line.partition(":")[0] for line in frozen] == ["head", "head", "embeddings, blocks 0 to 1"]
    lines = _told(_task(settings, *LORA))
    # A and B, of rank 4, for query and value in each of the blocks: PEFT's own choice for BERT.
    assert lines[0].startswith("blocks 0 to 1: 8 parameters of 1,024 elements, peak lr 0.001")
    assert lines[1].startswith("head: 1 parameter of 96 elements, peak lr 0.002, weight decay 0.01")
    assert lines[-1].startswith("embeddings, blocks 0 to 1, head: ")
    assert lines[-1].endswith("elements, frozen")


def test_adapters_are_saved_as_peft_reads_them_and_merged_as_transformers_does(
    settings: list[str], tiny_bert: Path, tmp_path: Path
) -> None:
    task = _task(settings, *LORA)
    torch.manual_seed(0)
    model, batch = task.build_model(), _batch(task)
    untrained = _probability(model, batch)
    trained = [leaf for leaf in model.parameters() if leaf.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    for _ in range(10):
        optimizer.zero_grad()
        model.train()(batch).backward()
        optimizer.step()
    expected = _probability(model, batch)
    assert float((expected - untrained).abs().max()) > 0.1
    task.save_model(model, tmp_path)
    assert torch.equal(_probability(model, batch), expected)  # saving changes nothing
    torch.testing.assert_close(_probability(task.load_model(tmp_path), batch), expected, rtol=1e-4, atol=1e-5)
    inputs = {"input_ids": batch["token_ids"], "attention_mask": batch["token_mask"].long()}
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=len(task.labels))
    with_adapter = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    for one in (merged, with_adapter):
        with torch.no_grad():
            seen = one.eval()(**inputs).logits.softmax(-1)
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    assert {path.name for path in (tmp_path / "adapter").glob("adapter*")} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert list(merged.config.id2label.values()) == task.labels


def test_adapters_go_where_they_are_asked_for(settings: list[str]) -> None:
    for targets, modules in (("[query]", {"query"}), ("[all-linear]", {"query", "key", "value", "dense"})):
        model = _task(settings, *LORA, f"model.lora_targets={targets}", "model.lora_alpha=4").build_model()
        adapted = {name for name, _ in model.named_parameters() if ".lora_A." in name}
        assert {name.split(".")[-4] for name in adapted} == modules
        assert not any("classifier" in name for name in adapted)
    with pytest.raises(ConfigError, match=r"model.lora_targets is \['qeury'\], which PEFT refuses"):
        _task(settings, *LORA, "model.lora_targets=[qeury]").build_model()


def test_without_peft_the_extra_is_named(settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r'model.lora_rank is 4, .* pip install "dist-train\[lora\]"'):
        _task(settings, *LORA).build_model()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.lora_rank=4"], "model.lora_rank is 4, but model.pretrained is null"),
        (["model.pretrained=some/encoder", "model.lora_alpha=8"], "model.lora_alpha is 8, but model.lora_rank is null"),
        (
            ["model.pretrained=a/b", "model.lora_rank=4", "optim.freeze=backbone"],
            "where the adapters lie: set optim",
        ),
    ],
)
def test_adapter_settings_that_have_no_effect_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_io.load("ticket_routing", settings, site=False)


@pytest.mark.parametrize("extra", [["optim.freeze=1"], LORA], ids=["frozen", "adapters"])
def test_a_tuned_encoder_is_measured_for_the_plan(settings: list[str], extra: list[str]) -> None:
    task = _task(settings, *extra)
    profile = measure(task, "fp32", False, (4, 20), task.config.optim)
    assert 0 < profile.trainable < profile.numel
    finished = {index for index in profile.cached.gradients if index >= 0}
    assert finished == {index for index, parameter in enumerate(profile.parameters) if parameter.trainable}


def test_what_the_model_refuses_is_said_by_the_plan_in_its_own_words(settings: list[str], tmp_path: Path) -> None:
    task = _task(settings, "optim.freeze=7")
    with pytest.raises(UnmeasuredError, match=r"could not be measured: optim.freeze is 7, but this model has 2 blocks"):
        measure_profile(task.config, task.prepared, tmp_path / "profile.json", "fp32")


# What is tuned, by the keys that differ from finetune.yaml.
WAYS = {
    "adapters": LORA,
    "layer decay": ["optim.lr=1e-3"],
    "frozen backbone": ["optim.freeze=backbone", "optim.layer_decay=null", "optim.head_lr=1e-2"],
}
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
OFTEN = (("adapters", "zero3"), ("adapters", "fsdp"))
CASES = [*OFTEN, *((way, name) for way in WAYS for name in STRATEGIES if (way, name) not in OFTEN)]


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("way", "strategy"), [pytest.param(*case, marks=() if case in OFTEN else pytest.mark.matrix) for case in CASES]
)
def test_an_encoder_is_tuned_alike_under_every_strategy(settings: list[str], way: str, strategy: str) -> None:
    words = (*settings, *WAYS[way], "train.epochs=null", "train.steps=8")
    expected, weights = _alone(words)
    losses, _ = run_ranks(2, take_steps, "ticket_routing/finetune", words, strategy, 2)[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] < losses[0]
    trained = any(".lora_B." in name and bool(tensor.any()) for name, tensor in weights.items())
    assert trained == (way == "adapters")


@functools.cache
def _alone(words: tuple[str, ...]) -> tuple[list[float], dict[str, torch.Tensor]]:
    return run_ranks(1, take_steps, "ticket_routing/finetune", words, "single", 1)[0]


def test_a_head_of_as_many_other_labels_is_made_anew(tiny_bert: Path, tmp_path: Path) -> None:
    names = ["network", "hardware", "access"]
    saved = load_pretrained(str(tiny_bert), names, None)
    saved.save_pretrained(tmp_path)
    same = load_pretrained(str(tmp_path), names, None)
    assert torch.equal(same.classifier.weight, saved.classifier.weight)
    other = load_pretrained(str(tmp_path), ["billing", "sales", "support"], None)
    assert not torch.equal(other.classifier.weight, saved.classifier.weight)
    assert torch.equal(other.bert.embeddings.word_embeddings.weight, saved.bert.embeddings.word_embeddings.weight)
