"""Weekly retraining: queues come and go, known ones keep their weights, and a rare one may be missing for a week."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dist_train import config_io
from dist_train.errors import ConfigError, DataError
from dist_train.model_folder import write_model, write_record
from dist_train.prepared import load_facts, prepare
from dist_train.recipe import load_recipe
from dist_train.report import measure_models, show_interval
from dist_train.start_run import prepare_data
from recipes.ticket_routing import score
from recipes.ticket_routing.config import SyntheticConfig
from recipes.ticket_routing.pretrained import label_parameters
from recipes.ticket_routing.stored import StoredSplit
from recipes.ticket_routing.synthetic import generate
from recipes.ticket_routing.task import TicketTask

WEEK1 = ["Access", "Email", "Hardware", "Network", "Printing", "Software"]
WEEK2 = ["Access", "Email", "Hardware", "Network", "Printing", "Purchasing", "Telephony"]
SMALL = ["data.label_column=queue", "data.vocab_size=600", "data.max_tokens=64", "model.layers=1", "model.width=32"]
SMALL += ["model.heads=2", "model.feedforward=64"]


def write_week(path: Path, queues: list[str], seed: int, rows: int = 700) -> Path:
    """Generated tickets of these queues as a CSV with the columns text and queue."""
    with open(path, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "queue"])
        writer.writerows(row for row in generate(SyntheticConfig(seed=seed), 0, rows) if row[1] in queues)
    return path


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two weeks of tickets, a small BERT, and for each kind of model what its run of the first week left."""
    folder = tmp_path_factory.mktemp("weeks")
    write_week(folder / "week1.csv", WEEK1, 1)
    write_week(folder / "week2.csv", WEEK2, 2)
    first = _task(folder, "transformer", "week1.csv")
    config = transformers.BertConfig(
        vocab_size=first.vocabulary, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(folder / "bert")
    for file in (first.prepared / "tokenizer").iterdir():
        (folder / "bert" / file.name).write_bytes(file.read_bytes())
    for kind in ("transformer", "lstm", "pretrained"):
        _export(_task(folder, kind, "week1.csv"), folder / "runs" / kind)
    return folder


def _load(folder: Path, kind: str, file: str, *extra: str) -> config_io.Loaded:
    settings = [*SMALL, f"data.path={folder}/{file}", f"data.cache_dir={folder}/prepared", f"model.kind={kind}", *extra]
    if kind == "pretrained":
        settings.insert(0, f"model.pretrained={folder}/bert")
    return config_io.load("ticket_routing", settings, site=False)


def _task(folder: Path, kind: str, file: str, *extra: str) -> TicketTask:
    config: Any = _load(folder, kind, file, *extra).config
    return TicketTask(config, prepare(config, load_recipe("ticket_routing"), lambda text: None))


def _export(task: TicketTask, run: Path, seed: int = 11) -> None:
    """What a finished run leaves for the next one."""
    (run / "best").mkdir(parents=True)
    torch.manual_seed(seed)
    facts = load_facts(task.prepared) | {"folder": str(task.prepared)}
    write_model(run / "best", task, task.build_model())
    write_record(run / "best", task.config, facts, {"run": run.name, "step": 40})
    (run / "config.yaml").touch()
    (run / "data.json").write_text(json.dumps(facts))


def _retrain(folder: Path, *extra: str, kind: str = "transformer", file: str = "week2.csv") -> TicketTask:
    return _task(folder, kind, file, f"model.init_from={folder}/runs/{kind}", *extra)


@pytest.mark.parametrize("kind", ["transformer", "lstm", "pretrained"])
def test_known_queues_keep_their_weights_bit_for_bit_and_new_ones_are_named(desk: Path, kind: str) -> None:
    task = _retrain(desk, kind=kind)
    assert task.labels == WEEK2
    earlier = task.load_model(desk / "runs" / kind / "best").state_dict()
    torch.manual_seed(3)
    fresh = task.build_model().state_dict()
    torch.manual_seed(3)
    model = task.build_model()
    taken = task.take_over(model)
    assert taken is not None
    assert (taken.kept, taken.new, taken.removed) == (tuple(WEEK2[:5]), ("Purchasing", "Telephony"), ("Software",))
    heads = {f"encoder.{name}" for name in label_parameters(model.encoder)}
    assert len(heads) == 2
    for name, tensor in model.state_dict().items():
        if name in heads:
            assert torch.equal(tensor[:5], earlier[name][:5])
            assert torch.equal(tensor[5:], fresh[name][5:])
        else:
            assert torch.equal(tensor, earlier[name]), name
    old, new = (transformers.PreTrainedTokenizerFast.from_pretrained(folder)
                for folder in (desk / "runs" / kind / "best", task.prepared / "tokenizer"))  # fmt: skip
    assert new.get_vocab() == old.get_vocab(), "tokens keep their meaning"


def test_a_run_that_starts_anew_takes_nothing(desk: Path) -> None:
    assert _task(desk, "transformer", "week1.csv").take_over(torch.nn.Linear(1, 1)) is None


def test_a_model_folder_names_no_path_of_the_run_before(desk: Path, tmp_path: Path) -> None:
    task = _retrain(desk)
    task.save_model(task.build_model(), tmp_path)
    assert str(desk) not in (tmp_path / "config.json").read_text()


@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("transformer", ["model.width=64", "data.max_tokens=32"],
         ["model.width is 64, but there 32", "data.max_tokens is 32, but there 64", "model.width: command line"]),
        ("transformer", ["model.heads=4"], ["model.heads is 4, but there 2"]),
        ("lstm", ["model.layers=2"], ["model.layers is 2, but there 1"]),
        ("lstm", ["model.kind=transformer"], ["model.kind is transformer, but there lstm"]),
        ("pretrained", [], ["hidden_size of model.pretrained is 64, but there 32", "model.pretrained: command line"]),
    ],
)  # fmt: skip
def test_another_architecture_is_refused_with_both_values_and_both_places(
    desk: Path, tmp_path: Path, kind: str, settings: list[str], words: list[str]
) -> None:
    if kind == "pretrained":
        shutil.copytree(desk / "bert", tmp_path / "wide")
        transformers.BertConfig(hidden_size=64, num_attention_heads=2).save_pretrained(tmp_path / "wide")
        settings = [f"model.pretrained={tmp_path}/wide"]
    loaded = _load(desk, kind, "week2.csv", f"model.init_from={desk}/runs/{kind}", *settings)
    with pytest.raises(ConfigError) as refusal:
        prepare_data(loaded.config, load_recipe("ticket_routing"), loaded.sources)
    for word in [*words, f"{desk}/runs/{kind}/best", "model.init_from: command line"]:
        assert word in str(refusal.value)


