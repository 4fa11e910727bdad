"""`lorad up`: what it refuses, that it leaves nothing behind, and that it survives its programs."""

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil
import pytest

from shared import db
from shared.cli.servers import CODE_DIR

pytestmark = pytest.mark.system

START_S = 90


@dataclass
class Up:
    """A running `lorad up`. `ready` is the line it printed."""

    process: subprocess.Popen[str]
    data_dir: Path
    url: str
    log: Path
    ready: str = ""
    family: list[psutil.Process] = field(default_factory=list)

    def find(self, word: str) -> list[psutil.Process]:
        """Its programs with `word` on their command line, outermost first."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in children if any(word in argument for argument in command_line(p))]

    def is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/readyz", timeout=2).status_code == 200
        except httpx2.TransportError:
            return False


Start = Callable[..., Up]


@pytest.fixture
def start(tmp_path: Path, free_port: int) -> Iterator[Start]:
    """Starts `lorad up` and waits for its line; whatever still runs at the end of the test is killed."""
    started: list[Up] = []

    def run(*arguments: str, data_dir: Path | None = None, port: int | None = None) -> Up:
        port = port or free_port
        where = data_dir or tmp_path / "data"
        log = tmp_path / f"up{len(started)}.log"
        with log.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "shared.cli", "up", *arguments],
                env=environment(where, port),
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=CODE_DIR,
            )
        up = Up(process, where, f"http://127.0.0.1:{port}", log)
        started.append(up)
        assert process.stdout is not None
        up.ready = process.stdout.readline()
        assert up.ready, log.read_text()[-4000:]
        up.family = psutil.Process(process.pid).children(recursive=True)
        return up

    yield run
    for up in started:
        up.process.kill()
        up.process.wait()
        assert up.process.stdout is not None
        up.process.stdout.close()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(data_dir: Path, port: int, **settings: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith("LORAD_")}
    return env | {"LORAD_DATA_DIR": str(data_dir), "LORAD_PORT": str(port)} | settings


def refused(data_dir: Path, port: int, **settings: str) -> str:
    """The one line with which `lorad up` refuses to start, with exit code 2 and no process left."""
    done = subprocess.run(
        [sys.executable, "-m", "shared.cli", "up"],
        env=environment(data_dir, port, **settings),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=CODE_DIR,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(data_dir) in " ".join(p.info["cmdline"] or [])]
    return done.stderr


def wait_for(what: str, condition: Callable[[], object], timeout_s: float = START_S) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"waited {timeout_s} s for {what}"
        time.sleep(0.05)


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # or a zombie
        return []


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def sockets_in(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_socket()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_serves_and_leaves_nothing_behind(start: Start, number: signal.Signals):
    """One line says where it is; after Ctrl-C or SIGTERM no process, socket, lock or listener is left."""
    up = start()
    assert up.ready == f"lorad is ready: {up.url} (data in {up.data_dir})\n"
    assert up.is_ready()
    assert up.data_dir.stat().st_mode & 0o777 == 0o700
    assert all(up.find(word) for word in ("gunicorn", "worker.trainer", "worker.generator", "sweeper", "valkey-server"))
    family = psutil.Process(up.process.pid).children(recursive=True)

    up.process.send_signal(number)
    code = up.process.wait(timeout=60)

    assert up.process.stdout is not None
    assert (code, up.process.stdout.read()) == (0, "")
    assert [p for p in family if is_alive(p)] == []
    assert sockets_in(up.data_dir) == []
    assert not (up.data_dir / "up.lock").exists()
    assert not up.is_ready()


def test_each_program_is_replaced_when_it_dies(start: Start):
    """kill -9 of any program: another takes its place and the service is ready again."""
    up = start()
    words = ("gunicorn", "worker.trainer", "worker.generator", "sweeper", "valkey-server")
    before = {word: up.find(word)[0] for word in words}

    for process in before.values():
        process.kill()

    for word, process in before.items():
        wait_for(f"another {word}", lambda w=word, p=process: (found := up.find(w)) and found[0].pid != p.pid)
    wait_for("readiness", up.is_ready)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_after_kill_nine_it_can_start_again_at_once(start: Start):
    """Its programs die with it; the same directory and port serve again, with nothing to clean up by hand."""
    killed = start("--no-generator")

    killed.process.kill()
    wait_for("its programs to die", lambda: not any(is_alive(p) for p in killed.family), timeout_s=10)

    assert start("--no-generator").is_ready()


def test_parts_can_be_left_out(start: Start):
    """--no-trainer and --no-generator: others do that work."""
    up = start("--no-trainer", "--no-generator")

    assert up.is_ready()
    assert not up.find("worker.trainer")
    assert not up.find("worker.generator")


def test_one_service_per_data_directory(start: Start, tmp_path: Path):
    """A second `lorad up` on the same directory names the first one's process, and does not disturb it."""
    up = start("--no-trainer", "--no-generator")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        other_port = listener.getsockname()[1]

    command = [sys.executable, "-m", "shared.cli", "up"]
    second = subprocess.run(
        command, env=environment(up.data_dir, other_port), capture_output=True, text=True, timeout=60, cwd=CODE_DIR
    )

    assert (second.returncode, second.stderr.count("\n")) == (2, 1)
    assert f"process {up.process.pid})" in second.stderr
    assert up.is_ready()


def test_a_lock_left_by_a_dead_process_does_not_count(start: Start, tmp_path: Path):
    """The kernel knows who lives: a lock file alone refuses nobody."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "up.lock").write_text("12345\n")

    assert start("--no-trainer", "--no-generator").is_ready()


def test_a_port_in_use_is_refused(tmp_path: Path):
    """The line names the port and the way out."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        line = refused(tmp_path / "data", port)

    assert f"port {port}" in line
    assert "LORAD_PORT" in line


def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, free_port: int):
    """The line names the directory. (A file in its place stops even root, whom permissions do not.)"""
    (tmp_path / "file").write_text("")

    assert str(tmp_path / "file" / "data") in refused(tmp_path / "file" / "data", free_port)


def test_a_schema_newer_than_the_code_is_refused_and_untouched(tmp_path: Path, free_port: int):
    """A database that a later lorad wrote is not used, and not changed."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    db.migrate(f"sqlite:///{data_dir}/lorad.db")
    with sqlite3.connect(data_dir / "lorad.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()

    line = refused(data_dir, free_port)

    assert "newer" in line
    with sqlite3.connect(data_dir / "lorad.db") as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == ("9999",)
    connection.close()


def test_an_open_host_without_a_key_is_refused(tmp_path: Path, free_port: int):
    """Nobody serves the network by mistake."""
    assert "lorad keys create" in refused(tmp_path / "data", free_port, LORAD_HOST="0.0.0.0")


def test_a_program_that_cannot_start_ends_up(tmp_path: Path, free_port: int):
    """A program that ends again and again before readiness stops everything; its own lines say why."""
    done = subprocess.run(
        [sys.executable, "-m", "shared.cli", "up"],
        env=environment(tmp_path / "data", free_port, GUNICORN_CMD_ARGS="--no-such-option"),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=CODE_DIR,
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert "api       | " in done.stderr
    assert done.stderr.splitlines()[-1].startswith("lorad: api does not start")
    assert not (tmp_path / "data" / "up.lock").exists()
