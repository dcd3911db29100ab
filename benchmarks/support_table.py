"""Write the support table of docs/strategies.md from the tests: run them, and say what passed.

python -m benchmarks.support_table              # runs the tests first, some minutes
python -m benchmarks.support_table results.xml  # from a JUnit file of them
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

TESTS = (
    "tests/test_dist_train_strategies.py",
    "tests/test_dist_train_strategies_resume.py",
    "tests/test_dist_train_strategies_steps.py",
    "tests/test_recipes_defect_detection_strategies.py",
    "tests/test_recipes_recsys_strategies.py",
)
PAGE = Path("docs/strategies.md")
BEGIN, END = "<!-- support table: begin -->", "<!-- support table: end -->"
STRATEGIES = ("ddp", "zero1", "zero2", "zero3", "fsdp")
# Row of the table, and the tests of a strategy behind it.
ROWS = {
    "Transformer: losses, norms, gradients of one process, 2 and 4 ranks": r"norms_and_gradients.*\[transformer-{}-",
    "the same with tied embeddings": r"norms_and_gradients.*\[tied transformer-{}-",
    "LSTM over packed rows": r"norms_and_gradients.*\[lstm-{}-",
    "CNN with GroupNorm": r"norms_and_gradients.*\[cnn-{}-",
    "recipe `defect_detection`: its ResNet and its ConvNeXt, augmentation on": r"trains_alike.*\[\w+-{}\]",
    "recipe `recsys`: Transformer, GRU, ids alone; one item table is read and ranked": r"of_one_process\[\w+-{}\]",
    "accumulation over micro-batches": r"change_nothing\[accumulation-{}\]",
    "activation checkpointing": r"change_nothing\[activation checkpointing-{}\]",
    "batches that do not divide by the ranks": r"change_nothing\[uneven shares-{}\]",
    "offload": r"test_offload.*\[{}-",
    "torch.compile of each block": r"test_compiled.*\[{}\]",
    "one rank": r"one_rank_too\[{}\]",
    "a gradient that is not finite reaches no weight": r"not_finite.*\[{}\]",
    "goes on from the checkpoint of every other strategy": r"goes_on_from.*\[\w+-{}\]",
    "2 ranks, then 1, then 4": r"one_then_four.*\[{}\]",
}
# What no test can show, and why.
REASONS = {
    ("offload", "ddp"): "refused: needs ZeRO",
    ("offload", "fsdp"): "refused: needs ZeRO",
    ("torch.compile of each block", "zero3"): "refused: DeepSpeed's hooks fetch weights inside the block",
}


def main(arguments: list[str]) -> int:
    if arguments:
        results = _read(Path(arguments[0]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "results.xml"
            subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS, f"--junitxml={file}"], check=False)
            results = _read(file)
    lines = ["| what | " + " | ".join(STRATEGIES) + " |", "|---" * (len(STRATEGIES) + 1) + "|"]
    lines += [
        f"| {row} | " + " | ".join(_cell(row, strategy, results) for strategy in STRATEGIES) + " |" for row in ROWS
    ]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    table = "\n".join(lines)
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")
    print(table)
    return 0


def _read(file: Path) -> dict[str, bool]:
    """Whether each test passed, by name."""
    own = [test.removesuffix(".py").replace("/", ".") for test in TESTS]
    cases = [case for case in ElementTree.parse(file).getroot().iter("testcase") if case.get("classname") in own]
    return {
        case.get("name", ""): not any(child.tag in ("failure", "error", "skipped") for child in case) for case in cases
    }


def _cell(row: str, strategy: str, results: dict[str, bool]) -> str:
    pattern = re.compile(ROWS[row].format(strategy))
    found = [passed for name, passed in results.items() if pattern.search(name)]
    if not found:
        return REASONS.get((row, strategy), "not tested")
    return f"yes ({len(found)})" if all(found) else "**no**"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
