"""A connection that waits for its client, but not for ever: whoever sends or reads too slowly is cut off."""

import errno
import math
import socket
import time
from typing import TYPE_CHECKING, Any, Final

from api.seats import Seats
from shared.errors import LoradError

if TYPE_CHECKING:
    from socket import _SendableFile

    from _typeshed import ReadableBuffer

BODY_S: Final = 15.0
"""How long a request's body may keep a thread waiting beyond what its bytes have earned."""
BODY_BYTES_PER_S: Final = 8 << 10
"""Bytes that earn a second of waiting; so this is the slowest upload."""
CROWDED_S: Final = 1.0
"""How long a body may keep a thread waiting at a time while as many threads as may wait for bodies already do."""
ANSWER_S: Final = 60.0
"""How long a piece of an answer may take to be read."""


class ClientTooSlow(LoradError, TimeoutError):
    """The request's body came too slowly."""

    code = "request_timeout"


class PatientSocket(socket.socket):
    """A socket whose `recv` spends patience and whose `sendall` and `sendfile` end after ANSWER_S.

    Patience is a bucket of BODY_S seconds: waiting empties it, bytes fill it at 1 s per BODY_BYTES_PER_S, never beyond
    the brim. So only time spent on waiting for the client counts, a long upload at a fair rate goes through, and bytes
    that trickle do not. Who waits without one of the `seats` has CROWDED_S. In non-blocking mode all is as with any
    socket.
    """

    def __init__(self, connection: socket.socket, seats: Seats) -> None:
        """Takes the connection over; the other object is left without one."""
        super().__init__(connection.family, connection.type, connection.proto, fileno=connection.detach())
        self._seats = seats
        self._patience_s = BODY_S

    def be_patient(self, seconds: float = BODY_S) -> None:
        """From now on the client has so much patience; a new request begins with all of it."""
        self._patience_s = seconds

    def setblocking(self, flag: bool, /) -> None:
        """True means to block for ANSWER_S at most."""
        self.settimeout(ANSWER_S if flag else 0.0)

    def take(self, size: int) -> bytes:
        """What is there already, b'' at the end; raises BlockingIOError if nothing is, and costs no patience."""
        return super().recv(size, socket.MSG_DONTWAIT)

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        """Up to `size` bytes; raises ClientTooSlow once patience is at an end."""
        limit_s = self.gettimeout()
        if limit_s == 0:
            return super().recv(size, flags)
        wait_s = min(self._patience_s, math.inf if limit_s is None else limit_s)
        if wait_s <= 0:
            raise ClientTooSlow
        began = time.monotonic()
        try:
            with self._seats.taken() as seated:
                self.settimeout(wait_s if seated else min(wait_s, CROWDED_S))
                piece = super().recv(size, flags)
        except TimeoutError:
            raise ClientTooSlow from None
        finally:
            self._patience_s -= time.monotonic() - began
            self.settimeout(limit_s)
        self._patience_s = min(BODY_S, self._patience_s + len(piece) / BODY_BYTES_PER_S)
        return piece

    def sendall(self, data: "ReadableBuffer", flags: int = 0, /) -> None:
        """All of `data`; BrokenPipeError, as from a client that has gone, if it is not read in time."""
        try:
            super().sendall(data, flags)
        except TimeoutError:
            raise _not_read() from None

    def sendfile(self, file: "_SendableFile", offset: int = 0, count: int | None = None) -> int:
        """Part of a file; BrokenPipeError if nothing of it is read for ANSWER_S."""
        try:
            return super().sendfile(file, offset, count)
        except TimeoutError:
            raise _not_read() from None


def is_patient(environ: "dict[str, Any]") -> bool:
    """True if the request came over a connection whose server lets it linger after an answer."""
    return isinstance(environ.get("gunicorn.socket"), PatientSocket)


def _not_read() -> BrokenPipeError:
    return BrokenPipeError(errno.EPIPE, "the client does not read its answer")
