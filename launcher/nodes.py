"""One launch on several nodes: node 0 leads, the others follow. Each starts and watches the ranks of its own machine.

Before the ranks start, every node holds what it has against what node 0 says: world size, code, packages, config and
data. Afterwards each says how its ranks ended, and node 0 what comes next.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dist_train.errors import (
    ConfigError,
    CrashError,
    HangError,
    KilledError,
    NodeLostError,
    Preempted,
    StoppedError,
    ToolkitError,
    error_for_code,
)
from dist_train.events import log_event
from dist_train.hardware import detect_hardware
from dist_train.rundir import RunDir
from launcher.accelerate_config import Rendezvous
from launcher.meeting import MEETING_S, Link, Meeting, Message, call, free_port, interface_towards
from launcher.node_facts import check, facts_of
from launcher.process import Supervisor

# How long the other nodes may take to say how their ranks ended, once they are told to end them.
_LAST_WORDS_S = 30.0
# The same where those of node 0 have failed: long enough that a cause which lies elsewhere is heard.
_OWN_WORDS_S = 12.0
# How long who has not come yet is awaited, to be told that all is over.
_LATE_S = 15.0
_POLL_S = 0.2


@dataclass(frozen=True)
class Place:
    """Which of the nodes of a launch this machine is, and where they meet."""

    node_rank: int
    nodes: int
    host: str
    """Of node 0, a name or an address."""
    port: int


def place_by_hand(nodes: int | None, node_rank: int | None, head: str | None) -> Place | None:
    """This machine's place by the options of the command; None for one machine. ConfigError for half of them."""
    if node_rank is None and head is None:
        return None
    if node_rank is None or head is None or nodes is None or nodes < 2:
        raise ConfigError(
            "several machines need all of --nodes N (2 or more), --node-rank R and --head HOST:PORT, on each of them."
        )
    host, colon, port = head.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--head is {head}, but must be HOST:PORT, for example {socket.gethostname()}:29400.")
    if not 0 <= node_rank < nodes:
        raise ConfigError(f"--node-rank is {node_rank}, but {nodes} nodes have the ranks 0 to {nodes - 1}.")
    return Place(node_rank, nodes, host, int(port))


@dataclass(frozen=True)
class Notices:
    """What nodes can tell each other before they meet, where they share a folder."""

    announce: Callable[[int], None] = lambda port: None
    """Node 0 says at which port it listens."""
    hear: Callable[[], None] = lambda: None
    """Node 0 looks whether a node cannot come, and raises why."""


StartRanks = Callable[[RunDir, int, Sequence[str], Rendezvous, Callable[[], None]], None]
"""Starts this node's ranks of an attempt, with arguments for them, and waits, calling the last argument often."""


