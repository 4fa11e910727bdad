"""Keeps programs running: starts them, carries their output, restarts what dies, and leaves none behind.

One thread, because it forks: the loop sleeps in `select` until a program writes, a program ends, or a signal comes.
"""

import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import BinaryIO, Self

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
STEADY_S = 60.0
"""A program that ran this long starts with the first pause again."""
LONGEST_LINE_BYTES = 1 << 16

_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Program:
    """What to run. `stop_s` is how long it may take after SIGTERM, before SIGKILL."""

    name: str
    command: list[str]
    env: Mapping[str, str]
    cwd: Path
    stop_s: float = 10.0


@dataclass(frozen=True)
class Exit:
    """A program ended by itself. `code` is negative for a signal, as subprocess has it; `count` is in a row."""

    name: str
    code: int
    count: int


@dataclass
class _Child:
    program: Program
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    deaths: int = 0
    restart_at: float = 0.0
    tail: bytes = field(default=b"", repr=False)


class Supervisor:
    """Within its `with` block, signals only set `is_stopping`; when the block is left, however, no program is."""

    def __init__(self, output: BinaryIO) -> None:
        """Programs' lines, and what becomes of programs, are written to `output`."""
        self._output = output
        self._children: dict[str, _Child] = {}
        self._signals = 0
        self._previous: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    def __enter__(self) -> Self:
        self._selector = selectors.DefaultSelector()
        self._woken, self._wake = socket.socketpair()
        for end in (self._woken, self._wake):
            end.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._previous_fd = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        for number in _STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP, and means it
                self._previous[number] = signal.signal(number, self._note_signal)
        self._previous[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(*self._children)
        signal.set_wakeup_fd(self._previous_fd)
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._selector.close()
        self._woken.close()
        self._wake.close()

    @property
    def is_stopping(self) -> bool:
        """True once a signal asked to stop."""
        return self._signals > 0

    def start(self, program: Program) -> None:
        """Run `program` until `stop` names it, again and again with growing pauses if it ends by itself."""
        child = self._children[program.name] = _Child(program)
        self._spawn(child)

    def tick(self, at_most_s: float) -> list[Exit]:
        """Carry output, restart what is due, and return what ended; returns early if anything happened."""
        now = time.monotonic()
        due = [c.restart_at - now for c in self._children.values() if c.process is None]
        for key, _ in self._selector.select(max(0.0, min([at_most_s, *due]))):
            if key.fileobj is self._woken:
                self._woken.recv(4096)
            else:
                self._carry(key.data)
        ended = [self._bury(c, c.process) for c in self._children.values() if c.process and _has_ended(c.process)]
        for child in self._children.values():
            if child.process is None and child.restart_at <= time.monotonic() and not self.is_stopping:
                self._spawn(child)
        return ended

    def stop(self, *names: str) -> None:
        """SIGTERM to these programs, SIGKILL to what is left of their groups in time, or upon a second signal."""
        started_at, signals = time.monotonic(), self._signals
        children = [self._children.pop(name) for name in names]
        leaving = {c.program.name: (c, c.process) for c in children if c.process is not None}
        for _, process in leaving.values():
            with suppress(ProcessLookupError):
                process.terminate()
        while leaving:
            for name, (child, process) in list(leaving.items()):
                impatient = self._signals > max(1, signals)
                if impatient or time.monotonic() - started_at > child.program.stop_s:
                    self._say(name, "did not stop in time and was killed")
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                elif not _has_ended(process):
                    continue
                self._lay_to_rest(child, process)
                del leaving[name]
            for key, _ in self._selector.select(0.05):
                if key.fileobj is self._woken:
                    self._woken.recv(4096)
                else:
                    self._carry(key.data)

    def _note_signal(self, _number: int, _frame: FrameType | None) -> None:
        self._signals += 1

    def _spawn(self, child: _Child) -> None:
        program = child.program
        process = subprocess.Popen(
            program.command,
            env=dict(program.env),
            cwd=program.cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C in a terminal reaches the supervisor only, which stops things in order
            preexec_fn=_die_with(os.getpid()),
        )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        child.process, child.started_at = process, time.monotonic()
        self._selector.register(process.stdout, selectors.EVENT_READ, child)

    def _bury(self, child: _Child, process: subprocess.Popen[bytes]) -> Exit:
        ran_s = time.monotonic() - child.started_at
        child.deaths = 1 if ran_s > STEADY_S else child.deaths + 1
        pause_s = min(FIRST_PAUSE_S * 2 ** (child.deaths - 1), LONGEST_PAUSE_S)
        child.restart_at = time.monotonic() + pause_s
        code = self._lay_to_rest(child, process)
        if not self.is_stopping:
            what = f"by signal {-code}" if code < 0 else f"with code {code}"
            self._say(child.program.name, f"ended {what} after {ran_s:.1f} s; it starts again in {pause_s:g} s")
        return Exit(child.program.name, code, child.deaths)

    def _lay_to_rest(self, child: _Child, process: subprocess.Popen[bytes]) -> int:
        """End what is left of the group, then reap its leader: until then no other process can have its number."""
        with suppress(ProcessLookupError, PermissionError):  # macOS says EPERM of a group of zombies
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        assert process.stdout is not None
        self._carry(child)
        if child.tail:
            self._say(child.program.name, child.tail)
        with suppress(KeyError):
            self._selector.unregister(process.stdout)
        process.stdout.close()
        child.process, child.tail = None, b""
        return code

    def _carry(self, child: _Child) -> None:
        """Pass on the whole lines that the program wrote; the rest waits for its end."""
        assert child.process is not None
        assert child.process.stdout is not None
        descriptor = child.process.stdout.fileno()
        with suppress(BlockingIOError):
            while data := os.read(descriptor, 1 << 16):
                *lines, child.tail = (child.tail + data).split(b"\n")
                for line in lines:
                    self._say(child.program.name, line)
                if len(child.tail) > LONGEST_LINE_BYTES:
                    self._say(child.program.name, child.tail)
                    child.tail = b""
            with suppress(KeyError):  # at its end, since it would wake us for ever
                self._selector.unregister(child.process.stdout)

    def _say(self, name: str, text: str | bytes) -> None:
        line = text.encode() if isinstance(text, str) else text
        with suppress(OSError):  # the terminal may be gone; the service is not
            self._output.write(b"%-9s | %s\n" % (name.encode(), line))
            self._output.flush()


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """True if the process ended, without reaping it."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _die_with(parent: int) -> Callable[[], None] | None:
    """Run in the child between fork and exec: the kernel kills it when the supervisor dies, even by SIGKILL."""
    if _LIBC is None:
        return None
    prctl = _LIBC.prctl

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return arrange
