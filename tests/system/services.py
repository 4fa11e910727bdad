"""Real services for the system tests: `lorad up`, and every program as its own process over Postgres and TCP."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import psutil
from openai import OpenAI

FAST_TIMES = {
    "LORAD_HEARTBEAT_S": "1",
    "LORAD_LEASE_S": "4",
    "LORAD_SWEEP_S": "1",
    "LORAD_CHECKPOINT_S": "1",
}
START_S = 90
BASE = "smollm2-135m"


def wait_for(what: str, condition: Callable[[], object], *, timeout_s: float, every_s: float = 0.1) -> None:
    """Return as soon as `condition()` is true; fail naming `what` after `timeout_s`."""
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"waited {timeout_s} s for {what}"
        time.sleep(every_s)


class Service(Protocol):
    url: str

    def trainers(self) -> list[psutil.Process]: ...
    def generators(self) -> list[psutil.Process]: ...
    def stop(self) -> None: ...


def strict_client(service: Service) -> OpenAI:
    """The stock OpenAI client; every answer must validate against the SDK's own types."""
    return OpenAI(base_url=service.url, api_key="none", max_retries=0, timeout=120, _strict_response_validation=True)


def lorad(*arguments: str, env: dict[str, str]) -> str:
    """Run the `lorad` command to its end and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "shared.cli", *arguments], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"lorad {' '.join(arguments)}: {done.stdout}\n{done.stderr}"
    return done.stdout


def environment(**settings: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("LORAD_")}
    return inherited | FAST_TIMES | settings


class Embedded:
    """`lorad up` on SQLite and the embedded broker; its supervisor restarts what dies."""

    def __init__(self, data_dir: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self.data_dir = data_dir
        self.env = environment(LORAD_DATA_DIR=str(data_dir), LORAD_PORT=str(port), LORAD_BASE_URL=self.url)
        self.log = (data_dir.parent / "up.log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shared.cli", "up"], env=self.env, stdout=subprocess.PIPE, stderr=self.log
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        assert "ready" in line, f"lorad up printed {line!r}: {(data_dir.parent / 'up.log').read_text()[-3000:]}"

    def _children(self, module: str) -> list[psutil.Process]:
        return _running(psutil.Process(self.process.pid).children(recursive=True), module)

    def trainers(self) -> list[psutil.Process]:
        return self._children("worker.trainer")

    def generators(self) -> list[psutil.Process]:
        return self._children("worker.generator")

    def stop(self) -> None:
        """Stop, and hold the service to leaving nothing behind."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(timeout=60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.log.close()
        left = [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert (code, left) == (0, []), f"lorad up left {left}, exit code {code}"


class Distributed:
    """Two trainers, two generators, two sweepers and an API, each its own process, over Postgres and TCP."""

    PROGRAMS = ("api", "trainer", "trainer", "generator", "generator", "sweeper", "sweeper")

    def __init__(self, data_dir: Path, port: int, *, database_url: str, broker_url: str) -> None:
        self.url = f"http://127.0.0.1:{port}/v1"
        self.data_dir = data_dir
        self.env = environment(
            LORAD_DATA_DIR=str(data_dir), LORAD_PORT=str(port), LORAD_BASE_URL=self.url,
            LORAD_DATABASE_URL=database_url, LORAD_BROKER_URL=broker_url,
        )  # fmt: skip
        lorad("migrate", env=self.env)
        self.log = (data_dir.parent / "distributed.log").open("wb")
        self.programs = [(name, self._start(name)) for name in self.PROGRAMS]
        self.stopping = threading.Event()
        self.restarter = threading.Thread(target=self._restart_what_dies, name="restart policy")
        self.restarter.start()

    def _start(self, name: str) -> psutil.Popen:
        argv = [sys.executable, "-m", "shared.cli", name]
        return psutil.Popen(argv, env=self.env, stdout=self.log, stderr=self.log)

    def _restart_what_dies(self) -> None:
        """What a container engine's restart policy does."""
        while not self.stopping.wait(0.2):
            self.programs = [(name, p if p.poll() is None else self._start(name)) for name, p in self.programs]

    def _of(self, name: str) -> list[psutil.Process]:
        return [p for n, p in self.programs if n == name]

    def trainers(self) -> list[psutil.Process]:
        return self._of("trainer")

    def generators(self) -> list[psutil.Process]:
        return self._of("generator")

    def stop(self) -> None:
        self.stopping.set()
        self.restarter.join()
        for _, process in self.programs:
            process.terminate()
        codes = [(name, process.wait(timeout=60)) for name, process in self.programs]
        self.log.close()
        assert all(code == 0 for _, code in codes), f"exit codes after SIGTERM: {codes}"


def _running(processes: list[psutil.Process], module: str) -> list[psutil.Process]:
    found = []
    for process in processes:
        try:
            if module in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found