class Team:
    """The nodes of a launch, as node 0 leads them."""

    def __init__(self, place: Place, typed: Sequence[str], notices: Notices) -> None:
        self.place, self._notices = place, notices
        self._typed = list(typed)
        self._meeting = Meeting(place.nodes, place.port)
        self._ended: dict[int, Message] = {}
        self._crashed_at: float | None = None
        self._attempt = 0

    @property
    def port(self) -> int:
        return self._meeting.port

    def begin(self, run: RunDir, attempt: int, arguments: Sequence[str]) -> Rendezvous:
        """Have every node check what it has, and start. The first refusal is raised, and told to all."""
        meeting, place = self._meeting, self.place
        self._ended.clear()
        self._crashed_at, self._attempt = None, attempt
        meeting.wait_for_all(look=self._notices.hear)
        for rank, hello in sorted(meeting.hellos.items()):
            if hello.get("typed") != self._typed:
                raise ConfigError(
                    f"node {rank} ({hello['host']}) was started with other words than node 0: {hello.get('typed')}, "
                    f"here {self._typed}. Type the same on every node, but for --node-rank."
                )
        facts = facts_of(run)
        hosts = [socket.gethostname(), *(meeting.host(rank) for rank in range(1, place.nodes))]
        each = facts["processes_per_node"]
        shown = "; ".join(f"{host}: ranks {rank * each} to {(rank + 1) * each - 1}" for rank, host in enumerate(hosts))
        print(f"nodes          {shown}", flush=True)
        log_event(run.events, "nodes", attempt=attempt, hosts=hosts, ranks_each=each)
        port = free_port()
        order = {"run": str(run.path), "attempt": attempt, "arguments": list(arguments), "port": port, **facts}
        meeting.tell({"order": order})
        ready: set[int] = set()
        deadline = time.monotonic() + MEETING_S
        while len(ready) < place.nodes - 1:
            for rank, answer in self._news():
                if answer is None:
                    raise NodeLostError(f"node {rank} ({meeting.host(rank)}) was lost while it checked what it has.")
                if "refused" in answer:
                    raise error_for_code(answer["refused"])(str(answer["message"]))
                ready.add(rank)
            if len(ready) < place.nodes - 1 and time.monotonic() > deadline:
                silent = [f"{rank} ({meeting.host(rank)})" for rank in range(1, place.nodes) if rank not in ready]
                raise NodeLostError(f"node {', '.join(silent)} did not say within {MEETING_S:.0f} s what it has.")
            time.sleep(_POLL_S / 4)
        meeting.tell({"go": True})
        return Rendezvous(0, place.host, port, meeting.interface())

    def look(self) -> None:
        """Called often while the own ranks run. Raises what happened elsewhere, so that they are ended."""
        for rank, message in self._news():
            if message is None:
                raise self._lost(rank)
            self._ended[rank] = message
            code = message["ended"]
            if message.get("killed") or code not in (0, Preempted.exit_code, CrashError.exit_code):
                raise _error_of(message)
            if code == CrashError.exit_code and self._crashed_at is None:
                self._crashed_at = time.monotonic()
        # Ranks that wait for one that crashed may not notice: NCCL's do after parallel.timeout_s.
        if self._crashed_at is not None and time.monotonic() - self._crashed_at > _OWN_WORDS_S:
            raise max((_error_of(message) for message in self._ended.values() if message["ended"]), key=_weight)

    def _news(self) -> list[tuple[int, Message | None]]:
        """What was said of this attempt since the last look; None of a node that is lost."""
        found = self._meeting.news().items()
        return [(rank, said) for rank, said in found if said is None or said.get("attempt") == self._attempt]

    def settle(self, own: ToolkitError | None) -> None:
        """When the own ranks have ended: wait for the others, and raise the cause that explains the rest."""
        # Where all is well they may have more to do, as ranks of one machine may.
        self._hear(None if own is None else _OWN_WORDS_S)
        silent = self._silent()
        if silent:
            # Their ranks may wait for ours, or be stopped.
            code, words = (CrashError.exit_code, "its ranks have ended") if own is None else (own.exit_code, str(own))
            self._meeting.tell({"stop": code, "message": words, "attempt": self._attempt}, silent)
            self._hear(_LAST_WORDS_S)
        lost: list[ToolkitError] = [self._lost(rank) for rank in self._silent()]
        errors = [_error_of(message) for message in self._ended.values() if message.get("ended")]
        errors = [error for error in (own, *errors, *lost) if error is not None]
        if errors:
            raise max(errors, key=_weight)

    def _hear(self, timeout_s: float | None) -> None:
        """Until every node has said how its ranks ended, or is lost."""
        deadline, lost = time.monotonic() + (timeout_s or 0.0), set[int]()
        while set(self._silent()) - lost and (timeout_s is None or time.monotonic() < deadline):
            for rank, message in self._news():
                if message is None:
                    lost.add(rank)
                else:
                    self._ended[rank] = message
            time.sleep(_POLL_S)

    def _silent(self) -> list[int]:
        return [rank for rank in range(1, self.place.nodes) if rank not in self._ended]

    def close(self, error: BaseException | None) -> None:
        """Tell all how it ended."""
        told = error
        if error is not None and not isinstance(error, ToolkitError):
            told = StoppedError("stopped") if isinstance(error, KeyboardInterrupt) else CrashError(repr(error))
        if told is not None:
            # Who comes later would wait for somebody who is no more.
            with contextlib.suppress(ConfigError):
                self._meeting.wait_for_all(_LATE_S)
        code = told.exit_code if isinstance(told, ToolkitError) else 0
        self._meeting.tell({"end": code, "message": str(told or "")})
        time.sleep(_POLL_S)
        self._meeting.close()

    def _lost(self, rank: int) -> ToolkitError:
        return NodeLostError(
            f"node {rank} ({self._meeting.host(rank)}) is gone: its launcher ended, or it cannot be reached any more."
        )


@contextlib.contextmanager
def leading(place: Place | None, typed: Sequence[str], notices: Notices | None = None) -> Iterator[Team | None]:
    """The team of node 0, which hears of the end however it comes. None for one node. typed: see `follow`."""
    if place is None:
        yield None
        return
    notices = notices or Notices()
    team = Team(place, typed, notices)
    try:
        notices.announce(team.port)
        yield team
    except BaseException as error:
        team.close(error)
        raise
    team.close(None)


