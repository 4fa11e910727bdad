"""A measured process: `python -m benchmarks.train.child KIND`, a JSON request on stdin, the answer as the last line."""

import json
import sys
from typing import Any


def run(kind: str, request: dict[str, Any]) -> dict[str, Any]:
    """What to do is imported only here, so that no process holds another's packages in memory."""
    match kind:
        case "prepare":
            from benchmarks.train.data import prepare as work
        case "gemm":
            from benchmarks.train.gemm import measure as work
        case "evaluate":
            from benchmarks.train.evaluate import evaluate as work
        case "ours-row":
            from benchmarks.train.ours import train_row as work
        case "ours-jobs":
            from benchmarks.train.ours import train_jobs as work
        case "peft-row" | "trl-row":
            from benchmarks.train.peers import train_row as work
        case "peft-job":
            from benchmarks.train.peers import train_job as work
        case _:
            raise ValueError(f"no such kind: {kind}")
    return work(request)


def main() -> None:
    from benchmarks.processes import Unavailable

    try:
        answer = run(sys.argv[1], json.load(sys.stdin))
    except Unavailable as error:
        answer = {"unavailable": str(error)}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