def test_two_tokenizers_are_refused(desk: Path) -> None:
    with pytest.raises(ConfigError, match="set one of the two to null"):
        _retrain(desk, f"data.tokenizer={desk}/bert")


def test_damaged_weights_are_named(desk: Path, tmp_path: Path) -> None:
    shutil.copytree(desk / "runs" / "transformer", tmp_path / "cut")
    weights = tmp_path / "cut" / "best" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    task = _task(desk, "transformer", "week2.csv", f"model.init_from={tmp_path}/cut")
    with pytest.raises(DataError, match="cut/best cannot be read"):
        task.take_over(task.build_model())


def test_a_pinned_list_gives_labels_and_order(desk: Path) -> None:
    order = [*WEEK1[3:], *WEEK1[:3]]
    task = _task(desk, "transformer", "week1.csv", f"data.labels={json.dumps(order)}")
    assert task.labels == order
    plain = _task(desk, "transformer", "week1.csv")
    names = [[each.labels[label] for label in each.rows("train").labels] for each in (task, plain)]
    assert sorted(names[0]) == sorted(names[1])
    assert set(names[0]) == set(WEEK1)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (WEEK2[:-1], ["'Telephony': ", "row(s), the first is row ", "data.labels does not list", "data.labels=null"]),
        ([*WEEK2[1:], "access"], ["'Access': ", "(listed is 'access')"]),
        ([*WEEK2, "Legal"], ["data.labels lists 'Legal', but the training split has no row", "model.init_from"]),
        ([*WEEK2, "Access"], ["lists 'Access' twice"]),
        ([*WEEK2, " Legal"], ["' Legal'", "blanks around it"]),
        (WEEK2[:1], ["data.labels is "]),
    ],
)  # fmt: skip
def test_a_list_that_does_not_match_the_data_is_refused_by_name(
    desk: Path, labels: list[str], words: list[str]
) -> None:
    before = sorted((desk / "prepared").glob("ticket_routing-*"))
    with pytest.raises((DataError, ConfigError)) as refusal:
        _task(desk, "transformer", "week2.csv", f"data.labels={json.dumps(labels)}")
    for word in words:
        assert word in str(refusal.value)
    assert sorted((desk / "prepared").glob("ticket_routing-*")) == before


