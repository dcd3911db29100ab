"""A built wheel works from another folder, also from one that holds slurm/ and recipes/ of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.front_door import environment

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.front_door


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, unpacked as pip does it, with nothing of the checkout on the path."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.split() or [str(path.relative_to(ROOT)) for path in ROOT.rglob("*.*")]:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(source)]
    subprocess.run(build, check=True)
    wheel = next(folder.glob("*.whl"))
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder / "site"), str(wheel)], check=True)
    return folder / "site"


def test_the_wheel_finds_its_own_recipes_beside_the_users(installed: Path, tmp_path: Path) -> None:
    for name in ("slurm", "recipes", "launcher"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the user\\'s own package was imported')")
    for arguments in (["recipes"], ["plan", "ticket_routing/demo", "data.rows=300", "data.cache_dir=prepared"]):
        command = [sys.executable, "-P", "-m", "launcher", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment(tmp_path, PYTHONPATH=str(installed)), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "ticket_routing" in done.stdout
    code = [sys.executable, "-P", "-c", "import launcher; print(launcher.__file__)"]
    done = subprocess.run(code, cwd=tmp_path, env={"PYTHONPATH": str(installed)}, capture_output=True, text=True)
    assert str(installed) in done.stdout
    for name in ("dist_train/templates/report.html.j2", "recipes/ticket_routing/demo.yaml"):
        assert (installed / name).is_file()
