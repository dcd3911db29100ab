"""Start the ranks, forward signals to them, find out why they ended, leave none behind."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil

from dist_train.errors import (
    CrashError,
    HangError,
    KilledError,
    StoppedError,
    UnmeasuredError,
    error_for_code,
)
from dist_train.events import read_lines
from dist_train.heartbeat import waited_in_vain
from dist_train.rundir import RunDir, storage_error
from dist_train.stop import ONE_WISH_S

_PR_SET_PDEATHSIG = 1
_POLL_S = 0.1
# How long the other ranks may take to end by themselves once one has died.
_GRACE_S = 10.0
# How long the stacks of all threads may take to be written.
_STACKS_S = 1.0
# A rank's own report of its failure needs so much.
_LEAST_FREE_BYTES = 4096
_TAIL_BYTES = 1 << 20
_LAST_LINES = 8
# What torchrun writes into launcher.log.
_FAILED_FIRST = re.compile(rb"failed \(exitcode: (-?\d+)\) local_rank: \d+ \(pid: (\d+)\)")
# NCCL's watchdog ends its process when a collective takes too long, and says so in the log alone.
_TIMED_OUT = b"Watchdog caught collective operation timeout"


@dataclass
class Ranks:
    """What the events of this attempt say about its ranks."""

    pids: dict[int, int] = field(default_factory=dict)
    finished: set[int] = field(default_factory=set)
    failures: list[dict[str, object]] = field(default_factory=list)


def read_ranks(run: RunDir, attempt: int) -> Ranks:
    ranks = Ranks()
    for record in read_lines(run.events):
        if record.get("attempt") != attempt:
            continue
        if record["event"] == "rank_started":
            ranks.pids[int(record["rank"])] = int(record["pid"])
        elif record["event"] == "rank_finished":
            ranks.finished.add(int(record["rank"]))
        elif record["event"] == "failed":
            ranks.failures.append(record)
    return ranks


class Supervisor:
    """Runs one attempt to its end."""

    def __init__(self, run: RunDir, attempt: int, own_script: bool = False) -> None:
        """own_script: the ranks run a script of the user's, which saves and goes on in its own ways."""
        self.run = run
        self.attempt = attempt
        self.own_script = own_script
        self.asked_to_stop = 0
        self._asked_at = -ONE_WISH_S
        self._events_size = -1
        self._ranks = Ranks()
        self._vanished: dict[int, int] = {}
        self._died_at: float | None = None

    def run_to_end(self, command: list[str], environment: dict[str, str], watch: Callable[[], None]) -> None:
        """Start `command` and wait, calling `watch` often. Returns when all went well, else raises the cause."""
        # nohup has SIGHUP ignored, and that stays so.
        under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        heard = [number for number in _FORWARDED if not (number == signal.SIGHUP and under_nohup)]
        previous = {number: signal.signal(number, self._on_signal) for number in heard}
        self.run.events.touch()
        try:
            with open(self.run.launcher_log, "ab") as stream:
                # A session of its own: Ctrl-C on the terminal reaches only us, and we tell the ranks.
                child = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    start_new_session=True,
                    preexec_fn=functools.partial(_die_with, os.getpid()),
                )
            try:
                self._wait(child, watch)
            except HangError:
                self._have_stacks_written()
                raise
            finally:
                self._kill_all(child)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        watch()
        self._raise_cause(child.returncode)

    def _wait(self, child: subprocess.Popen[bytes], watch: Callable[[], None]) -> None:
        forwarded = 0
        while child.poll() is None:
            self._look()
            if self.asked_to_stop > forwarded:
                forwarded = self.asked_to_stop
                if forwarded == 1:
                    what = "the ranks are told to end" if self.own_script else "the step under way is ended and saved"
                    print(f"stopping: {what}; once more to end at once.", flush=True)
                self._tell_ranks(signal.SIGTERM if forwarded == 1 else signal.SIGKILL)
                if forwarded > 1 or not self._ranks.pids:
                    return
            if (self._vanished or self._ranks.failures) and self._died_at is None:
                self._died_at = time.monotonic()
                if any(record["code"] == HangError.exit_code for record in self._ranks.failures):
                    self._have_stacks_written()
            if self._died_at is not None and time.monotonic() - self._died_at > _GRACE_S:
                return
            watch()
            time.sleep(_POLL_S)
        self._look()

    def _look(self) -> None:
        """Read new events, and note ranks that are gone without having said why."""
        size = self.run.events.stat().st_size
        if size != self._events_size:
            self._ranks, self._events_size = read_ranks(self.run, self.attempt), size
        explained = self._ranks.finished | {int(str(record["rank"])) for record in self._ranks.failures}
        for rank, pid in self._ranks.pids.items():
            if rank not in explained and rank not in self._vanished and not _alive(pid):
                # It may have written its last event after we read them.
                self._ranks = read_ranks(self.run, self.attempt)
                said = self._ranks.finished | {int(str(record["rank"])) for record in self._ranks.failures}
                if rank not in said:
                    self._vanished[rank] = pid

    def _tell_ranks(self, number: signal.Signals) -> None:
        for pid in self._ranks.pids.values():
            _kill(pid, number)

    def _have_stacks_written(self) -> None:
        """Of every rank into its own log. One that was stopped has to go on for it."""
        self._tell_ranks(signal.SIGUSR2)
        self._tell_ranks(signal.SIGCONT)
        time.sleep(_STACKS_S)

    def _kill_all(self, child: subprocess.Popen[bytes]) -> None:
        self._look()
        for pid in [*self._ranks.pids.values(), child.pid]:
            _kill(pid, signal.SIGKILL)
        child.wait()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Whoever ends a whole job sends TERM to all of its processes, and may send it twice. Ctrl-C is typed.
        is_echo = number != signal.SIGINT and time.monotonic() - self._asked_at < ONE_WISH_S
        self._asked_at = time.monotonic()
        if not is_echo:
            self.asked_to_stop += 1

    def _raise_cause(self, returncode: int) -> None:
        ranks = read_ranks(self.run, self.attempt)
        # A rank that names a cause knows more than the ranks that lost it: those only saw a broken connection.
        for record in ranks.failures:
            code = int(str(record["code"]))
            if code != CrashError.exit_code:
                raise error_for_code(code)(str(record["message"]))
        done = bool(ranks.pids) and ranks.finished == set(ranks.pids)
        if self.own_script and not done:
            self._raise_cause_of_script(ranks)
        if self._vanished and shutil.disk_usage(self.run.path).free < _LEAST_FREE_BYTES:
            # Its last words found no room.
            raise storage_error(self.run.events, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        timed_out = [
            rank for rank in self._vanished if not self.own_script and _TIMED_OUT in _tail(self.run.rank_log(rank))
        ]
        if timed_out:
            raise waited_in_vain(self.run, timed_out[0], timed_out)
        if self._vanished and not (self.asked_to_stop > 1):
            rank, pid = next(iter(self._vanished.items()))
            if self.asked_to_stop:
                raise StoppedError(
                    f"asked to stop, but rank {rank} (process {pid}) was killed before all was saved.\n"
                    f"{self._what_next(rank)}"
                )
            raise KilledError(
                f"rank {rank} (process {pid}) was killed from outside, without a word: out of memory, perhaps, or "
                f"kill -9.\n{self._what_next(rank)}"
            )
        if ranks.failures:
            record = ranks.failures[0]
            kind = StoppedError if self.asked_to_stop else CrashError
            raise kind(f"{record['message']}\n{self._what_next(int(str(record['rank'])))}")
        if done:
            return  # whatever ended the process that started them
        if self.asked_to_stop:
            saved = any(self.run.checkpoints.glob("step-*"))
            kept = "at once; the newest checkpoint is kept" if saved else "before a step was saved"
            raise StoppedError(f"ended {kept}. Go on with: dist-train resume {self.run.path}")
        if returncode != 0:
            raise CrashError(f"the ranks could not be started (exit status {returncode}); see {self.run.launcher_log}.")

    def _raise_cause_of_script(self, ranks: Ranks) -> None:
        """A script dies of the SIGTERM with which torchrun ends the others, so torchrun says who failed first."""
        if self.asked_to_stop:
            raise StoppedError(f"the ranks were ended by a signal. Their logs: {self.run.logs}")
        failed_first = _FAILED_FIRST.search(_tail(self.run.launcher_log))
        if failed_first is None:
            return
        code, pid = int(failed_first[1]), int(failed_first[2])
        rank = next((rank for rank, started in ranks.pids.items() if started == pid), None)
        said = next((record for record in ranks.failures if record["rank"] == rank), None)
        if rank is not None and said is not None:
            raise CrashError(f"{said['message']}\n{self._what_next(rank)}")
        if rank is not None:
            raise CrashError(
                f"rank {rank} (process {pid}) ended without a word, exit code {code}: killed from outside, out of "
                f"memory perhaps, or by its own native code.\n{self._what_next(rank)}"
            )

    def _what_next(self, rank: int) -> str:
        if self.own_script:
            lines = _tail(self.run.rank_log(rank)).decode(errors="replace").splitlines()[-_LAST_LINES:]
            shown = "".join(f"\n  | {line}" for line in lines)
            return f"Its last lines:{shown}\nIts log: {self.run.rank_log(rank)}"
        return (
            f"Its log: {self.run.rank_log(rank)}\n"
            f"Go on from the newest checkpoint with: dist-train resume {self.run.path}"
        )


_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def _die_with(parent: int) -> None:
    """In the child, before it becomes the command: the kernel kills it when we die, whatever kills us."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(CrashError.exit_code)  # we died before the kernel was told


def start_detached(command: list[str], log: Path) -> int:
    """Start a command of our own that outlives this one and its terminal; what it says goes to the end of `log`.
    Returns its process id."""
    with open(log, "ab") as stream:
        child = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONSAFEPATH": "1"},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            # A shell's background job ignores Ctrl-C, and what it starts inherits that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
    return child.pid


def run_together(commands: list[list[str]], environment: dict[str, str]) -> None:
    """Run commands of our own beside each other to their ends. When one fails the others are ended, and its cause is
    raised: the last block that it wrote to standard error."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        try:
            for index, command in enumerate(commands):
                with open(Path(folder) / str(index), "wb") as stream:
                    ends_with_us = functools.partial(_die_with, os.getpid())
                    children.append(
                        subprocess.Popen(
                            command,
                            env=environment,
                            stdin=subprocess.DEVNULL,
                            stdout=sys.stderr,  # the answers have standard output for themselves
                            stderr=stream,
                            preexec_fn=ends_with_us,
                        )
                    )
            while any(child.poll() is None for child in children) and not any(child.returncode for child in children):
                time.sleep(_POLL_S / 2)
        finally:
            for child in children:
                child.kill()
                child.wait()
        failed = next((index for index, child in enumerate(children) if child.returncode > 0), None)
        killed = next((index for index, child in enumerate(children) if child.returncode < 0), None)
        if failed is None and killed is None:
            return
        guilty = killed if failed is None else failed
        assert guilty is not None
        code, words = children[guilty].returncode, _tail(Path(folder) / str(guilty)).decode(errors="replace").strip()
    kind = error_for_code(code)
    if kind is CrashError:
        raise CrashError(
            f"a process of our own ended with {code}: {words or 'killed from outside, out of memory perhaps'}"
        )
    raise kind(words.rpartition(f"{kind.title}: ")[2])


def run_measurement(command: list[str], what: str, environment: dict[str, str]) -> None:
    """Run a command of our own to its end. UnmeasuredError with its last words when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UnmeasuredError(f"{what}: {words[-1]}")


def read_output(command: list[str]) -> str | None:
    """What a short command prints; None when it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _tail(path: Path) -> bytes:
    """The end of a log; empty when there is none."""
    try:
        with open(path, "rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
            return stream.read()
    except OSError:
        return b""


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _kill(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
        os.kill(pid, number)
