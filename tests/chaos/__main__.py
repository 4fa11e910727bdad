"""`make chaos`: breaks the service in every way we know of, and says how many of them it survived.

Each fault has a service of its own: real programs, a real database and broker, a tiny model. Not tried here: NFS and
failing GPUs, which this machine may lack; power cuts, for which tests/shared/test_store_durable.py has the order of
writes; and the system's own clock, which is everybody's: programs' clocks are moved instead.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.chaos import (  # noqa: F401  # each adds its faults to the list
    broker_faults,
    database_faults,
    ledger_faults,
    publication_faults,
    request_faults,
    store_faults,
    trainer_faults,
)
from tests.chaos.bench import Bench
from tests.chaos.faults import FAULTS, Fault, Outcome, attempt
from tests.chaos.programs import REPOSITORY

LIMIT_S: Final = 28 * 60
"""Of everything; what has not begun by then counts as lost."""
CAMPAIGNS: Final = {
    "ledger-machine": "tests/shared/test_jobs_machine.py::test_ledger_answers_as_its_model",
    "api-schema": "tests/api/test_schemathesis.py",
}
"""Searches for faults that nobody has thought of, each a file of tests with a profile of its own for here."""
CAMPAIGN_S: Final = 360
_BRIEF: Final = ("--timeout=0", "--show-capture=no")


def main(arguments: Sequence[str]) -> int:
    """The exit code: 1 unless every fault was survived."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--only", default="", help="names, separated by commas")
    parser.add_argument("--list", action="store_true", help="the names, and nothing else")
    options = parser.parse_args(arguments)
    names = [name for name in options.only.split(",") if name] or [*FAULTS, *CAMPAIGNS]
    if unknown := sorted(set(names) - {*FAULTS, *CAMPAIGNS}):
        parser.error(f"no such fault: {', '.join(unknown)}; there are {', '.join([*FAULTS, *CAMPAIGNS])}")
    if options.list:
        print("\n".join(names))
        return 0
    until_s = time.monotonic() + LIMIT_S
    directory = Path(tempfile.mkdtemp(prefix="lorad-chaos-"))
    outcomes = _try_all([FAULTS[name] for name in names if name in FAULTS], directory, until_s)
    outcomes += [_search(name, until_s) for name in names if name in CAMPAIGNS]
    tried = [outcome for outcome in outcomes if outcome.was_tried]
    survived = [outcome for outcome in tried if outcome.why is None]
    print(f"survived {len(survived)} of {len(tried)} faults in {LIMIT_S - (until_s - time.monotonic()):.0f} s")
    if len(survived) < len(tried):
        print(f"their logs are in {directory}")
        return 1
    shutil.rmtree(directory, ignore_errors=True)
    return 0


def _try_all(faults: Sequence[Fault], directory: Path, until_s: float) -> list[Outcome]:
    if not faults:
        return []
    outcomes = []
    with Bench(directory) as bench:
        for one in faults:
            if time.monotonic() > until_s:
                outcomes.append(Outcome(one, 0.0, "no time was left to try it"))
            else:
                outcomes.append(attempt(one, bench))
            _tell(outcomes[-1], bench.lab_directory)
    return outcomes


def _search(name: str, until_s: float) -> Outcome:
    """Run one of the campaigns that look for faults by themselves."""
    path = CAMPAIGNS[name]
    one = Fault("5.1", name, lambda bench: None, CAMPAIGN_S, is_fast=False)
    began_s = time.monotonic()
    limit_s = min(CAMPAIGN_S, int(until_s - began_s))
    is_there = (REPOSITORY / path.partition("::")[0]).exists()
    if not is_there or limit_s < 10:
        outcome = Outcome(one, 0.0, f"{path} is not there, or no time is left", was_tried=is_there)
    else:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--hypothesis-profile=campaign", *_BRIEF, path]
        try:
            done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=limit_s, check=False)
        except subprocess.TimeoutExpired as late:
            told = (late.stdout or b"").decode(errors="replace")
            outcome = Outcome(one, limit_s, f"not over after {limit_s} s", told[-3000:])
        else:
            why = None if done.returncode == 0 else f"pytest ended with {done.returncode}"
            outcome = Outcome(one, time.monotonic() - began_s, why, done.stdout[-3000:])
    _tell(outcome, None)
    return outcome


def _tell(outcome: Outcome, logs: Path | None) -> None:
    """One line; of what was not survived also why, and the ends of the logs on stderr."""
    word = "not tried" if not outcome.was_tried else "survived" if outcome.why is None else "LOST"
    why = "" if outcome.why is None else f": {outcome.why}"
    print(f"{word:9} {outcome.fault.number:8} {outcome.fault.name} ({outcome.seconds:.0f} s){why}", flush=True)
    if outcome.why is None or not outcome.was_tried:
        return
    print(outcome.details, file=sys.stderr)
    for log in sorted(logs.glob("*.log")) if logs else []:
        last = log.read_text(errors="replace").splitlines()[-12:]
        print(f"--- {log}\n" + "\n".join(last), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
