"""Memory and time of `dist-train prepare`, over all its processes.

    python -m benchmarks.prepare_memory ticket_routing/demo data.rows=20000000 data.cache_dir=/tmp/scale-cache

Reads RssAnon (memory that no file backs) of the command and all below it each second, and prints one JSON line.
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
    command = [sys.executable, "-m", "launcher", "prepare", *sys.argv[1:]]
    process = subprocess.Popen(command, stdout=sys.stderr)
    peak = peak_at = samples = 0.0
    while process.poll() is None:
        total = sum(_anonymous(pid) for pid in _family(process.pid))
        samples += 1
        if total > peak:
            peak, peak_at = total, time.monotonic() - began
        time.sleep(1.0)
    figures = {
        "arguments": sys.argv[1:],
        "exit_code": process.returncode,
        "seconds": round(time.monotonic() - began, 1),
        "peak_rss_anon_gib": round(peak / 2**30, 3),
        "peak_after_s": round(peak_at, 1),
        "samples": int(samples),
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
