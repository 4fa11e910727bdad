"""The order of measurements: rounds over all rows and the small jobs in turn; the judge after the first."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.processes import Runner
from benchmarks.train.plan import Plan, Row, Section, Targets

Answers = dict[str, list[dict[str, Any]]]
"""Row -> its answers, round by round."""
ADAPTER_FILE: Final = "adapter_model.safetensors"


@dataclass
class SectionResult:
    """What was measured of one section. `losses` holds the base's under "base"."""

    section: Section
    answers: Answers = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)

    def rates(self, row: str) -> list[float | None]:
        return [answer.get("tokens_per_second") for answer in self.answers[row]]

    def fastest(self, choose: Callable[[Row], bool]) -> Row | None:
        """The row with the highest median of tokens per second among those chosen; None if none has a figure."""
        measured = [
            (median(known), row)
            for row in self.section.rows
            if choose(row) and (known := [rate for rate in self.rates(row.name) if rate is not None])
        ]
        return max(measured, key=lambda pair: pair[0])[1] if measured else None


@dataclass
class JobsResult:
    """Makespans of N small jobs in seconds, round by round: `at_once[n]`, and running totals for the serial programs.

    `*_loaded` start at the loaded base model, the others at the start of the process.
    """

    peer: Row
    ours: Row
    at_once: dict[int, list[float | None]] = field(default_factory=dict)
    at_once_loaded: dict[int, list[float | None]] = field(default_factory=dict)
    one_by_one: dict[int, list[float | None]] = field(default_factory=dict)
    one_by_one_loaded: dict[int, list[float | None]] = field(default_factory=dict)
    peer_serial: dict[int, list[float | None]] = field(default_factory=dict)
    peer_serial_loaded: dict[int, list[float | None]] = field(default_factory=dict)
    peak_bytes: dict[str, int] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def tables(self) -> tuple[dict[int, list[float | None]], ...]:
        """All makespans."""
        return (
            self.at_once,
            self.at_once_loaded,
            self.one_by_one,
            self.one_by_one_loaded,
            self.peer_serial,
            self.peer_serial_loaded,
        )


