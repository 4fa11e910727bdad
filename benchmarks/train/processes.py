"""Starting a measured process and getting its answer, with the same environment for every program."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

LIMIT_S: Final = 900
ROOT: Final = Path(__file__).parents[2]

_NOT_PASSED: Final = ("OMP_", "GOMP_", "KMP_", "MKL_", "LORAD_", "MALLOC_", "LD_PRELOAD", "TORCH_")


def environment(threads: int) -> dict[str, str]:
    """Threads pinned; OpenMP's default of waiting actively, which suits a process that has the machine to itself;
    no allocator or OpenMP setting from outside; nothing asks a model hub."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_NOT_PASSED)}
    return {**kept, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def measure(kind: str, request: dict[str, Any], *, threads: int, log: Path) -> dict[str, Any]:
    """The answer of a child of this kind, with `wall_s` from its start to its end; what it printed is added to `log`.

    A child that fails or outlasts the limit answers {"failed": why}; one that cannot do what was asked,
    {"unavailable": why}.
    """
    command = [sys.executable, "-m", "benchmarks.train.child", kind]
    started_s = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            env=environment(threads),
            cwd=ROOT,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {LIMIT_S} s"}
    wall_s = time.perf_counter() - started_s
    with log.open("a", encoding="utf-8") as file:
        file.write(f"== {kind} {json.dumps(request)[:600]}\n{done.stderr}\n{done.stdout}\n")
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        return {"failed": last[:300]}
    return {**json.loads(done.stdout.splitlines()[-1]), "wall_s": wall_s}
