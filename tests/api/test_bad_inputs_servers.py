"""Bad clients of the real server, rows 4, 5, 31, 54 and 56 of the catalogue in test_bad_inputs.py.

What is no HTTP, what never ends and what dawdles is gunicorn's affair and that of `api.server`, so gunicorn itself runs
here, as `lorad api` runs it.
"""

import json
import select
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil
import pytest
from sqlalchemy import func
from sqlalchemy import select as query

from shared import limits
from shared.cli.servers import CODE_DIR, api_command
from shared.config import Settings, environment_for
from shared.db import open_engine, read
from shared.store.layout import Layout
from shared.tables import Job
from tests.api.conftest import wait_for
from tests.api.refused import JOBS
from tests.servers import Broker, free_port

THREADS = 4
SLOW_HEADS = 60
SLOW_BODIES = 2
CLOSED_S = 30.0
SERVED_S = 5.0
"""Far less than anybody is waited for, and enough for a busy machine."""


@dataclass
class Server:
    """A running gunicorn with few threads."""

    port: int
    process: psutil.Process
    settings: Settings
    log: Path

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=CLOSED_S)

    def send(self, raw: bytes) -> bytes:
        """Everything that is answered to these bytes, until the server closes."""
        with self.connect() as connection:
            connection.sendall(raw)
            return rest_of(connection)

    def peak_bytes(self) -> int:
        """The most memory that any of its processes ever held."""
        family = [self.process, *self.process.children(recursive=True)]
        status = [Path(f"/proc/{one.pid}/status").read_text() for one in family]
        return max(int(text.split("VmHWM:")[1].split()[0]) << 10 for text in status)

    def num_jobs(self) -> int:
        engine = open_engine(self.settings.database_url)
        with read(engine) as tx:
            found = tx.scalar(query(func.count()).select_from(Job))
        engine.dispose()
        return int(found or 0)


