"""A TCP proxy that stands between one program and a server, and breaks what passes through it."""

import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Literal, Self

_BLOCK: Final = 1 << 16
_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER on, 0 seconds: close sends RST."""


@dataclass(eq=False)
class _Pair:
    """A client's connection and ours to the server."""

    client: socket.socket
    server: socket.socket
    is_marked: bool = False
    drops_answers: bool = False

    def reset(self) -> None:
        """Break both connections, and wake whoever reads from them."""
        for end in (self.client, self.server):
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@dataclass(frozen=True)
class _Trap:
    after: bytes
    of: bytes
    lost: Literal["answer", "request"]


class Proxy:
    """Listens on `port` of the loopback interface and passes on to `target_port`, until told otherwise.

    Programs' connections are untouched by each other; what was broken is not mended: programs connect anew.
    """

    def __init__(self, target_port: int) -> None:
        self.latency_s = 0.0
        """What each piece waits, in each direction."""
        self.sprung = threading.Event()
        """Set once the trap of `lose` has caught something."""
        self._target_port = target_port
        self._trap: _Trap | None = None
        self._pairs: set[_Pair] = set()
        self._lock = threading.Lock()
        self._is_cut = False
        self._flowing = threading.Event()
        self._flowing.set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_cut = True
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # else `accept` would wait on
        self._listener.close()
        self._flowing.set()
        self.reset_all()

    def cut(self) -> None:
        """Break every connection, and each new one at once."""
        self._is_cut = True
        self.reset_all()

    def heal(self) -> None:
        self._is_cut = False

    def hang(self) -> None:
        """Pass nothing on, with connections open."""
        self._flowing.clear()

    def flow(self) -> None:
        """Pass on what waits, and what comes."""
        self._flowing.set()

    def reset_all(self) -> None:
        """Break the connections there are."""
        with self._lock:
            pairs = list(self._pairs)
            self._pairs.clear()
        for pair in pairs:
            pair.reset()

    def lose(self, lost: Literal["answer", "request"], *, of: bytes, after: bytes) -> None:
        """Once: on the connection that has sent `after`, break both ends at the next message that holds `of`; either
        when the server has answered it, or before the server has got it."""
        self.sprung.clear()
        self._trap = _Trap(after, of, lost)

    # -- threads

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self._is_cut:
                    raise ConnectionRefusedError
                server = socket.create_connection(("127.0.0.1", self._target_port), timeout=5)
            except OSError:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                client.close()
                continue
            server.settimeout(None)
            pair = _Pair(client, server)
            with suppress(OSError):
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._pairs.add(pair)
            if self._is_cut:
                pair.reset()
            for upward in (True, False):
                threading.Thread(target=self._pump, args=(pair, upward), name="proxy-pump", daemon=True).start()

    def _pump(self, pair: _Pair, upward: bool) -> None:
        source, sink = (pair.client, pair.server) if upward else (pair.server, pair.client)
        try:
            while data := source.recv(_BLOCK):
                self._flowing.wait()
                if self.latency_s:
                    time.sleep(self.latency_s)
                if upward and self._caught(pair, data) == "request":
                    break
                if not upward and pair.drops_answers:
                    break
                sink.sendall(data)
        except OSError:
            pass
        finally:
            pair.reset()
            with self._lock:
                self._pairs.discard(pair)

    def _caught(self, pair: _Pair, data: bytes) -> Literal["answer", "request"] | None:
        trap = self._trap
        if trap is None:
            return None
        if not pair.is_marked:
            pair.is_marked = trap.after in data
            return None
        if trap.of not in data:
            return None
        self._trap = None
        pair.drops_answers = trap.lost == "answer"
        self.sprung.set()
        return trap.lost
