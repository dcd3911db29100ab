"""Defect detection as a user runs it: an image folder to a report, a stop and a resume, new frames, their latency."""

from __future__ import annotations

import csv
import io
import json
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import dist_train as toolkit
from recipes.defect_detection.corruptions import CORRUPTIONS
from recipes.defect_detection.stored import StoredImages
from tests.front_door import dist_train, final_shards, lines, losses, start, wait_for_step
from tests.parts import SIDE, STEPS, run_parts, write_parts

pytestmark = pytest.mark.front_door


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with part images and an uninterrupted run over them, evaluated under corruptions too."""
    folder = tmp_path_factory.mktemp("bench")
    write_parts(folder / "parts")
    done = dist_train(run_parts("whole", "task.corruptions=true"), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "whole.txt").write_text(done.stdout)
    return folder


def test_the_report_has_a_verdict_a_gallery_and_where_the_model_looked(bench: Path) -> None:
    report = json.loads((bench / "runs" / "whole" / "report.json").read_text())
    metrics = report["metrics"]["test"]
    assert metrics["pr_auc"]["value"] > 0.8
    assert {"peak_in_mask", "centre_in_mask", "random_point_in_mask"} <= set(metrics)
    assert {"f1", "recall_at_10_per_1000", "caught", "caught_at_least", "overkill", "review_share"} <= set(metrics)
    assert set(report["groups"]["test"]) == {"type", "size"}
    assert set(report["baselines"]) == {"texture", "majority"}
    assert any("beats the majority baseline" in sentence for sentence in report["verdicts"])
    assert any("escape" in sentence for sentence in report["remarks"])
    html = (bench / "runs" / "whole" / "report.html").read_text()
    assert "Precision and recall" in html
    assert "Escapes and over-kill" in html
    assert "<script" not in html


def test_the_test_split_is_evaluated_under_each_corruption(bench: Path) -> None:
    report = json.loads((bench / "runs" / "whole" / "report.json").read_text())
    assert set(report["conditions"]) == set(CORRUPTIONS)
    clean = report["metrics"]["test"]["pr_auc"]["value"]
    for entry in report["conditions"].values():
        assert entry["fall"]["pr_auc"]["value"] == pytest.approx(clean - entry["metrics"]["pr_auc"]["value"])
    assert "Test split under other conditions" in (bench / "runs" / "whole" / "report.md").read_text()


def test_a_stopped_run_goes_on_bit_identical_and_on_one_rank_with_the_same_losses(bench: Path) -> None:
    for name, ranks in (("stopped", 2), ("fewer", 1)):
        process = start(run_parts(name), bench)
        wait_for_step(bench / "runs" / name, 25)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 75, output
        done = dist_train(["resume", f"runs/{name}", f"parallel.processes_per_node={ranks}"], bench)
        assert done.returncode == 0, done.stdout + done.stderr
    whole = losses(bench / "runs" / "whole")
    assert len(whole) == STEPS
    assert losses(bench / "runs" / "stopped") == whole
    assert final_shards(bench / "runs" / "stopped") == final_shards(bench / "runs" / "whole")
    fewer = losses(bench / "runs" / "fewer")
    np.testing.assert_allclose(
        [fewer[step] for step in sorted(whole)], [whole[step] for step in sorted(whole)], rtol=1e-4
    )


def test_new_frames_are_answered_from_a_folder_and_from_python(bench: Path) -> None:
    folder = bench / "frames"
    folder.mkdir()
    sources = [*sorted((bench / "parts" / "images").rglob("*.png"))[::40], _surest_find(bench)]
    for source in sources:
        Image.open(source).save(folder / source.name)
    # A frame of another size: the peak is told in its own pixels.
    Image.open(sources[-1]).resize((4 * SIDE, 4 * SIDE)).save(folder / "large.png")
    done = dist_train(["predict", "runs/whole", "frames"], bench)
    assert done.returncode == 0, done.stderr
    answers = list(csv.DictReader(io.StringIO(done.stdout)))
    assert [answer["id"] for answer in answers] == sorted(path.name for path in folder.iterdir())
    assert {answer["decision"] for answer in answers} <= {"accept", "review", "reject"}
    by_name = {answer["id"]: answer for answer in answers}
    large, small = by_name["large.png"], by_name[sources[-1].name]
    assert float(large["peak_x"]) == pytest.approx(4 * float(small["peak_x"]), abs=4 * SIDE / 6)

    model = toolkit.load(str(bench / "runs" / "whole"))
    pixels = np.asarray(Image.open(folder / sources[0].name))
    assert model.predict([{"image": pixels}])[0]["probability"] == pytest.approx(
        float(by_name[sources[0].name]["probability"]), abs=1e-5
    )
    kept = pq.read_table(bench / "runs" / "whole" / "predictions" / "test.parquet")
    names = {path.name: path for path in (bench / "parts" / "images").rglob("*.png")}
    rows = kept.to_pylist()[:5]
    own = model.predict([{"path": str(names[Path(row["id"]).name])} for row in rows])
    for row, answer in zip(rows, own, strict=True):
        assert answer["probability"] == pytest.approx(row["probability"][1], abs=1e-5)
        assert answer["decision"] == row["decision"]


def _surest_find(bench: Path) -> Path:
    """The defective part that the model is surest of: a good one's peak lies anywhere."""
    kept = pq.read_table(bench / "runs" / "whole" / "predictions" / "test.parquet").to_pylist()
    surest = max((row for row in kept if row["label"] == 1), key=lambda row: row["probability"][1])
    return next((bench / "parts" / "images").rglob(Path(surest["id"]).name))


