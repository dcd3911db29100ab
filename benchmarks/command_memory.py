"""Memory and time of a dist-train command, over all its processes.

    python -m benchmarks.command_memory prepare ticket_routing/demo data.rows=20000000 data.cache_dir=/tmp/scale-cache
    python -m benchmarks.command_memory run defect_detection/demo data.images=50000 data.size_px=256 name=many \
        data.cache_dir=/tmp/many-images train.epochs=null train.steps=300

Reads RssAnon (memory that no file backs) of the command and all below it each second, and prints one JSON line: its
peak, and the peaks of each tenth of the time, which show whether it grows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    began = time.monotonic()
    command = [sys.executable, "-m", "launcher", *sys.argv[1:]]
    process = subprocess.Popen(command, stdout=sys.stderr)
    seen: list[float] = []
    while process.poll() is None:
        seen.append(sum(_anonymous(pid) for pid in _family(process.pid)) / 2**30)
        time.sleep(1.0)
    tenth = max(1, -(-len(seen) // 10))
    figures = {
        "arguments": sys.argv[1:],
        "exit_code": process.returncode,
        "seconds": round(time.monotonic() - began, 1),
        "peak_rss_anon_gib": round(max(seen), 3),
        "peaks_of_tenths_gib": [round(max(seen[at : at + tenth]), 3) for at in range(0, len(seen), tenth)],
        "cores": len(os.sched_getaffinity(0)),
    }
    print(json.dumps(figures), flush=True)
    sys.exit(process.returncode)


def _family(root: int) -> list[int]:
    """A process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        fields = _fields(status)
        if "PPid" in fields:
            parents.setdefault(int(fields["PPid"]), []).append(int(status.parent.name))
    family = [root]
    for pid in family:
        family.extend(parents.get(pid, []))
    return family


def _anonymous(pid: int) -> int:
    """Bytes; 0 for a process that has ended."""
    return 1024 * int(_fields(Path(f"/proc/{pid}/status")).get("RssAnon", "0").split()[0])


def _fields(status: Path) -> dict[str, str]:
    try:
        lines = status.read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


if __name__ == "__main__":
    main()