@pytest.fixture(scope="module")
def server(broker: Broker, sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for the whole module: a server takes seconds to start. In the end it must have logged no stack trace."""
    place = tmp_path_factory.mktemp("server")
    database_url = f"sqlite:///{shutil.copyfile(sqlite_template, place / 'lorad.db')}"
    settings = Settings(
        data_dir=place / "data", database_url=database_url, broker_url=broker.url, port=free_port(), api_threads=THREADS
    )
    log = place / "log"
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            api_command(settings), cwd=CODE_DIR, env=environment_for(settings), stderr=errors, stdout=errors
        ) as process,
    ):
        running = Server(settings.port, psutil.Process(process.pid), settings, log)
        try:
            wait_for(lambda: healthy(running, within_s=1), timeout_s=60)
            yield running
            assert healthy(running)
            assert process.poll() is None
        finally:
            process.terminate()
            process.wait(20)
    assert "Traceback" not in log.read_text(errors="replace")


def healthy(server: Server, *, within_s: float = SERVED_S) -> bool:
    try:
        url = f"http://127.0.0.1:{server.port}/healthz"
        return httpx2.get(url, trust_env=False, timeout=within_s).status_code == 200
    except httpx2.HTTPError:
        return False


def head(*headers: str, line: str = f"POST {JOBS} HTTP/1.1", end: str = "\r\n\r\n") -> bytes:
    """A request up to its body."""
    return ("\r\n".join([line, "Host: localhost", "Content-Type: application/json", *headers]) + end).encode()


def rest_of(connection: socket.socket) -> bytes:
    """What comes until the other end closes; a reset counts as its end."""
    pieces = []
    try:
        while piece := connection.recv(65536):
            pieces.append(piece)
    except ConnectionResetError:
        pass
    return b"".join(pieces)


def status_of(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer
    return int(answer[9:12])


def assert_told(answer: bytes, status: int) -> None:
    """One answer, an error in JSON, after which the server closes."""
    assert status_of(answer) == status, answer
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"\r\nConnection: close\r\n" in answer
    assert set(json.loads(answer.rpartition(b"\r\n\r\n")[2])["error"]) == {"message", "type", "param", "code"}


# -- size


def test_row_4_a_byte_too_many_is_heard_by_a_client_that_sends_first(server: Server) -> None:
    """Sixteen megabytes are refused by their length; the client has sent them all and yet reads why."""
    size = 16 << 20

    assert_told(server.send(head(f"Content-Length: {size}") + b"a" * size), 413)


def test_row_5_an_endless_body_is_cut_at_the_limit(server: Server) -> None:
    """Without a length, the server answers once it has the limit, while the client still sends."""
    piece = b"10000\r\n" + b"a" * 65536 + b"\r\n"
    sent = 0
    with server.connect() as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        while not select.select([connection], [], [], 0)[0] and sent < 100 << 20:
            connection.sendall(piece)
            sent += len(piece)
        connection.shutdown(socket.SHUT_WR)
        answer = rest_of(connection)

    assert_told(answer, 413)
    assert limits.JSON_BODY_BYTES < sent < 32 << 20  # what is on its way in buffers counts as sent


@pytest.mark.parametrize("body", [b"zz\r\n", b"5\r\nabc", b"5\r\nabcdefgh", b"-1\r\n", b"0" * 10_000], ids=repr)
def test_a_broken_chunk_is_the_client_s_fault(server: Server, body: bytes) -> None:
    """What only says that it is chunked is 400, and the connection is not used again."""
    with server.connect() as connection:
        connection.sendall(head("Transfer-Encoding: chunked") + body)
        connection.shutdown(socket.SHUT_WR)
        answer = rest_of(connection)

    assert_told(answer, 400)


def test_row_31_a_line_of_200_mb_takes_no_memory(server: Server) -> None:
    """It goes to disk piece by piece and is read back piece by piece; line 1 is found too long."""
    opening = b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--b\r\n'
    opening += b'Content-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    closing, size, piece = b"\r\n--b--\r\n", 200_000_000, b"a" * 1_000_000
    length = len(opening) + size + len(closing)
    before = server.peak_bytes()
    with server.connect() as connection:
        connection.sendall(
            f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {length}\r\n"
            "Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode()
            + opening
        )
        for _ in range(size // len(piece)):
            connection.sendall(piece)
        connection.sendall(closing)
        answer = rest_of(connection)

    told = json.loads(answer.rpartition(b"\r\n\r\n")[2])
    assert (told["bytes"], told["status"]) == (size, "error")
    assert told["status_details"].startswith("line 1: ")
    assert server.peak_bytes() - before < 64 << 20
    assert list(Layout(server.settings.data_dir).tmp.iterdir()) == []


# -- heads that are none


MANY = [f"X-{n}: 1" for n in range(10_000)]
BAD_HEADS = {
    "54-10,000 headers": (head(*MANY), 431),
    "54-a header of 64 KiB": (head("X: " + "a" * 65536), 431),
    "54-a header that never ends": (head("X: " + "a" * 200_000, end=""), 431),
    "54-a URL of 64 KiB": (head(line="GET /" + "a" * 60_000 + " HTTP/1.1"), 414),
    "54-two lengths": (head("Content-Length: 2", "Content-Length: 3") + b"{}", 400),
    "54-a length that is none": (head("Content-Length: 2x") + b"{}", 400),
    "54-a negative length": (head("Content-Length: -1"), 400),
    "54-length and chunks": (head("Content-Length: 2", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
    "54-chunks and length": (head("Transfer-Encoding: chunked", "Content-Length: 2") + b"0\r\n\r\n", 400),
    "54-chunked twice": (head("Transfer-Encoding: chunked", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 400),
    "54-a blank before the colon": (head("Transfer-Encoding : chunked") + b"0\r\n\r\n", 400),
    "54-a folded line": (head("X: 1\r\n 2"), 400),
    "54-no name": (head(": 1"), 400),
    "54-a zero byte": (head("X: a\0b"), 400),
    "54-no HTTP": (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
    "54-no version": (b"GET /\r\n\r\n", 400),
    "54-another version": (head(line="GET / HTTP/9.9"), 400),
}


@pytest.mark.parametrize("name", BAD_HEADS)
def test_a_bad_head_is_refused_and_nothing_behind_it_is_read(server: Server, name: str) -> None:
    """One answer, then the end: a second request behind the first, of which a proxy may know nothing, is not served."""
    raw, status = BAD_HEADS[name]
    smuggled = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"

    assert_told(server.send(raw + (b"" if name.endswith("never ends") else smuggled)), status)


def test_requests_in_a_row_are_answered_in_a_row(server: Server) -> None:
    """The opposite: what is well-formed may stand one behind the other, and come in any pieces."""
    whole = head("Content-Length: 2") + b"[]" + head(line="GET /healthz HTTP/1.1")
    whole += head("Connection: close", line="GET /healthz HTTP/1.1")
    with server.connect() as connection:
        for at in range(0, len(whole), 7):
            connection.sendall(whole[at : at + 7])
            time.sleep(0.002)
        answer = rest_of(connection)

    assert [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [400, 200, 200]


# -- time


def test_row_56_clients_that_dawdle_are_cut_off_and_hold_up_nobody(server: Server) -> None:
    """More slow heads than there are threads, connections that say nothing, and bodies that trickle: all are closed in
    time, and meanwhile everybody else is served. No job comes of any."""
    jobs = server.num_jobs()
    began = time.monotonic()
    with ExitStack() as stack:
        heads = [stack.enter_context(server.connect()) for _ in range(SLOW_HEADS)]
        silent = [stack.enter_context(server.connect()) for _ in range(THREADS)]
        bodies = [stack.enter_context(server.connect()) for _ in range(SLOW_BODIES)]
        for connection in bodies:
            connection.sendall(head("Content-Length: 1000") + b"{")
        over = threading.Event()
        trickle = threading.Thread(target=_trickle, args=(heads, bodies, over))
        trickle.start()
        try:
            with ThreadPoolExecutor(len(bodies) + 1) as pool:
                answers = pool.map(rest_of, [*bodies, silent[0]])
                served = []
                while time.monotonic() < began + 8:  # while all of them are open
                    served.append(healthy(server))
                    time.sleep(0.2)
                *told, nothing = answers
            for connection in [*heads, *silent]:
                rest_of(connection)
        finally:
            over.set()
            trickle.join()

    assert all(served)
    assert len(served) > 8
    assert time.monotonic() - began < CLOSED_S
    for answer in told:
        assert_told(answer, 408)
    assert nothing == b""
    assert server.num_jobs() == jobs


def test_more_unfinished_bodies_than_threads_hold_up_nobody_for_long(server: Server) -> None:
    """With a right key too: half of the threads wait for bodies as long as they may, the others give up after a second
    each, and all are told so."""
    with ExitStack() as stack:
        bodies = [stack.enter_context(server.connect()) for _ in range(2 * THREADS)]
        for connection in bodies:
            connection.sendall(head("Content-Length: 1000") + b"{")
        # One has been given up, so threads have taken them up: those with a seat still wait.
        assert select.select(bodies, [], [], SERVED_S)[0]
        served = healthy(server)
        with ThreadPoolExecutor(len(bodies)) as pool:
            told = list(pool.map(rest_of, bodies))

    assert served
    for answer in told:
        assert_told(answer, 408)


def test_a_body_that_nobody_wants_is_not_waited_for(server: Server) -> None:
    """More such requests than there are threads, each answered: their bodies trickle, and the next client is
    served at once. One whose body is there keeps its connection."""
    line = "GET /healthz HTTP/1.1"
    with ExitStack() as stack:
        unwanted = [stack.enter_context(server.connect()) for _ in range(4 * THREADS)]
        for connection in unwanted:
            connection.sendall(head("Content-Length: 1000", line=line) + b"ab")
        began = time.monotonic()
        pool = stack.enter_context(ThreadPoolExecutor(1))
        served = pool.submit(healthy, server)
        while not served.done():
            for connection in unwanted:
                _try_to_send(connection, b"a")
            time.sleep(0.1)
        assert served.result()
        assert time.monotonic() - began < SERVED_S / 2

    whole = head("Content-Length: 1000", line=line) + b"a" * 1000
    answer = server.send(2 * whole + head("Connection: close", line=line))
    assert [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [200, 200, 200]


def _trickle(heads: list[socket.socket], bodies: list[socket.socket], over: threading.Event) -> None:
    """A byte a second to each, to those that are still open."""
    opening = head(end="")
    for at in range(len(opening)):
        for connection in heads:
            _try_to_send(connection, opening[at : at + 1])
        for connection in bodies:
            _try_to_send(connection, b" ")
        if over.wait(1.0):
            return


def _try_to_send(connection: socket.socket, piece: bytes) -> None:
    with suppress(OSError):
        connection.sendall(piece)


def test_a_refusal_holds_no_thread_though_the_client_stays(server: Server) -> None:
    """Clients that get an error, and neither read on nor close, are let go without a thread waiting for them."""
    with ExitStack() as stack:
        for _ in range(5 * THREADS):
            connection = stack.enter_context(server.connect())
            connection.sendall(head("Content-Length: 1000", line="POST /nowhere HTTP/1.1"))
            assert status_of(connection.recv(65536)) == 404
        began = time.monotonic()

        assert healthy(server)
        assert time.monotonic() - began < 1.0


def test_a_slow_but_steady_client_is_served(server: Server) -> None:
    """A head in two pieces and a body in pieces, a second between, is a request like any other."""
    body = b'{"model": "tiny"}'
    with server.connect() as connection:
        raw = head("Connection: close", f"Content-Length: {len(body)}")
        for piece in (raw[:20], raw[20:] + body[:5], body[5:]):
            connection.sendall(piece)
            time.sleep(1.0)
        answer = rest_of(connection)

    assert status_of(answer) == 400
    assert b"missing_required_parameter" in answer
