"""The sbatch script is a pure function: three sites as records, and values of any kind that reach the shell whole."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dist_train import config_io
from dist_train.config import SlurmConfig
from dist_train.errors import ConfigError
from slurm.script import Job, render

ROOT = Path(__file__).parent.parent
RECORDS = Path(__file__).parent / "data" / "slurm"
SITES = {"cpu_cluster": 0, "eight_gpus": 8, "preemptible": 4}
# Records what it was given, byte for byte: words, then variables.
STUB = """#!/bin/bash
printf '%s\\0' "$@" > "$RECORD/words"
env -0 > "$RECORD/variables"
"""
NASTY = [
    "$(touch x)",
    "`touch x`",
    "a\nb",
    "#SBATCH --x",
    "-rf",
    "'",
    '"',
    "\\",
    "a b",
    "*",
    "é",
    "",
    "$HOME",
    "${IFS}",
    ";",
]


def _job(command: tuple[str, ...] = ("python", "-m", "launcher", "node", "/runs/a"), **more: object) -> Job:
    values = {
        "name": "first",
        "nodes": 2,
        "gpus_per_node": 0,
        "code": Path("/runs/first/code"),
        "command": command,
        "pid_file": Path("/runs/first/.head.pid"),
        "log": Path("/runs/first/logs/slurm-%j.log"),
    }
    return Job(**{**values, **more})  # type: ignore[arg-type]


@pytest.mark.parametrize("site", SITES)
def test_the_script_of_a_site_is_as_recorded(site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dist-train").mkdir()
    (tmp_path / "dist-train" / "site.yaml").write_text((ROOT / "slurm" / "sites" / f"{site}.yaml").read_text())
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("USER", "ada")
    monkeypatch.setenv("HOME", "/home/ada")
    slurm = config_io.load("ticket_routing/demo").config.slurm
    rendered = render(_job(gpus_per_node=SITES[site], array="0-2" if site == "preemptible" else None), slurm)
    if os.environ.get("REFRESH_RECORDS"):
        (RECORDS / f"{site}.sh").write_text(rendered)
    assert rendered == (RECORDS / f"{site}.sh").read_text()
    assert subprocess.run(["bash", "-n"], input=rendered, text=True, capture_output=True).stderr == ""


def _run(script: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """What srun was given when the script ran: its words, and its variables."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name in ("srun", "module", "scontrol"):
        (programs / name).write_text(STUB if name == "srun" else "#!/bin/sh\n")
        (programs / name).chmod(0o755)
    assert subprocess.run(["bash", "-n"], input=script.encode(), capture_output=True).stderr == b""
    environment = {"PATH": f"{programs}:{os.environ['PATH']}", "RECORD": str(folder), "HOME": "/nowhere"}
    done = subprocess.run(["bash"], input=script.encode(), env=environment, cwd=folder, capture_output=True, timeout=30)
    assert done.stderr == b"", done.stderr
    words = (folder / "words").read_bytes().split(b"\0")[:-1]
    pairs = [entry.partition(b"=") for entry in (folder / "variables").read_bytes().split(b"\0")[:-1]]
    return [word.decode() for word in words], {name.decode(): value.decode() for name, _, value in pairs}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all examples."""
    return tmp_path_factory.mktemp("scripts")


# 250 scripts of 20 values each.
@settings(max_examples=250, deadline=None)
@given(st.lists(st.one_of(st.text(), st.sampled_from(NASTY)), min_size=20, max_size=20))
def test_a_value_reaches_srun_byte_for_byte_or_is_refused(folder: Path, values: list[str]) -> None:
    own = {"bin", "words", "variables"}
    before = {path.name for path in folder.iterdir()} - own
    command, variables = [], {}
    for index, value in enumerate(values):
        try:
            render(_job((value,)), SlurmConfig())
        except ConfigError:
            assert not value.isprintable()
        else:
            command.append(value)
        try:
            SlurmConfig(environment={f"V{index}": value})
        except ValidationError:
            assert any(ord(letter) < 32 or ord(letter) == 127 for letter in value)
        else:
            variables[f"V{index}"] = value
    try:
        script = render(_job(("python", *command)), SlurmConfig(environment=variables))
        script.encode()
    except UnicodeEncodeError:
        return  # half a surrogate pair is no text
    words, seen = _run(script, folder)
    assert words[words.index("python") + 1 :] == command
    assert {name: seen[name] for name in variables} == variables
    assert {path.name for path in folder.iterdir()} - own == before, "a value was run"


# Of the characters that a file's name or an image can have; a slash would make it another path.
_NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None)
@given(name=st.one_of(_NAMES, st.sampled_from([value for value in NASTY if value])), image=st.one_of(_NAMES, st.none()))
def test_a_folder_and_an_image_of_any_name_reach_srun_or_are_refused(
    folder: Path, name: str, image: str | None
) -> None:
    own = Path("/runs") / name
    job = _job(code=own / "code", pid_file=own / ".head.pid", log=own / "logs" / "slurm-%j.log", name=name)
    try:
        script = render(job, SlurmConfig(container_image=image, container="apptainer"))
    except (ConfigError, ValidationError):
        assert not name.isprintable() or image is not None
        return
    words, seen = _run(script, folder)
    assert seen["PYTHONPATH"] == f"{own}/code"
    options = re.findall(r"^#SBATCH --(?:job-name|output)=(.*)$", script, flags=re.MULTILINE)
    # sbatch reads a value in double quotes, where a backslash takes what follows as it is.
    read = [re.sub(r"\\(.)", r"\1", value[1:-1]) if value.startswith('"') else value for value in options]
    assert read == [name, f"{own}/logs/slurm-%j.log".replace("\\", "\\\\")]
    if image is not None:
        assert words[words.index("apptainer") :][:4] == ["apptainer", "exec", "--bind", f"{own}:{own}"]
        assert words[words.index("apptainer") + 4] == image


@pytest.mark.parametrize("value", ["$(x)", "`x`", "a\nb", "#SBATCH", "-rf", "a b", "a'b", 'a"b', "a;b", "a\\b"])
@pytest.mark.parametrize("key", ["partition", "account", "qos", "nodelist", "reservation", "gpu_type", "constraint"])
def test_a_word_that_could_mean_something_else_is_refused(key: str, value: str) -> None:
    with pytest.raises(ValidationError):
        SlurmConfig(**{key: value})


def test_an_extra_option_replaces_ours() -> None:
    slurm = SlurmConfig(time="10", extra=["--time=20", '--comment=say "hi" # there', "--exclusive"])
    rendered = render(_job(), slurm)
    assert "#SBATCH --time=20\n" in rendered
    assert "--time=10" not in rendered
    assert '#SBATCH --comment="say \\"hi\\" # there"\n' in rendered
    assert "#SBATCH --exclusive\n" in rendered
