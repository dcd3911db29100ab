"""The real command fine-tunes with adapters, and says what is trained at which rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.front_door import dist_train, write_tickets

pytestmark = pytest.mark.front_door


def test_adapters_are_trained_on_two_ranks_to_a_report_and_a_model_without_them(
    tiny_bert: Path, tmp_path: Path
) -> None:
    write_tickets(tmp_path / "tickets.csv", 300)
    settings = ["data.path=tickets.csv", "data.label_column=queue", "data.cache_dir=prepared"]
    settings += [f"model.pretrained={tiny_bert}", "model.lora_rank=4", "optim.lr=3e-2", "optim.head_lr=2e-2"]
    settings += ["train.epochs=6", "eval.bootstrap_samples=100", "parallel.processes_per_node=2"]
    done = dist_train(["run", "ticket_routing/finetune", "name=tuned", *settings], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith("optimizer      ")]
    assert [line.split()[1] for line in told] == ["block", "block", "head:", "head:", "embeddings,"]
    assert told[0].endswith(
        "block 0: 4 parameters of 512 elements, peak lr 0.027, weight decay 0.01, learns from step 1"
    )
    assert told[-1].endswith("frozen")
    run = tmp_path / "runs" / "tuned"
    assert json.loads((run / "best" / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    assert (run / "best" / "adapter" / "adapter_model.safetensors").is_file()
    assert not list((run / "best").rglob("*.bin"))
    assert (run / "report.html").is_file()
    answered = dist_train(["predict", "runs/tuned", "tickets.csv", "--output", "answers.csv"], tmp_path)
    assert answered.returncode == 0, answered.stdout + answered.stderr
    assert len((tmp_path / "answers.csv").read_text().splitlines()) == 301
    record = json.loads((run / "memory.json").read_text())
    assert abs(record["error"]) < 0.15
