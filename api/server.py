"""gunicorn's worker class for the API: a thread per request, and no thread for a client that only connects or dawdles.

gunicorn's own thread worker reads heads of requests in its threads without a time limit, and ends connections on its
main loop, waiting up to 2 s for each. Here the main loop gathers heads and lets ended connections linger, for any
number of clients at once; `api.patience` bounds what threads wait for, and half of them at most wait long for bodies.
"""

import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from selectors import EVENT_READ
from typing import TYPE_CHECKING, Any, Final

from gunicorn.http import errors as http
from gunicorn.workers.gthread import ThreadWorker

from api.patience import PatientSocket
from api.seats import Seats

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

HEAD_S: Final = 15.0
"""How long the head of a request may take, or a connection that is not used for one yet."""
HEAD_BYTES: Final = 64 << 10
LINGER_S: Final = 2.0
"""How long the end of a connection may take: a client that still sends must hear the answer, not a reset."""
UNWANTED_S: Final = 0.2
"""How long a thread waits for the rest of a body that nobody wanted: to ask /healthz with one, nobody needs a key."""
_HEAD_END: Final = b"\r\n\r\n"
_PIECE_BYTES: Final = 64 << 10

# What gunicorn raises for heads and chunks that are none; the rest of its ParseExceptions is 400.
_REASONS: Final[dict[type[Exception], tuple[int, str]]] = {
    http.LimitRequestLine: (414, "URI Too Long"),
    http.ExpectationFailed: (417, "Expectation Failed"),
    http.LimitRequestHeaders: (431, "Request Header Fields Too Large"),
    http.UnsupportedTransferCoding: (501, "Not Implemented"),
}


@dataclass
class _Parked:
    """A connection that waits on the main loop, since and until when in monotonic time."""

    since: float
    until: float


