"""A measured process: `python -m benchmarks.serve.child KIND`, a JSON request on stdin, the answer on stdout."""

import json
import os
import sys
from typing import Any

from benchmarks.processes import Unavailable


def run(kind: str, request: dict[str, Any]) -> dict[str, Any]:
    """What to do is imported only here: vLLM's environment has not what the others need, nor they what it needs."""
    match kind:
        case "prepare":
            from benchmarks.serve.data import prepare as work
        case "judge":
            from benchmarks.serve.judge import judge as work
        case "ours":
            from benchmarks.serve.ours import measure as work
        case "peft" | "merged":
            from benchmarks.serve.peers import measure as work
        case "vllm":
            from benchmarks.serve.vllm_peer import measure as work
        case "vllm-open":
            from benchmarks.serve.vllm_peer import measure_open as work
        case _:
            raise ValueError(f"no such kind: {kind}")
    return work(request)


def main() -> None:
    # vLLM's processes log to stdout, and go on when the answer is written: only the answer goes there.
    with os.fdopen(os.dup(1), "w") as stdout:
        os.dup2(2, 1)
        try:
            answer = run(sys.argv[1], json.load(sys.stdin))
        except Unavailable as error:
            answer = {"unavailable": str(error)}
        print(json.dumps(answer), file=stdout)


if __name__ == "__main__":
    main()