def lead(
    supervisor: Supervisor,
    command: list[str],
    environment: dict[str, str],
    watch: Callable[[], None],
    team: Team | None,
) -> None:
    """Run the own ranks to their end, and where there are others, theirs. Raises the cause that explains the rest."""
    if team is None:
        supervisor.run_to_end(command, environment, watch)
        return

    def look() -> None:
        watch()
        team.look()

    own: ToolkitError | None = None
    try:
        supervisor.run_to_end(command, environment, look)
    except ToolkitError as error:
        own = error
    team.settle(own)


def follow(place: Place, start_ranks: StartRanks, typed: Sequence[str]) -> None:
    """Do what node 0 says, to the end that it names. typed: what is to be run, as node 0 must have it too."""
    host = socket.gethostname()
    hello = {"node_rank": place.node_rank, "nodes": place.nodes, "host": host, "typed": list(typed)}
    link = call(place.host, place.port, hello)
    print(f"node {place.node_rank} ({host}) waits for node 0 at {place.host}:{place.port}", flush=True)
    order: dict[str, Any] = {}
    try:
        while True:
            message = _next(link, place)
            if "order" in message:
                order = message["order"]
                link.send({**_checked(order, place), "attempt": order["attempt"]})
            elif "go" in message:
                over: Message = {}
                link.send({**_one_attempt(order, place, link, start_ranks, over), "attempt": order["attempt"]})
                if over:
                    raise error_for_code(over["end"])(f"node 0 ended it: {over['message']}")
            elif "refused" in message:
                raise error_for_code(message["refused"])(str(message["message"]))
            elif message.get("end"):
                raise error_for_code(message["end"])(f"node 0 ended it: {message['message']}")
            elif "end" in message:
                return
    finally:
        link.close()


def _checked(order: dict[str, Any], place: Place) -> Message:
    """This node's answer to an order."""
    try:
        check(order, _me(place), detect_hardware())
    except ToolkitError as error:
        return {"refused": error.exit_code, "message": str(error)}
    except Exception as error:
        return {"refused": CrashError.exit_code, "message": f"{_me(place)}: {type(error).__name__}: {error}"}
    return {"ready": True}


def _one_attempt(order: dict[str, Any], place: Place, link: Link, start_ranks: StartRanks, over: Message) -> Message:
    """Start the own ranks and wait for them. Returns how it ended; over: takes node 0's last word, if it came."""
    run = RunDir(order["run"], place.node_rank)

    def look() -> None:
        with contextlib.suppress(TimeoutError):
            message = link.receive(0)
            if message is None:
                raise NodeLostError("node 0 is gone: its launcher ended, or it cannot be reached any more.")
            over.update(message if message.get("end") else {})
            code = message.get("stop") or message.get("end") or CrashError.exit_code
            raise error_for_code(code)(f"node 0: {message.get('message')}")

    rendezvous = Rendezvous(place.node_rank, place.host, order["port"], interface_towards(place.host))
    try:
        start_ranks(run, order["attempt"], order["arguments"], rendezvous, look)
    except ToolkitError as error:
        killed = isinstance(error, KilledError)
        return {"ended": error.exit_code, "message": f"{_me(place)}: {error}", "killed": killed}
    return {"ended": 0}


def _next(link: Link, place: Place) -> Message:
    """Wait for node 0; it may prepare data for long, but it is never silent."""
    while True:
        with contextlib.suppress(TimeoutError):
            message = link.receive(1.0)
            if message is None:
                raise NodeLostError(
                    f"{_me(place)}: node 0 is gone: its launcher ended, or it cannot be reached any more."
                )
            return message


def _error_of(message: Message) -> ToolkitError:
    kind = KilledError if message.get("killed") else error_for_code(int(message["ended"]))
    return kind(str(message["message"]))


def _weight(error: ToolkitError) -> int:
    """What explains most: a cause that a rank named, a rank that was killed, a node that is gone, a lost connection."""
    if isinstance(error, KilledError):
        return 3
    if isinstance(error, HangError):
        return 2
    return {CrashError.exit_code: 1, Preempted.exit_code: 0}.get(error.exit_code, 4)


def _me(place: Place) -> str:
    return f"node {place.node_rank} ({socket.gethostname()})"
