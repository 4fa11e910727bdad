"""The programs of a service under test as processes to signal and to ask, and the nursery that starts them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import psutil

REPOSITORY: Final = Path(__file__).parents[2]
START_S: Final = 120.0


def wait_until(what: str, condition: Callable[[], object], *, at_most_s: float, every_s: float = 0.05) -> None:
    """Return as soon as `condition()` is true; AssertionError naming `what` after `at_most_s`."""
    until = time.monotonic() + at_most_s
    while not condition():
        assert time.monotonic() < until, f"waited {at_most_s:g} s in vain for {what}"
        time.sleep(every_s)


class Nursery:
    """A running nursery; threads may share it."""

    def __init__(self, log: Path) -> None:
        self._lock = threading.Lock()
        self._num_asked = 0
        environment = {name: value for name, value in os.environ.items() if not name.startswith("LORAD_")}
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.nursery"], cwd=REPOSITORY, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
            env=environment | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )  # fmt: skip

    def __enter__(self) -> Self:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the nursery did not start: {Path(self._log.name).read_text()[-3000:]}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()
        self._log.close()

    def ask(self, order: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._num_asked += 1
            number = self._num_asked
            self._process.stdin.write(json.dumps({"number": number, **order}) + "\n")
            self._process.stdin.flush()
            while True:  # whoever asked before may have been interrupted before it read its answer
                answer = dict(json.loads(self._process.stdout.readline()))
                if answer["number"] == number:
                    return answer

    def start(self, name: str, *, log: Path, env: Mapping[str, str], **order: Any) -> "Process":
        """Start one of the nursery's programs, or `call="module:function"` with `arguments`."""
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        own = inherited | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | dict(env)
        return Process(self, name, int(self.ask({"log": str(log), "env": own, **order})["pid"]), log)


class Process:
    """One program. It leads a process group of its own."""

    def __init__(self, nursery: Nursery, name: str, pid: int, log: Path) -> None:
        self.name = name
        self.pid = pid
        self.log = log
        self._nursery = nursery

    @property
    def code(self) -> int | None:
        """The exit code, negative for a signal; None while it lives."""
        code = self._nursery.ask({"pid": self.pid})["code"]
        return None if code is None else int(code)

    @property
    def is_alive(self) -> bool:
        return self.code is None

    @property
    def is_stopped(self) -> bool:
        """True while SIGSTOP holds it."""
        try:
            return bool(psutil.Process(self.pid).status() == psutil.STATUS_STOPPED)
        except psutil.NoSuchProcess:
            return False

    def said(self, text: str) -> bool:
        """True if its log holds this text."""
        return text in self.log.read_text(errors="replace")

    def send(self, number: int) -> None:
        """Signal the process, if it lives."""
        if self.is_alive:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to its whole group, as a machine that loses power would; returns when it is dead."""
        if self.is_alive:
            os.killpg(self.pid, signal.SIGKILL)
        wait_until(f"the death of {self.name}", lambda: not self.is_alive, at_most_s=10)

    def wake(self) -> None:
        self.send(signal.SIGCONT)

    def wait_stopped(self, at_most_s: float = 60.0) -> None:
        """Until a failpoint has stopped it."""
        wait_until(f"{self.name} to reach its failpoint", lambda: self.is_stopped, at_most_s=at_most_s)

    def wait_dead(self, at_most_s: float = 60.0) -> None:
        wait_until(f"{self.name} to end", lambda: not self.is_alive, at_most_s=at_most_s)
