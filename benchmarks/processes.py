"""Starting a measured process and getting its answer, with the same environment for every program."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

LIMIT_S: Final = 900
ROOT: Final = Path(__file__).parents[1]

_NOT_PASSED: Final = ("OMP_", "GOMP_", "KMP_", "MKL_", "LORAD_", "MALLOC_", "LD_PRELOAD", "TORCH_", "VLLM_")


class Unavailable(Exception):
    """The installed peer cannot do what a row asks for."""


def environment(threads: int) -> dict[str, str]:
    """Threads pinned; OpenMP's default of waiting actively, which suits a process that has the machine to itself;
    no allocator or OpenMP setting from outside; nothing asks a model hub."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_PASSED)}
    return {**kept, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Runner:
    """Starts the measured processes of one benchmark, one at a time: `python -m MODULE KIND` for each.

    A child gets a JSON request on stdin and answers with the last line that it prints; what it printed is in `log`.
    """

    def __init__(self, module: str, shared: Mapping[str, Any], *, threads: int, work: Path) -> None:
        self.work = work
        self.log = work / "log.txt"
        self._module = module
        self._shared = {**shared, "work": str(work)}
        self._threads = threads
        self._started_s = time.perf_counter()
        self.log.unlink(missing_ok=True)
        # Being ended is an exception like any other, so that the child that runs ends too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    def run(
        self, kind: str, *, python: str = sys.executable, variables: Mapping[str, str] | None = None, **request: Any
    ) -> dict[str, Any]:
        """The answer of one process, with `wall_s` from its start to its end. `variables` join its environment.

        A child that fails or outlasts the limit answers {"failed": why}; one that cannot do what was asked,
        {"unavailable": why}.
        """
        asked = json.dumps({**self._shared, **request})
        started_s = time.perf_counter()
        code, said, complained = _outcome(
            [python, "-m", self._module, kind], asked, {**environment(self._threads), **(variables or {})}
        )
        wall_s = time.perf_counter() - started_s
        with self.log.open("a", encoding="utf-8") as file:
            file.write(f"== {kind} {asked[:600]}\n{complained}\n{said}\n")
        if code is None:
            return {"failed": f"took longer than {LIMIT_S} s"}
        if code:
            return {"failed": (complained.strip() or f"exit code {code}").splitlines()[-1][:300]}
        return {**json.loads(said.splitlines()[-1]), "wall_s": wall_s}

    def say(self, text: str) -> None:
        minutes, seconds = divmod(int(self.elapsed_s()), 60)
        print(f"{minutes:3d}:{seconds:02d}  {text}", flush=True)

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._started_s


def peak_rss_bytes() -> int:
    """The most resident memory this process has had, mapped files included (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def _outcome(command: list[str], asked: str, variables: dict[str, str]) -> tuple[int | None, str, str]:
    """(Exit code or None past the limit, stdout, stderr). Whatever the child started ends with it."""
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
        cwd=ROOT,
        start_new_session=True,
    ) as child:
        try:
            said, complained = child.communicate(asked, timeout=LIMIT_S)
            return child.returncode, said, complained
        except subprocess.TimeoutExpired:
            return None, "", ""
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
