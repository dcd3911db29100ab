"""One typed config from files, site and command line: strict, with the place of every value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dist_train import config_io, config_text
from dist_train.config import RunConfig
from dist_train.config_io import flatten, load
from dist_train.errors import ConfigError, ToolkitError, UnsafeInputError
from dist_train.rundir import RunDir
from recipes.ticket_routing.config import Config


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own, and no site file of the user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path


def _write(name: str, text: str) -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return name


def _refused(recipe: str, *overrides: str, kind: type[ToolkitError] = ConfigError) -> str:
    with pytest.raises(kind) as refusal:
        load(recipe, overrides)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  global_batchsize: 3\n", ["mine.yaml:3: train.global_batchsize", "train.global_batch_size"]),
        ("optim:\n  epochs: 3\n", ["mine.yaml:3: optim.epochs", "Did you mean train.epochs"]),
        ("optim:\n  learning_rate: 3\n", ["mine.yaml:3: optim.learning_rate", "Did you mean optim.lr"]),
        ("optim:\n  zzz: 3\n", ["optim.zzz is no known key", "Known in optim: name, lr"]),
        ("zzz:\n  zzz: 3\n", ["mine.yaml:2: zzz is no known key", "Known in the top level: recipe"]),
        ("data:\n  text_columns: []\n", ["mine.yaml:3: data.text_columns is []", "at least 1 long"]),
        ("train: 3\n", ["mine.yaml:2: train is 3, but holds a group of keys"]),
        ("train:\n  steps: 1.5\n", ["mine.yaml:3: train.steps is 1.5, but a whole number"]),
        ("train:\n  steps: '8'\n", ["leave out the quotes"]),
        ("train:\n  steps: 1e3\n", ["write 1000"]),
        ("train:\n  steps: -1\n", ["mine.yaml:3: train.steps is -1", "above 0"]),
        ("train:\n  precision: bf61\n", ["mine.yaml:3: train.precision is 'bf61'", "did you mean bf16?"]),
        ("model:\n  dropout: .nan\n", ["mine.yaml:3: model.dropout"]),
        ("data:\n  text_columns: text\n", ["mine.yaml:3: data.text_columns", "write [text]"]),
        ("data:\n  label_column: null\n", ["mine.yaml:3: data.label_column is null"]),
        ("name: a/b\n", ["mine.yaml:2: name is 'a/b'", "only letters"]),
        ("train:\n  steps: 3\n  steps: 4\n", ["mine.yaml:4", "stands twice", "line 3"]),
        ("train:\n  steps: 3\n  epochs: 4\n", ["train.steps and train.epochs are both set"]),
        ("model:\n  width: 30\n", ["model.width is 30"]),
        ("model:\n  kind: lstm\n  width: 33\n", ["model.width is 33", "even"]),
        ("model:\n  kind: pretrained\n", ["model.kind is pretrained, but model.pretrained is null"]),
        ("train: [\n", ["mine.yaml:3: this is not valid YAML"]),
        ("- a\n", ["this is not valid YAML"]),
        ("data:\n  path: $NOWHERE/x.csv\n", ["data.path uses $NOWHERE"]),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(text: str, words: list[str]) -> None:
    message = _refused(_write("mine.yaml", "extends: ticket_routing\n" + text))
    for word in words:
        assert word in message


def test_all_problems_are_told_at_once_wherever_they_were_set() -> None:
    _write("mine.yaml", "extends: ticket_routing\ntrain:\n  stepps: 3\nmodel:\n  layers: two\n")
    message = _refused("mine.yaml", "optim.lr=fast", "seed", "train=3")
    for word in ("mine.yaml:3", "mine.yaml:5", "optim.lr is 'fast'", "'seed' is no setting", "train is a group"):
        assert word in message
    assert message.count("\n") == 4


def test_an_unknown_recipe_is_answered_with_the_nearest_one() -> None:
    message = _refused("ticket_routin")
    assert "Did you mean ticket_routing?" in message
    assert "ticket_routing/demo" in message


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: &x [1]\nb: [*x, *x]\n", "anchors"),
        ("data: !!python/object/apply:os.system [ls]\n", "tag"),
        ("a: " + "[" * 40 + "]" * 40 + "\n", "levels"),
        ("# " + "x" * (1 << 20) + "\n", "larger than"),
    ],
    ids=["alias bomb", "tag", "depth", "size"],
)
def test_more_than_plain_data_is_refused_as_unsafe(text: str, word: str) -> None:
    assert word in _refused(_write("mine.yaml", text), kind=UnsafeInputError)
    assert UnsafeInputError.exit_code == 4


def test_an_unknown_name_to_build_on_is_told_with_its_file() -> None:
    message = _refused(_write("mine.yaml", "extends: ticket_ruting\n"))
    assert message.startswith("mine.yaml: extends: there is no recipe 'ticket_ruting'. Did you mean ticket_routing?")
    assert "zzz.yyy is no known key. Known groups: data, " in _refused("ticket_routing", "zzz.yyy=3")


def test_a_file_that_is_not_utf8_is_named_with_its_line() -> None:
    Path("mine.yaml").write_bytes(b"extends: ticket_routing\nname: caf\xe9\n")
    assert "mine.yaml:2: the byte 0xe9 is not UTF-8" in _refused("mine.yaml")


def test_each_layer_goes_before_the_one_below_and_is_named() -> None:
    _write("config/dist-train/site.yaml", "seed: 1\noutput_dir: scratch\ntrack:\n  project: site\noptim:\n  lr: 9.0\n")
    _write("base.yaml", "extends: ticket_routing\nseed: 2\noptim:\n  lr: 8.0\n  eps: 1e-7\n")
    _write("mine.yaml", "extends: base.yaml\nseed: 3\noptim:\n  lr: 7.0\n")
    loaded = load("mine.yaml", ["seed=4"])
    config: Any = loaded.config
    assert (config.seed, config.optim.lr, config.optim.eps, config.track.project) == (4, 7.0, 1e-7, "site")
    assert config.model.dropout == 0.3, "from the shipped recipe"
    wanted = {"seed": "command line", "optim.lr": "mine.yaml:4", "optim.eps": "base.yaml:5"}
    for key, place in wanted.items():
        assert loaded.sources[key] == place
    assert loaded.sources["track.project"].endswith("site.yaml:4")
    assert "optim.beta1" not in loaded.sources


def test_extends_in_a_circle_is_refused() -> None:
    _write("a.yaml", "extends: b.yaml\n")
    _write("b.yaml", "extends: a.yaml\n")
    assert "circle" in _refused("a.yaml")


def test_paths_are_relative_to_the_file_that_sets_them(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA", str(here / "store"))
    monkeypatch.setenv("HOME", str(here / "home"))
    _write("deep/mine.yaml", "extends: ticket_routing\ndata:\n  path: a.csv\n  test_path: $DATA/b.csv\n")
    config: Any = load("deep/mine.yaml", ["data.validation_path=[c.csv, ~/d.csv]"]).config
    assert config.data.path == str(here / "deep" / "a.csv")
    assert config.data.test_path == str(here / "store" / "b.csv")
    assert config.data.validation_path == [str(here / "c.csv"), str(here / "home" / "d.csv")]
    assert config.output_dir == here / "runs"
    assert load("ticket_routing", ["data.path=hub:owner/name"]).config.data.path == "hub:owner/name"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["train.steps=5"], (5, None)),
        (["train.epochs=2"], (None, 2)),
        (["train.epochs=null", "train.steps=7"], (7, None)),
    ],
)
def test_steps_or_epochs_of_a_later_layer_count(overrides: list[str], expected: tuple[int | None, int | None]) -> None:
    train = load("ticket_routing", overrides).config.train
    assert (train.steps, train.epochs) == expected


def test_values_from_the_command_line_are_read_by_the_declared_type() -> None:
    overrides = ["optim.lr=1e-3", "data.text_columns=subject,body", "track.tags=[a, b]", "optim.clip_norm=null"]
    config: Any = load("ticket_routing", [*overrides, "name=2026"]).config
    assert config.optim.lr == 0.001
    assert config.data.text_columns == ["subject", "body"]
    assert config.track.tags == ["a", "b"]
    assert config.optim.clip_norm is None
    assert config.name == "2026"


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


@settings(max_examples=30, deadline=None)
@example(changes={"track": {"tags": ["\x85", "\u2028", "on", "1e3", ""]}})
@given(
    changes=st.fixed_dictionaries(
        {},
        optional={
            "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
            "seed": st.integers(0, 2**63 - 1),
            "optim": st.fixed_dictionaries({"lr": st.floats(1e-12, 1e6), "weight_decay": st.floats(0, 1)}),
            "data": st.fixed_dictionaries({"label_column": TEXT}),
            "track": st.fixed_dictionaries({"tags": st.lists(TEXT, max_size=3)}),
        },
    )
)
def test_a_config_that_is_written_and_read_is_the_same(tmp_path_factory: pytest.TempPathFactory, changes: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "round"
    folder.mkdir(exist_ok=True)
    data = {"cache_dir": "/c", **changes.pop("data", {})}
    config = Config(recipe="ticket_routing", output_dir="/runs", data=data, **changes)
    (folder / "config.yaml").write_text(config_text.dump(config, {"seed": "mine.yaml:3"}, "first"), encoding="utf-8")
    again = config_io.load_run_config(RunDir(folder))
    assert flatten(again) == {**flatten(config), "name": None}


def test_resume_lets_change_how_a_run_trains_and_never_what_comes_out() -> None:
    config = load("ticket_routing", ["data.path=a.csv", "parallel.processes_per_node=2"]).config
    changed = config_io.resume_overrides(config, ["parallel.processes_per_node=4", "train.stop_after_steps=9"])
    assert changed.parallel.processes_per_node == 4
    assert {**flatten(changed), "parallel.processes_per_node": 2, "train.stop_after_steps": None} == flatten(config)
    for override in ("optim.lr=1", "train.global_batch_size=8", "data.split_seed=1", "seed=1"):
        with pytest.raises(ConfigError, match="cannot change on resume: it defines the run or its result"):
            config_io.resume_overrides(config, [override])


def test_the_json_schema_knows_every_key_with_its_description() -> None:
    schema = config_io.json_schema("ticket_routing")
    json.dumps(schema)
    for name in flatten(Config(recipe="ticket_routing")):
        place = schema
        for part in name.split("."):
            while "$ref" in place:
                place = schema["$defs"][place["$ref"].rpartition("/")[2]]
            place = place["properties"][part]
        assert place["description"], name
    assert schema["required"] == []


def test_a_pretrained_model_is_one_key() -> None:
    config: Any = load("ticket_routing", ["model.pretrained=some/encoder"]).config
    assert config.model.kind == "pretrained"
    assert "model.kind is lstm" in _refused("ticket_routing", "model.pretrained=some/encoder", "model.kind=lstm")


def test_the_fingerprint_of_a_result_changes_with_what_defines_it_and_nothing_else() -> None:
    base, other, moved = (
        config_io.result_fingerprint(load("ticket_routing", overrides).config)
        for overrides in ([], ["optim.lr=0.5"], ["parallel.processes_per_node=2", "checkpoint.every_steps=7", "name=x"])
    )
    assert base == moved
    assert base != other


def test_what_is_out_of_every_range_of_a_key_is_said_once() -> None:
    assert _refused("ticket_routing", "optim.freeze=-1").count("optim.freeze is -1, but backbone or a whole") == 1


def test_a_run_of_an_earlier_version_still_has_its_fingerprint() -> None:
    """Recorded before the keys of fine-tuning were there: those that are off must not count."""
    config = RunConfig(recipe="tiny")
    recorded = "59f5a9547aefd97d10e5147016db0b2801bd5827d1d926ff1a6b4b68cc952b6a"
    assert config_io.result_fingerprint(config) == recorded


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["parallel.offload=optimizer"], ["parallel.offload is optimizer", "zero1 or zero2 or zero3", "not with auto"]),
        (["parallel.offload=parameters", "parallel.strategy=zero2"], ["goes with parallel.strategy zero3"]),
        (["parallel.strategy=zero4"], ["parallel.strategy", "zero4", "zero3"]),
        (["parallel.strategy=zero3", "train.compile=true"], ["train.compile is true", "fsdp"]),
        (["parallel.deepspeed_config=ds.json"], ["parallel.deepspeed_config is given", "auto"]),
        (["train.micro_batch_size=0"], ["train.micro_batch_size"]),
        (["optim.freeze=backbone", "optim.layer_decay=.9"], ["optim.layer_decay is 0.9", "set optim.layer_decay to"]),
        (["optim.freeze=backbone", "optim.unfreeze_every_steps=9"], ["optim.unfreeze_every_steps is 9"]),
    ],
)
def test_combinations_that_cannot_be_are_refused_with_the_key_to_change(settings: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        config_io.load("ticket_routing/demo", settings, site=False)
    for word in words:
        assert word in str(refusal.value)