def test_the_latency_of_one_frame_is_told_by_stage_and_threads(bench: Path) -> None:
    done = dist_train(["latency", "runs/whole", "parts/images/good", "--rows", "20"], bench)
    assert done.returncode == 0, done.stderr
    assert "read and preprocess" in done.stdout
    kept = json.loads((bench / "runs" / "whole" / "latency.json").read_text())
    assert kept["results"][0]["threads"] == 1
    for result in kept["results"]:
        stages = result["ms"]
        assert stages["total"]["p50"] >= max(stages[name]["p50"] for name in ("encode", "forward", "answer")) > 0
        assert stages["total"]["p99"] >= stages["total"]["p95"] >= stages["total"]["p50"]
    assert dist_train(["report", "runs/whole"], bench).returncode == 0
    assert "Latency of one row" in (bench / "runs" / "whole" / "report.html").read_text()
    refused = dist_train(["latency", "runs/whole", "nothing"], bench)
    assert refused.returncode == 3
    assert "nothing" in refused.stderr


def test_where_no_part_is_defective_the_run_learns_from_good_ones_alone(bench: Path) -> None:
    done = dist_train(run_parts("one-class", "data.test_only=[all]", "train.steps=40", ranks=1), bench)
    assert done.returncode == 0, done.stdout + done.stderr
    run = bench / "runs" / "one-class"
    decision = json.loads((run / "best" / "dist_train.json").read_text())["decision"]
    assert "gaussian" in decision
    report = json.loads((run / "report.json").read_text())
    assert report["data"]["splits"]["train"]["labels"].get("defective", 0) == 0
    assert report["metrics"]["validation"]["pr_auc"]["value"] is None
    assert report["metrics"]["test"]["roc_auc"]["value"] > 0.7
    answers = dist_train(["predict", "runs/one-class", "parts/images/scratch"], bench)
    assert answers.returncode == 0, answers.stderr
    assert "reject" in answers.stdout


def test_images_that_are_damaged_after_their_preparation_are_named_and_within_the_budget_left_out(bench: Path) -> None:
    folder = Path(json.loads((bench / "runs" / "whole" / "data.json").read_text())["folder"])
    row = int(StoredImages(folder).rows("train")[3])
    images = np.lib.format.open_memmap(folder / "images.npy", "r+")
    before = images[row].copy()
    images[row, 0, 0, 0] ^= 0xFF
    images.flush()
    try:
        refused = dist_train(run_parts("damaged", "train.steps=20"), bench)
        assert refused.returncode == 3, refused.stdout + refused.stderr
        assert "damaged" in refused.stderr
        for name, ranks in (("budget2", 2), ("budget1", 1)):
            done = dist_train(run_parts(name, "train.steps=20", "data.most_unreadable=1", ranks=ranks), bench)
            assert done.returncode == 0, done.stdout + done.stderr
    finally:
        images[row] = before
        images.flush()
    two, one = (losses(bench / "runs" / name) for name in ("budget2", "budget1"))
    np.testing.assert_allclose([one[step] for step in sorted(one)], [two[step] for step in sorted(one)], rtol=1e-4)
    whole = losses(bench / "runs" / "whole")
    assert any(abs(two[step] - whole[step]) > 1e-6 for step in two), "the image counted nothing"
    assert not [
        line for line in lines(bench / "runs" / "budget2" / "events.jsonl") if line["event"] == "nonfinite_step"
    ]