class Bench(Runner):
    """One benchmark run over prepared data. Prints a line for each process that ends."""

    def __init__(self, plan: Plan, work: Path) -> None:
        super().__init__("benchmarks.train.child", {"plan": plan.to_json()}, threads=plan.threads, work=work)
        self.plan = plan
        self.adapters = work / "adapters"
        shutil.rmtree(self.adapters, ignore_errors=True)

    def measure(
        self, sections: Sequence[Section], *, with_jobs: bool, minutes: float
    ) -> tuple[list[SectionResult], JobsResult | None]:
        """At least one round of everything; another one as long as it should fit into `minutes`, up to the plan's.

        The adapters of the first round are judged right after it: the same seed gives the same ones again.
        """
        results = [SectionResult(section, {row.name: [] for row in section.rows}) for section in sections]
        jobs: JobsResult | None = None
        for number in range(1, self.plan.rounds + 1):
            started_s = self.elapsed_s()
            for result in results:
                self._round_of_rows(result, number)
            if number == 1 and with_jobs:
                jobs = self._choose_job_rows(results[0])
            if jobs is not None:
                self._round_of_jobs(jobs, number, results[0].section.targets)
            round_s = self.elapsed_s() - started_s
            if number == 1:
                self._judge(results, jobs)
            if self.elapsed_s() + round_s > 60 * minutes:
                break
        return results, jobs

    def _round_of_rows(self, result: SectionResult, number: int) -> None:
        for row in result.section.rows:
            adapter = self._row_adapter(result.section, row, number)
            adapter.parent.mkdir(parents=True)
            answer = self.run(
                f"{row.program}-row", row=row.to_json(), targets=result.section.targets, adapter=str(adapter)
            )
            result.answers[row.name].append(answer)
            self.say(f"{result.section.name}, round {number}, {row.name}: {_in_short(answer)}")

    def _choose_job_rows(self, first: SectionResult) -> JobsResult | None:
        """PEFT as people write it and lorad, each in the dtype in which it was the faster."""
        peer = first.fastest(lambda row: row.program == "peft" and row.role == "as written")
        ours = first.fastest(lambda row: row.role == "ours")
        if peer is None or ours is None:
            self.say("small jobs are left out: no PEFT row as written, or none of ours, has a figure")
            return None
        result = JobsResult(peer, ours)
        for table in result.tables():
            table.update({n: [] for n in self.plan.job_counts})
        return result

    def _round_of_jobs(self, result: JobsResult, number: int, targets: Targets) -> None:
        """Small jobs at once in one engine, one after the other in one engine, and as PEFT processes one by one."""
        self._jobs_at_once(result, number, targets)
        self._jobs_one_by_one(result, number, targets)
        self._jobs_of_peer(result, number, targets)

    def _judge(self, results: Sequence[SectionResult], jobs: JobsResult | None) -> None:
        for result in results:
            places = {row.name: self._row_adapter(result.section, row, 1) for row in result.section.rows}
            result.losses = self._losses(places, self.plan.num_valid)
            self.say(f"{result.section.name}: validation losses {_rounded(result.losses)}")
        if jobs is not None:
            programs, numbers = ("at-once", "peer"), range(self.plan.jobs)
            places = {f"{p}/job-{job}": self._job_adapters(p, 1) / f"job-{job}" for p in programs for job in numbers}
            jobs.losses = self._losses(places, self.plan.job_valid)
            self.say(f"small jobs: validation losses {_rounded(jobs.losses)}")

    def _jobs_at_once(self, result: JobsResult, number: int, targets: Targets) -> None:
        for n in result.at_once:
            directory = self._job_adapters("at-once" if n == self.plan.jobs else f"at-once-{n}", number)
            answer = self._ours(result, directory, targets, n, at_once=True)
            seconds = answer.get("seconds")
            result.at_once[n].append(answer["wall_s"] if seconds else None)
            result.at_once_loaded[n].append(max(seconds) if seconds else None)
            self._note(result, "at once", answer)
            self.say(f"jobs, round {number}, {n} at once: {_makespan(answer)}")

    def _jobs_one_by_one(self, result: JobsResult, number: int, targets: Targets) -> None:
        """Prefixes of one run of all jobs are the runs of fewer: a later job cannot touch an earlier one's time."""
        answer = self._ours(result, self._job_adapters("serial", number), targets, self.plan.jobs, at_once=False)
        seconds = answer.get("seconds")
        for n in result.one_by_one:
            loaded = seconds[n - 1] if seconds else None
            result.one_by_one_loaded[n].append(loaded)
            result.one_by_one[n].append(answer["wall_s"] - seconds[-1] + loaded if loaded is not None else None)
        self._note(result, "one by one", answer)
        self.say(f"jobs, round {number}, {self.plan.jobs} one by one: {_makespan(answer)}")

    def _jobs_of_peer(self, result: JobsResult, number: int, targets: Targets) -> None:
        walls: list[float | None] = []
        loaded: list[float | None] = []
        for job in range(self.plan.jobs):
            adapter = self._job_adapters("peer", number) / f"job-{job}"
            adapter.parent.mkdir(parents=True, exist_ok=True)
            answer = self.run("peft-job", row=result.peer.to_json(), targets=targets, adapter=str(adapter), job=job)
            walls.append(answer.get("wall_s") if "seconds" in answer else None)
            loaded.append(answer.get("seconds"))
            self._note(result, "PEFT", answer)
            self.say(f"jobs, round {number}, {result.peer.name} job {job}: {_makespan(answer)}")
        for n in result.peer_serial:
            result.peer_serial[n].append(_sum(walls[:n]))
            result.peer_serial_loaded[n].append(_sum(loaded[:n]))

    def _ours(
        self, result: JobsResult, directory: Path, targets: Targets, jobs: int, *, at_once: bool
    ) -> dict[str, Any]:
        return self.run(
            "ours-jobs",
            row=result.ours.to_json(),
            targets=targets,
            adapter=str(directory),
            jobs=jobs,
            at_once=at_once,
        )

    def _row_adapter(self, section: Section, row: Row, number: int) -> Path:
        return self.adapters / section.name / f"{row.name}-{number}" / "adapter"

    def _job_adapters(self, program: str, number: int) -> Path:
        return self.adapters / "jobs" / f"{program}-{number}"

    def _note(self, result: JobsResult, program: str, answer: dict[str, Any]) -> None:
        if "peak_bytes" in answer:
            result.peak_bytes[program] = max(result.peak_bytes.get(program, 0), answer["peak_bytes"])
        else:
            result.failures.append(f"{program}: {answer.get('failed') or answer.get('unavailable')}")

    def _losses(self, places: dict[str, Path], num_valid: int) -> dict[str, float]:
        """Of the base and of all adapters that were written."""
        adapters = {name: str(path) for name, path in places.items() if (path / ADAPTER_FILE).is_file()}
        answer = self.run("evaluate", adapters=adapters, num_valid=num_valid)
        if "losses" not in answer:
            self.say(f"the evaluation failed: {answer}")
        return dict(answer.get("losses", {}))


def _sum(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _in_short(answer: dict[str, Any]) -> str:
    if "tokens_per_second" not in answer:
        return _makespan(answer)
    memory, rate = answer["peak_bytes"] / 1e9, answer["tokens_per_second"]
    left_out = f", without {', '.join(answer['left_out'])}: not in this version" if answer["left_out"] else ""
    return f"{rate:.0f} tokens/s, {memory:.2f} GB, {answer['wall_s']:.0f} s in all{left_out}"


def _makespan(answer: dict[str, Any]) -> str:
    if "seconds" not in answer:
        return "FAILED: " + answer["failed"] if "failed" in answer else "not available: " + answer["unavailable"]
    seconds = answer["seconds"]
    trained = max(seconds) if isinstance(seconds, list) else seconds
    return f"{trained:.1f} s once loaded, {answer['wall_s']:.1f} s in all"


def _rounded(losses: dict[str, float]) -> dict[str, float]:
    return {name: round(loss, 4) for name, loss in losses.items()}