def test_a_listed_queue_is_never_dropped_and_an_unlisted_rare_one_may_be(desk: Path, tmp_path: Path) -> None:
    rare = "the lease has ended,Legal\n" * 5 + "lunch was cold,Canteen\n"
    (tmp_path / "rare.csv").write_text((desk / "week1.csv").read_text() + rare)
    settings = [f"data.path={tmp_path}/rare.csv", "data.drop_labels_below=10", "data.near_duplicates=ignore"]
    pinned = f"data.labels={json.dumps([*WEEK1, 'Legal'])}"
    facts = load_facts(_task(desk, "transformer", "", *settings, pinned).prepared)
    assert sum(facts["splits"][name]["labels"]["Legal"] for name in facts["splits"]) == 5
    assert any("left out 1 rows of: Canteen" in warning for warning in facts["warnings"])
    assert _task(desk, "transformer", "", *settings).labels == WEEK1


def test_the_row_of_an_unlisted_label_is_counted_over_all_files(desk: Path, tmp_path: Path) -> None:
    (tmp_path / "more.csv").write_text("text,queue\nthe screen is black,Hardware\nthe lease has ended,Legal\n")
    first = (desk / "week1.csv").read_text().count("\n") - 1
    both = f"data.path=[{desk}/week1.csv,{tmp_path}/more.csv]"
    with pytest.raises(DataError, match=rf"'Legal': 1 row\(s\), the first is row {first + 1}\n"):
        _task(desk, "transformer", "", both, f"data.labels={json.dumps(WEEK1)}")


def test_a_queue_that_is_missing_for_a_week_is_kept_and_spoils_no_number(desk: Path) -> None:
    pinned = sorted({*WEEK1, *WEEK2})
    task = _retrain(desk, f"data.labels={json.dumps(pinned)}")
    taken = task.take_over(task.build_model())
    assert taken is not None
    assert (taken.removed, taken.new) == ((), ("Purchasing", "Telephony"))
    facts = load_facts(task.prepared)
    assert facts["splits"]["train"]["labels"]["Software"] == 0
    assert any("no training row of 'Software'" in warning for warning in facts["warnings"])
    tables = score.baselines(task.prepared, task.config, lambda text: None)
    models = {name: splits["test"] for name, splits in tables.items()}
    models["model"] = models["ngram"]
    measured = measure_models(models, load_recipe("ticket_routing").score, 100)
    classes = measured["groups"]["model"]["class"]
    assert classes["Software"]["rows"] == 0
    assert show_interval(classes["Software"]["f1"]) == "not defined"
    known = [entry["f1"]["value"] for name, entry in classes.items() if name != "Software"]
    assert measured["metrics"]["ngram"]["macro_f1"]["value"] == pytest.approx(sum(known) / len(known))
    assert all(entry["value"] is not None for entry in measured["metrics"]["majority"].values())
    assert len(score.figures(models, {"class": classes}, task.prepared)) == 3


