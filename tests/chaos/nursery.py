"""Starts the service's programs by fork from a process that has imported them, in milliseconds instead of seconds.

Each child is a process of its own that runs the program's own `main` with its own environment, log and failpoints.
Reads one JSON object a line on standard input and answers each with one of its number; kills what runs at the end.
"""

import ctypes
import json
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

IMPORTED = (
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
    "gunicorn.app.wsgiapp",
    "api.app",
    "api.server",
    "shared.cli.servers",
    "shared.sweeper",
    "tests.chaos.crowd",
    "tests.worker.conftest",
    "worker.generator",
    "worker.trainer",
)
"""What children need not import any more."""
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def make_tiny_base(directory: str) -> None:
    """A whole base model of 2 layers with a byte tokenizer, and beside it `row.json`: its digest and description."""
    from tests.worker.conftest import byte_tokenizer, llama_config, random_model
    from worker.base_model import describe, digest_directory

    place = Path(directory)
    model, tokenizer = random_model(llama_config()), byte_tokenizer()
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    row = {"digest": digest_directory(place), "config": describe(model, tokenizer)}
    place.with_suffix(".json").write_text(json.dumps(row))


def _trainer() -> None:
    from worker.celery_program import exit_with_one_line
    from worker.trainer import main

    exit_with_one_line(main)


def _generator() -> None:
    from worker.celery_program import exit_with_one_line
    from worker.generator import main

    exit_with_one_line(main)


def _sweeper() -> None:
    from shared.cli.servers import sweeper

    sweeper.main(args=[], prog_name="lorad sweeper")


def _api() -> None:
    from shared.cli.servers import api_command
    from shared.config import Settings

    _, _, module, *arguments = api_command(Settings.from_env())  # python -m gunicorn ...
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


PROGRAMS: Mapping[str, Callable[[], None]] = {
    "api": _api,
    "trainer": _trainer,
    "generator": _generator,
    "sweeper": _sweeper,
}


def _shift_clock(seconds: float) -> None:
    """Let this process's clock be wrong; the monotonic clock, as on any machine, stays right."""
    true_time, true_time_ns = time.time, time.time_ns
    time.time = lambda: true_time() + seconds
    time.time_ns = lambda: true_time_ns() + int(seconds * 1e9)


def _poison(adapter_name: str) -> None:
    """Let a job that makes this adapter kill whoever starts it, as data might that a driver cannot bear."""
    from worker.job_run import JobRun

    run = JobRun.run

    def deadly(self: Any, engine_for: Any) -> None:
        if self._claim.adapter_name == adapter_name:
            os.kill(os.getpid(), signal.SIGKILL)
        run(self, engine_for)

    JobRun.run = deadly  # type: ignore[method-assign]


def _bear(order: Mapping[str, Any]) -> int:
    """The pid of a new child that carries out the order."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        os.setsid()
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.clear()
        os.environ.update(order["env"])
        sys.argv = [order.get("program", "call")]
        from shared import failpoints

        failpoints.arm(order["env"].get("LORAD_FAILPOINT", ""))
        if order.get("skew_s"):
            _shift_clock(order["skew_s"])
        if order.get("poison"):
            _poison(order["poison"])
        if "program" in order:
            PROGRAMS[order["program"]]()
        else:
            module, _, function = order["call"].partition(":")
            getattr(import_module(module), function)(*order["arguments"])
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class _Nursery:
    def __init__(self) -> None:
        self._codes: dict[int, int | None] = {}

    def start(self, order: Mapping[str, Any]) -> int:
        pid = _bear(order)
        self._codes[pid] = None
        return pid

    def code(self, pid: int) -> int | None:
        """The exit code of a child, negative for a signal; None while it lives."""
        if self._codes[pid] is None:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self._codes[pid] = os.waitstatus_to_exitcode(status)
        return self._codes[pid]

    def kill_all(self) -> None:
        for pid in self._codes:
            if self.code(pid) is None:
                os.kill(pid, signal.SIGKILL)


def main() -> None:
    """Serve orders until the input ends."""
    for module in IMPORTED:
        import_module(module)
    nursery = _Nursery()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        answer = {"code": nursery.code(order["pid"])} if "pid" in order else {"pid": nursery.start(order)}
        print(json.dumps({"number": order["number"], **answer}), flush=True)
    nursery.kill_all()


if __name__ == "__main__":
    main()
