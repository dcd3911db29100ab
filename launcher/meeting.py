"""How the launchers of several nodes find each other and stay in touch: JSON lines over TCP. Torch-free.

Node 0 listens, the others call. What is said: hello, order, ready or refused, go; then ended, and the next order or the
end. Each side also says every other second that it lives, so that a node that is cut off is noticed on both sides.
"""

from __future__ import annotations

import contextlib
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Collection
from typing import Any

import psutil

from dist_train.errors import ConfigError

MEETING_S = 60.0
"""Longest wait for the other nodes, and for what they check before the ranks start."""
# A name that is not known by then will not be.
_NAME_S = 10.0
_BEAT_S = 2.0
# A node that was silent for so long is cut off, stopped or gone.
_SILENT_S = 20.0
_MOST_BYTES = 1 << 20
Message = dict[str, Any]


class Link:
    """One connection. Messages are read by a thread; None stands for a connection that is lost."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self.own_address: str = connection.getsockname()[0].removeprefix("::ffff:")
        self._socket.settimeout(_SILENT_S)
        self._inbox: queue.Queue[Message | None] = queue.Queue()
        self._write = threading.Lock()
        self._closed = threading.Event()
        self.is_lost = False
        threading.Thread(target=self._read, name="node-read", daemon=True).start()
        threading.Thread(target=self._beat, name="node-beat", daemon=True).start()

    def send(self, message: Message) -> None:
        """What cannot be sent is noticed by the reader: the connection is lost."""
        with contextlib.suppress(OSError), self._write:
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout_s: float) -> Message | None:
        """The next message; None when the connection is lost. TimeoutError when nothing came."""
        try:
            message = self._inbox.get(timeout=timeout_s) if timeout_s > 0 else self._inbox.get_nowait()
        except queue.Empty:
            raise TimeoutError from None
        if message is None:
            self._inbox.put(None)  # for whoever asks again
        return message

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError), self._socket.makefile("rb") as stream:
            while line := stream.readline(_MOST_BYTES):
                message = json.loads(line)
                if "beat" not in message:
                    self._inbox.put(message)
        self.is_lost = True
        self._inbox.put(None)

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT_S):
            self.send({"beat": True})


class Meeting:
    """Node 0's side."""

    def __init__(self, nodes: int, port: int) -> None:
        """Listen on `port`, or on any free one if it is 0. ConfigError when it is taken."""
        self.nodes = nodes
        self.links: dict[int, Link] = {}
        self.hellos: dict[int, Message] = {}
        self._changed = threading.Condition()
        try:
            self._listener = socket.create_server(("", port), backlog=nodes)
        except OSError as error:
            raise ConfigError(
                f"port {port} of {socket.gethostname()}, where the nodes are to meet, cannot be used: "
                f"{error.strerror}. Give another one: --head HOST:PORT."
            ) from error
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name="node-accept", daemon=True).start()

    def wait_for_all(self, timeout_s: float | None = None, look: Callable[[], None] = lambda: None) -> None:
        """ConfigError that names the nodes that did not come. look: called every second meanwhile."""
        deadline = time.monotonic() + (timeout_s or MEETING_S)
        with self._changed:
            while len(self.hellos) < self.nodes - 1 and time.monotonic() < deadline:
                look()
                self._changed.wait(min(1.0, max(0.0, deadline - time.monotonic())))
            missing = [rank for rank in range(1, self.nodes) if rank not in self.hellos]
            here = ", ".join(f"{rank} ({hello['host']})" for rank, hello in sorted(self.hellos.items())) or "none"
        if missing:
            raise ConfigError(
                f"node {', '.join(map(str, missing))} of {self.nodes} did not come to "
                f"{socket.gethostname()}:{self.port} within {MEETING_S:.0f} s; beside node 0 there are: {here}. Look "
                "whether the command runs there, and whether that address can be reached from there."
            )

    def tell(self, message: Message, ranks: Collection[int] | None = None) -> None:
        """All the others, or some."""
        for rank, link in self.links.items():
            if ranks is None or rank in ranks:
                link.send(message)

    def news(self) -> dict[int, Message | None]:
        """What has come since the last look, by node; None for one that is lost."""
        found: dict[int, Message | None] = {}
        for rank, link in sorted(self.links.items()):
            with contextlib.suppress(TimeoutError):
                found[rank] = link.receive(0)
        return found

    def interface(self) -> str | None:
        """This machine's network interface that the others have reached it on."""
        return _interface_of(next(iter(self.links.values())).own_address) if self.links else None

    def host(self, rank: int) -> str:
        return str(self.hellos[rank]["host"])

    def close(self) -> None:
        self._listener.close()
        for link in self.links.values():
            link.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._welcome, args=(Link(connection),), name="node-hello", daemon=True).start()

    def _welcome(self, link: Link) -> None:
        try:
            hello = link.receive(MEETING_S)
        except TimeoutError:
            hello = None
        rank = hello.get("node_rank") if hello else None
        if not hello or not isinstance(rank, int) or not isinstance(hello.get("host"), str):
            link.close()  # no launcher of ours
            return
        with self._changed:
            problem = None
            if hello.get("nodes") != self.nodes:
                problem = f"has nodes={hello.get('nodes')}, but node 0 has {self.nodes}"
            elif not 0 < rank < self.nodes:
                problem = f"has node rank {rank}, but the others of {self.nodes} nodes are 1 to {self.nodes - 1}"
            elif rank in self.hellos and not self.links[rank].is_lost:
                problem = f"has node rank {rank}, which {self.hellos[rank]['host']} has already"
            if problem is not None:
                link.send({"refused": ConfigError.exit_code, "message": f"{hello['host']} {problem}."})
                return
            self.links[rank], self.hellos[rank] = link, hello
            self._changed.notify_all()


def call(host: str, port: int, hello: Message) -> Link:
    """Another node's side. ConfigError when node 0 cannot be reached in time, with the last cause."""
    began, cause = time.monotonic(), ""
    deadline = began + MEETING_S
    while time.monotonic() < deadline:
        try:
            link = Link(socket.create_connection((host, port), timeout=5.0))
        except socket.gaierror as error:
            cause = f"the name cannot be resolved ({error.strerror})"
            deadline = min(deadline, began + _NAME_S)
        except OSError as error:
            cause = error.strerror or str(error)
        else:
            link.send(hello)
            return link
        time.sleep(0.5)
    raise ConfigError(
        f"node {hello['node_rank']} ({hello['host']}) could not reach node 0 at {host}:{port} in "
        f"{time.monotonic() - began:.0f} s: {cause}. Name a host and port that every node can reach: --head HOST:PORT."
    )


def interface_towards(address: str) -> str | None:
    """The network interface from which this machine reaches `address`; None where that cannot be told."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))  # sends nothing
        return _interface_of(probe.getsockname()[0])
    return None


def _interface_of(own: str) -> str | None:
    if own.startswith("127."):
        return "lo"
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if any(entry.address == own for entry in found)), None)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
