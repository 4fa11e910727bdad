"""The supervisor, over small real programs."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from shared.cli.supervisor import Program, Supervisor

SLEEP = "import time; time.sleep(60)"
MARK = "supervised-by-this-test"
DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"


def program(code: str, *, name: str = "child", stop_s: float = 10.0) -> Program:
    return Program(name, [sys.executable, "-c", code, MARK], os.environ, Path("/"), stop_s=stop_s)


@pytest.fixture
def output() -> io.BytesIO:
    return io.BytesIO()


@pytest.fixture
def supervisor(output: io.BytesIO) -> Iterator[Supervisor]:
    with Supervisor(output) as running:
        yield running


def tick_until(supervisor: Supervisor, condition: Callable[[], object], timeout_s: float = 20) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        supervisor.tick(0.1)


def children() -> list[psutil.Process]:
    """The supervised programs that live; the session's servers are children of this process too."""
    return [p for p in psutil.Process().children() if MARK in command_line(p)]


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # or a zombie
        return []


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_lines_carry_the_name_of_their_program(supervisor: Supervisor, output: io.BytesIO):
    """Both streams of a program come out line by line behind its name, also a last line without an end."""
    supervisor.start(program("import sys; print('one'); print('two', file=sys.stderr); print('three', end='')"))

    tick_until(supervisor, lambda: b"three" in output.getvalue())

    lines = [line for line in output.getvalue().splitlines() if b"ended" not in line]
    assert sorted(lines) == [b"child     | one", b"child     | three", b"child     | two"]


def test_what_dies_starts_again(supervisor: Supervisor, output: io.BytesIO):
    """A program that is killed runs again, under another process id."""
    supervisor.start(program(f"import os; print('pid', os.getpid(), flush=True); {SLEEP}"))
    tick_until(supervisor, lambda: b"pid" in output.getvalue())
    (first,) = children()

    first.kill()
    tick_until(supervisor, lambda: output.getvalue().count(b"pid") == 2)

    assert b"by signal 9" in output.getvalue()
    assert [p.pid for p in children()] != [first.pid]


def test_pauses_grow_while_a_program_keeps_dying(supervisor: Supervisor):
    """Deaths in a row are counted, and each waits longer than the one before."""
    supervisor.start(program("raise SystemExit(3)"))
    seen: list[tuple[float, int, int]] = []
    while len(seen) < 3:
        seen += [(time.monotonic(), e.code, e.count) for e in supervisor.tick(5)]

    assert [(code, count) for _, code, count in seen] == [(3, 1), (3, 2), (3, 3)]
    assert seen[1][0] - seen[0][0] >= 0.5
    assert seen[2][0] - seen[1][0] >= 1.0


def test_stopping_lets_a_program_finish(supervisor: Supervisor, output: io.BytesIO):
    """SIGTERM comes first, and what a program says while it stops is still heard."""
    supervisor.start(
        program(
            "import signal, sys, time\n"
            "signal.signal(signal.SIGTERM, lambda *_: sys.exit(print('goodbye')))\n"
            "print('up', flush=True)\n" + SLEEP
        )
    )
    tick_until(supervisor, lambda: b"up" in output.getvalue())

    supervisor.stop("child")

    assert b"goodbye" in output.getvalue()
    assert children() == []


def test_who_does_not_stop_is_killed(supervisor: Supervisor, output: io.BytesIO):
    """A program that ignores SIGTERM is gone after its time, and not before."""
    supervisor.start(program(DEAF, stop_s=0.7))
    tick_until(supervisor, lambda: b"deaf" in output.getvalue())

    started_at = time.monotonic()
    supervisor.stop("child")

    assert 0.7 <= time.monotonic() - started_at < 10
    assert children() == []


def test_a_second_signal_kills_at_once(supervisor: Supervisor, output: io.BytesIO):
    """Ctrl-C twice does not wait for a program that takes a minute to stop."""
    supervisor.start(program(DEAF, stop_s=60))
    tick_until(supervisor, lambda: b"deaf" in output.getvalue())
    os.kill(os.getpid(), signal.SIGINT)
    assert supervisor.is_stopping
    killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(1); os.kill({os.getpid()}, 2)"])

    supervisor.stop("child")

    assert killer.wait() == 0
    assert children() == []


def test_grandchildren_end_with_their_program(supervisor: Supervisor, output: io.BytesIO):
    """When a program dies, nothing of its group is left to hold its port or files, before it starts again."""
    code = (
        f"import os, subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]);"
        "print('grandchild', p.pid, '.', flush=True); os._exit(1)"
    )
    supervisor.start(program(code))

    tick_until(supervisor, lambda: b"ended" in output.getvalue())

    pid = int(output.getvalue().split(b"grandchild ")[1].split()[0])
    tick_until(supervisor, lambda: not is_alive(pid))


def test_leaving_the_block_stops_everything_and_restores_signals(output: io.BytesIO):
    """Also when an error leaves it."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)]

    def fail_midway() -> None:
        with Supervisor(output) as supervisor:
            supervisor.start(program(SLEEP, name="a"))
            supervisor.start(program(SLEEP, name="b"))
            assert len(children()) == 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_midway()

    assert children() == []
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)] == before


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_programs_die_with_a_killed_supervisor():
    """kill -9 of the supervisor leaves no program behind, though it could do nothing about it."""
    code = (
        "import os, pathlib, sys\n"
        "from shared.cli.supervisor import Program, Supervisor\n"
        "with Supervisor(sys.stdout.buffer) as s:\n"
        f"    s.start(Program('child', [sys.executable, '-c', {DEAF!r}], os.environ, pathlib.Path('/')))\n"
        "    while True: s.tick(60)\n"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=root) as killed:
        assert killed.stdout is not None
        killed.stdout.readline()
        (child,) = psutil.Process(killed.pid).children()

        killed.kill()

        until = time.monotonic() + 10
        while is_alive(child.pid):
            assert time.monotonic() < until
            time.sleep(0.01)
