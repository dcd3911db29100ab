"""The rules of the house: one direction of imports, small files, torch-free modules that are torch-free."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("launcher", "slurm", "dist_train", "recipes")
# What each package may import of the others.
ALLOWED = {"launcher": {"slurm", "dist_train"}, "slurm": {"dist_train"}, "recipes": {"dist_train"}, "dist_train": set()}
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    parts = path.relative_to(ROOT).parts
    for name in _imports(path):
        top = name.split(".")[0]
        if top in PACKAGES and top != parts[0]:
            assert top in ALLOWED[parts[0]], f"{path} imports {name}"
        if parts[0] == "recipes" and top == "recipes":
            assert name.split(".")[1:2] == [parts[1]], f"{path} imports another recipe: {name}"


def test_only_the_engine_imports_accelerate() -> None:
    wrapped = {"accelerate", "deepspeed"}
    users = {path.name for path in SOURCES if wrapped & {name.split(".")[0] for name in _imports(path)}}
    assert users == {"engine.py"}


def test_only_process_starts_other_programs() -> None:
    users = {path.name for path in SOURCES if "subprocess" in _imports(path)}
    assert users <= {"process.py", "doctor.py", "client.py"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 80, f"{path}:{node.lineno} {node.name}"


def test_the_launcher_and_all_that_it_imports_are_free_of_torch() -> None:
    modules = [f"launcher.{path.stem}" for path in (ROOT / "launcher").glob("*.py") if path.stem != "__main__"]
    modules += ["recipes.ticket_routing.config", "recipes.ticket_routing.data", "recipes.ticket_routing.score"]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_help_imports_neither_torch_nor_pydantic() -> None:
    code = (
        "import sys; sys.argv = ['dist-train', '--help']\n"
        "from launcher.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'torch', 'pydantic', 'numpy', 'rich'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == 0


def test_the_readme_names_every_source_file() -> None:
    readme = (ROOT / "README.md").read_text()
    for path in SOURCES:
        assert path.name == "__init__.py" or f"  {path.name} " in readme, f"{path} is missing in the README's tree"