class PatientWorker(ThreadWorker):  # type: ignore[misc]  # gunicorn has no types
    """The methods that override something are called as in ThreadWorker; `conn` is its TConn."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parked: dict[Any, _Parked] = {}
        self._body_seats = Seats(self.cfg.threads // 2)

    @classmethod
    def check_config(cls, cfg: Any, log: Any) -> None:
        """Refuse TLS: heads are gathered as they come, and a proxy in front ends TLS."""
        super().check_config(cfg, log)
        if cfg.is_ssl:
            raise RuntimeError("this worker speaks no TLS: put a proxy in front of it")

    def load_wsgi(self) -> None:
        super().load_wsgi()
        application: WSGIApplication = self.wsgi
        self.wsgi: WSGIApplication = _adapted(application)

    # -- the head of a request: main loop, then a thread

    def enqueue_req(self, conn: Any) -> None:
        """Gather the head of the connection's next request, and answer it by a thread once it is whole."""
        if not isinstance(conn.sock, PatientSocket):
            conn.sock = PatientSocket(conn.sock, self._body_seats)
        conn.sock.setblocking(False)
        conn.head = bytearray(conn.parser.unreader.take_buffered() if conn.parser else b"")
        conn.num_searched = 0
        self._park(conn, HEAD_S, self._gather)
        self._gather(conn)

    def _gather(self, conn: Any, _socket: object = None) -> None:
        try:
            while not (is_whole := self._has_whole_head(conn)) and len(conn.head) <= HEAD_BYTES:
                piece = conn.sock.take(_PIECE_BYTES)
                if not piece:
                    self._drop(conn)
                    return
                conn.head += piece
        except BlockingIOError:
            return
        except OSError:
            self._drop(conn)
            return
        self._unpark(conn)
        if is_whole:
            super().enqueue_req(conn)
        else:
            self.handle_error(None, conn.sock, conn.client, http.LimitRequestHeaders("head too large"))
            self._linger(conn)

    def _has_whole_head(self, conn: Any) -> bool:
        found = conn.head.find(_HEAD_END, max(0, conn.num_searched - len(_HEAD_END)))
        conn.num_searched = len(conn.head)
        return bool(found >= 0)

    def handle(self, conn: Any) -> Any:
        """Runs in a thread."""
        conn.sock.be_patient()
        conn.init()
        conn.parser.unreader.unread(bytes(conn.head))
        conn.head = b""
        return super().handle(conn)

    def _keepalive_after(self, conn: Any, keepalive: Any) -> bool:
        """Read off a body that nobody wanted; True if it has ended, so that the connection may be used again."""
        if not keepalive:
            return False
        conn.sock.be_patient(UNWANTED_S)  # in all: the deadline holds for each wait
        return bool(conn.parser.finish_body(deadline=time.monotonic() + UNWANTED_S))

    def handle_error(self, req: Any, client: Any, addr: Any, exc: Exception) -> None:
        """Answer in the API's words what never became a request of the application."""
        if not isinstance(exc, http.ParseException):
            super().handle_error(req, client, addr, exc)
            return
        status, reason = _REASONS.get(type(exc), (400, "Bad Request"))
        self.log.warning("Invalid request from %s: %s", addr[0] if addr else "a socket", type(exc).__name__)
        error = {"message": f"{reason}.", "type": "invalid_request_error", "param": None, "code": "bad_request"}
        body = json.dumps({"error": error})
        head = f"HTTP/1.1 {status} {reason}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        try:
            client.setblocking(False)
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        except OSError:
            self.log.debug("An error could not be told to the client.")

    # -- the end of a connection

    def finish_request(self, conn: Any, done: Any) -> None:
        if done.cancelled() or done.exception() is not None or not done.result():
            self._linger(conn)
        else:
            super().finish_request(conn, done)

    def _linger(self, conn: Any) -> None:
        """Say that nothing more comes and forget what the client still sends (RFC 9112, section 9.6)."""
        try:
            conn.sock.shutdown(socket.SHUT_WR)
            conn.sock.setblocking(False)
        except OSError:
            self._drop(conn)
        else:
            self._park(conn, LINGER_S, self._skim)

    def _skim(self, conn: Any, _socket: object = None) -> None:
        try:
            if not conn.sock.take(_PIECE_BYTES):
                self._drop(conn)
        except BlockingIOError:
            return
        except OSError:
            self._drop(conn)

    # -- connections that wait on the main loop

    def _park(self, conn: Any, seconds: float, on_readable: Callable[..., None]) -> None:
        """Call `on_readable` when bytes come; where connections run short, the one that waits longest makes room."""
        if self.nr_conns >= self.worker_connections and self._parked:
            self._drop(next(iter(self._parked)))
        now = time.monotonic()
        self._parked[conn] = _Parked(now, now + seconds)
        self.poller.register(conn.sock, EVENT_READ, partial(on_readable, conn))

    def _unpark(self, conn: Any) -> None:
        if self._parked.pop(conn, None) is not None:
            self.poller.unregister(conn.sock)

    def _drop(self, conn: Any) -> None:
        self._unpark(conn)
        self.nr_conns -= 1
        conn.close()

    def murder_pending(self) -> None:
        """Called after each turn of the main loop, once a second at least."""
        now = time.monotonic()
        for conn, parked in list(self._parked.items()):
            if now > parked.until or (not self.alive and now > parked.since + LINGER_S):
                self._drop(conn)


def _adapted(application: "WSGIApplication") -> "WSGIApplication":
    """The application with what gunicorn keeps from it: `Connection: close` closes, and a body that is not
    well-formed is an OSError, as one that breaks off is."""

    def adapted(environ: "WSGIEnvironment", start_response: "StartResponse") -> Any:
        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            if ("Connection", "close") in headers:
                start_response.__self__.force_close()  # type: ignore[attr-defined]  # a method of gunicorn's Response
            return start_response(status, headers, *more)

        environ["wsgi.input"] = _Body(environ["wsgi.input"])
        return application(environ, start)

    return adapted


class _Body:
    """The input of a request."""

    def __init__(self, body: Any) -> None:
        self._body = body

    def read(self, size: int = -1) -> bytes:
        try:
            return bytes(self._body.read(size))
        except http.ParseException as error:
            raise OSError(f"the body is not well-formed: {type(error).__name__}") from error