def test_a_queue_with_one_row_or_with_rows_only_in_the_test_split_may_be_one_that_is_known(
    desk: Path, tmp_path: Path
) -> None:
    text = (desk / "week2.csv").read_text()
    (tmp_path / "rare.csv").write_text(text + "the editor does not start,Software\n")
    (tmp_path / "test.csv").write_text("text,queue\n" + "the plugin of the browser fails,Software\n" * 2)
    for settings in ([f"data.path={tmp_path}/rare.csv"], [f"data.test_path={tmp_path}/test.csv"]):
        assert "Software" in _retrain(desk, *settings).labels
        with pytest.raises(DataError, match="Software"):
            _task(desk, "transformer", "week2.csv", *settings)


def test_what_one_earlier_model_allows_is_not_found_prepared_for_another(desk: Path, tmp_path: Path) -> None:
    for name in ("alone", "other"):
        shutil.copytree(desk / "runs" / "transformer" / "best", tmp_path / name)
    described = (tmp_path / "other" / "facts.json").read_text()
    (tmp_path / "other" / "facts.json").write_text(described.replace("Software", "Catering"))
    pinned = f"data.labels={json.dumps(sorted({*WEEK1, *WEEK2}))}"
    _task(desk, "transformer", "week2.csv", pinned, f"model.init_from={tmp_path}/alone")
    with pytest.raises(DataError, match="'Software'"):
        _task(desk, "transformer", "week2.csv", pinned, f"model.init_from={tmp_path}/other")


def test_queues_that_leave_the_model_are_named_in_the_data_s_warnings(desk: Path) -> None:
    warnings = load_facts(_retrain(desk).prepared)["warnings"]
    assert any("knows 'Software', which this one will not: list it in data.labels" in line for line in warnings)


def test_rows_that_the_earlier_model_was_trained_on_are_counted_where_they_are_evaluated(
    desk: Path, tmp_path: Path
) -> None:
    assert load_facts(_retrain(desk).prepared)["leaks"]["rows_trained_before"] == {"validation": 0, "test": 0}
    lines = (desk / "week2.csv").read_text().splitlines(keepends=True)
    (tmp_path / "both.csv").write_text((desk / "week1.csv").read_text() + "".join(lines[1:]))
    task = _retrain(desk, f"data.path={tmp_path}/both.csv")
    counts = load_facts(task.prepared)["leaks"]["rows_trained_before"]
    trained = set(StoredSplit(_task(desk, "transformer", "week1.csv").prepared, "train").texts())
    for split, count in counts.items():
        seen = sum(text in trained for text in StoredSplit(task.prepared, split).texts())
        assert count == pytest.approx(seen, abs=2), "near-copies apart"
        assert seen > 10
    assert any("scores there are too high" in line for line in load_facts(task.prepared)["warnings"])


def test_the_runs_before_the_earlier_one_count_too_and_data_that_is_gone_is_said(desk: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    _export(_retrain(desk), second)
    (second / "init_from.json").write_text(json.dumps({"folder": str(desk / "runs" / "transformer" / "best")}))
    again = _task(desk, "transformer", "week1.csv", f"model.init_from={second}", "data.split_seed=4")
    facts = load_facts(again.prepared)
    assert facts["leaks"]["rows_trained_before"]["test"] > 10, "week 1 trained the run that the second started from"
    (second / "init_from.json").unlink()
    without = _task(desk, "transformer", "week1.csv", f"model.init_from={second}", "data.split_seed=4")
    assert without.prepared == again.prepared, "a resume finds its data when the run before the earlier one is gone"
    for file in (second / "data.json", second / "best" / "facts.json"):
        facts = json.loads(file.read_text())
        file.write_text(json.dumps(facts | {"folder": str(tmp_path / "cleared"), "fingerprint": "other"}))
    again = _task(desk, "transformer", "week1.csv", f"model.init_from={second}", "data.split_seed=4")
    assert any("the data of second is not there any more" in line for line in load_facts(again.prepared)["warnings"])
