"""Bad input through the real command: its exit code, one clear block, no traceback, no rank, within seconds."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from tests.front_door import assert_refused, dist_train, mounted, write_tickets

pytestmark = pytest.mark.front_door
GOOD = ["data.path=good.csv", "data.label_column=queue", "train.steps=5"]
ROWS = "text,queue\n" + "the screen is black today,hardware\nno network in my room,network\n" * 20


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    write_tickets(folder / "good.csv", 100)
    files = {
        "empty.csv": "",
        "header.csv": "text,queue\n",
        "blank.csv": "text,queue\n" + " ,hardware\n\t,network\n" * 10,
        "alone.csv": ROWS + "a single ticket,legal\n",
        "one_class.csv": ROWS.replace(",network", ",hardware"),
        "mine.yaml": "extends: ticket_routing\ntrain:\n  global_batch_size: sixty\noptim:\n  learning_rate: 1e-3\n",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    good = (folder / "good.csv").read_text()
    (folder / "test.csv").write_text(good + "what does the law say,legal\nis this legal at all,legal\n")
    broken = b'text,queue\n"two\nlines",network\n' + b"caf\xe9 is closed,hardware\n"
    (folder / "latin.csv").write_bytes(broken)
    (folder / "utf16.csv").write_text(ROWS, encoding="utf-16")
    (folder / "latin.csv.gz").write_bytes(gzip.compress(broken))
    (folder / "a_file").write_text("kept")
    (folder / "pickled").mkdir()
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "runs" / "taken").mkdir(parents=True)
    (folder / "runs" / "taken" / "config.yaml").write_text("kept")
    return folder


CASES = [
    # arguments, exit code, what the message must hold
    (["ticket_routing", *GOOD, "train.global_batch=64"], 2, ["train.global_batch ", "train.global_batch_size"]),
    (["ticket_routing", *GOOD, "optim.warm_up=0.1"], 2, ["optim.warm_up ", "optim.warmup_share"]),
    (["ticket_ruting", *GOOD], 2, ["ticket_ruting", "ticket_routing"]),
    (["ticket_routing", *GOOD, "train.steps=many"], 2, ["train.steps", "many", "whole number"]),
    (["mine.yaml", *GOOD], 2, ["mine.yaml:3", "train.global_batch_size", "sixty", "mine.yaml:5", "optim.lr"]),
    (
        ["ticket_routing", *GOOD, "train.global_batch_size=3", "parallel.processes_per_node=4"],
        2,
        ["train.global_batch_size is 3", "4 ranks"],
    ),
    (["ticket_routing", *GOOD, "eval.metric=f1"], 2, ["eval.metric is f1", "macro_f1"]),
    (["ticket_routing", *GOOD, "train.precision=fp16"], 2, ["fp16", "train.precision"]),
    (["ticket_routing"], 2, ["data.path is not set", "ticket_routing/demo"]),
    (["ticket_routing", *GOOD, "data.path=godo.csv"], 3, ["godo.csv", "Did you mean", "good.csv"]),
    (["ticket_routing", *GOOD, "data.path=empty.csv"], 3, ["empty.csv is empty"]),
    (["ticket_routing", *GOOD, "data.path=header.csv"], 3, ["header.csv", "no rows"]),
    (["ticket_routing", *GOOD, "data.label_column=queu"], 3, ["queu", "text, queue", "data.label_column"]),
    (["ticket_routing", *GOOD, "data.path=latin.csv"], 3, ["latin.csv", "record 2", "line 4", "0xe9", "iconv"]),
    (["ticket_routing", *GOOD, "data.path=latin.csv.gz"], 3, ["latin.csv.gz", "record 2", "line 4"]),
    (["ticket_routing", *GOOD, "data.path=utf16.csv"], 3, ["utf16.csv", "0xff", "iconv -f utf-16"]),
    (["ticket_routing", *GOOD, "data.path=blank.csv"], 3, ["all 20 rows are without text", "data.text_columns"]),
    (["ticket_routing", *GOOD, "data.path=alone.csv"], 3, ["legal", "one row", "data.drop_labels_below"]),
    (["ticket_routing", *GOOD, "data.path=one_class.csv"], 3, ["hardware", "two classes"]),
    (["ticket_routing", *GOOD, "data.test_path=test.csv"], 3, ["test split", "legal"]),
    (["ticket_routing", *GOOD, "output_dir=a_file/runs"], 13, ["a_file", "output_dir"]),
    (["ticket_routing", *GOOD, "output_dir=/proc/runs"], 13, ["/proc", "output_dir"]),
    (["ticket_routing", *GOOD, "name=taken"], 12, ["taken exists already", "dist-train resume"]),
    (["ticket_routing", *GOOD, "parallel.gpu_ids=[7]"], 2, ["7", "GPU"]),
    (["ticket_routing", *GOOD, "parallel.nodes=2"], 2, ["parallel.nodes is 2", "set parallel.nodes (--nodes) to 1"]),
]


@pytest.mark.parametrize(("arguments", "code", "words"), CASES, ids=lambda value: str(value)[-60:])
def test_bad_input_is_refused_in_one_block(desk: Path, arguments: list[str], code: int, words: list[str]) -> None:
    assert_refused(desk, arguments, code, words)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "https://hub.invalid"])
@pytest.mark.parametrize("key", ["model.pretrained=bert-base-uncased", "data.tokenizer=a/b", "data.path=hub:a/b"])
def test_a_hub_name_without_network_is_refused(desk: Path, key: str, endpoint: str) -> None:
    words = [key.partition("=")[2], f"cannot reach {endpoint}", "dist-train prepare", key.partition("=")[0]]
    variables = {"HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1,hub.invalid"}
    assert_refused(desk, ["ticket_routing", *GOOD, key], 3, words, **variables)


def test_a_pretrained_folder_of_pickle_is_refused(desk: Path) -> None:
    arguments = ["ticket_routing", *GOOD, "model.pretrained=pickled"]
    assert_refused(desk, arguments, 4, ["pickled, which holds no safetensors weights", "save_pretrained()"])


def test_a_read_only_mount_is_refused(desk: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "readonly", "size=1m,ro") as folder:
        assert_refused(desk, ["ticket_routing", *GOOD, f"output_dir={folder}"], 13, ["Read-only", "output_dir"])


def test_a_full_disk_is_refused_before_anything_starts(desk: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=1m") as folder:
        assert_refused(desk, ["ticket_routing", *GOOD, f"output_dir={folder}"], 13, ["free", "output_dir"])


def test_a_20_mb_file_is_refused_within_seconds(desk: Path) -> None:
    line = "the printer on the second floor prints blank pages since monday morning and nobody knows why,hardware\n"
    with open(desk / "large.csv", "w") as stream:
        stream.write("text,queue\n")
        stream.write(line * (20_000_000 // len(line)))
        stream.write("one broken record without a label,,\n")
    arguments = ["ticket_routing", *GOOD, "data.path=large.csv"]
    assert_refused(desk, arguments, 3, ["large.csv", "3 fields", "the header has 2"])
    (desk / "large.csv").unlink()


def test_a_disk_that_fills_while_training_keeps_the_last_checkpoint(desk: Path, tmp_path: Path) -> None:
    settings = ["model.width=64", "model.heads=2", "model.layers=1", "checkpoint.every_steps=2", "train.steps=8"]
    with mounted(tmp_path / "filling", "size=90m") as folder:
        start = ["run", "ticket_routing", *GOOD, *settings, "name=full", "data.cache_dir=prepared"]
        staged = dist_train([*start, f"output_dir={folder}", "train.stop_after_steps=4"], desk)
        assert staged.returncode == 0, staged.stdout + staged.stderr
        run = folder / "full"
        kept = sorted(path.name for path in (run / "checkpoints").iterdir())
        ballast = folder / "ballast"
        _fill(ballast)
        done = dist_train(["resume", str(run), "train.stop_after_steps=null"], desk)
        assert done.returncode == 13, done.stdout + done.stderr
        assert "disk is full" in done.stderr
        assert "Traceback" not in done.stderr
        assert [path.name for path in sorted((run / "checkpoints").iterdir()) if path.name in kept] == kept
        ballast.unlink()
        done = dist_train(["resume", str(run), "train.stop_after_steps=null"], desk)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "resumed at step 4" in done.stdout


def _fill(path: Path) -> None:
    """Leave a few pages free: enough for log lines, too little for a checkpoint."""
    with open(path, "wb", buffering=0) as stream:
        try:
            while True:
                stream.write(b"\0" * 4096)
        except OSError:
            stream.truncate(max(0, stream.tell() - 64 * 4096))
