"""The order of measurements: everybody's answers, the judge, then rounds over all rows in turn."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.processes import Runner
from benchmarks.serve import vllm_peer
from benchmarks.serve.plan import SCENARIOS, Plan, Row
from benchmarks.stats import paired_ratios

MARGIN: Final = 1.3


@dataclass
class Verdicts:
    """How far the rows' answers are those of the merged fp32 model: row -> scenario -> the judge's figures.

    `crossed`: per scenario, how far they would be those of another adapter. `failures`: why a row has no answers.
    """

    rows: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    crossed: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)


@dataclass
class Result:
    """What was measured: row -> its answers, round by round."""

    rows: tuple[Row, ...]
    answers: dict[str, list[dict[str, Any]]]

    def rates(self, row: str, scenario: str) -> list[float | None]:
        """Tokens per second, round by round; None where a round has no figure."""
        return [answer.get("rates", {}).get(scenario) for answer in self.answers.get(row, [])]

    def beaten(self) -> set[str]:
        """Rows that another row of their program beats by `MARGIN` in everything that they are timed in."""
        return {
            slow.name
            for slow in self.rows
            for fast in self.rows
            if fast.program == slow.program and slow.timed and not slow.loads and set(slow.timed) <= set(fast.timed)
            if all(self._is_beaten(slow.name, fast.name, scenario) for scenario in slow.timed)
        }

    def _is_beaten(self, slow: str, fast: str, scenario: str) -> bool:
        ratio = paired_ratios(self.rates(fast, scenario), self.rates(slow, scenario))
        return ratio is not None and ratio.median > MARGIN

    def with_figures(self, program: str, scenario: str) -> list[Row]:
        """The rows of a program that have a figure for the scenario."""
        return [
            row
            for row in self.rows
            if row.program == program and any(rate is not None for rate in self.rates(row.name, scenario))
        ]

    def load(self, row: str, name: str) -> list[dict[str, Any]]:
        """What the rounds that met this load found."""
        return [answer[name] for answer in self.answers.get(row, []) if name in answer]


class Bench(Runner):
    """One benchmark run over prepared data. Prints a line for each process that ends."""

    def __init__(self, plan: Plan, work: Path) -> None:
        super().__init__("benchmarks.serve.child", {"plan": plan.to_json()}, threads=plan.threads, work=work)
        self.plan = plan

    def run_row(self, row: Row, mode: str, **request: Any) -> dict[str, Any]:
        """The answer of a row's process; unavailable where its program is not installed."""
        python, variables = sys.executable, {}
        if row.needs_vllm:
            if self.plan.device != "cpu":
                return {"unavailable": "vLLM's CPU build runs on the CPU only"}
            python = str(vllm_peer.ENVIRONMENT / "bin" / "python")
            if not Path(python).is_file():
                return {"unavailable": "vLLM is not installed"}
            variables = vllm_peer.variables(self.plan.threads)
        return self.run(row.program, python=python, variables=variables, row=row.to_json(), mode=mode, **request)

    def compare(self, rows: Sequence[Row]) -> Verdicts:
        """Have every row with scenarios answer them, and the judge say whether the answers are right; no timing."""
        verdicts = Verdicts()
        answers: dict[str, Any] = {}
        for row in rows:
            if not row.scenarios:
                continue
            answer = self.run_row(row, "answers")
            if "answers" in answer:
                answers[row.name] = answer["answers"]
            else:
                verdicts.failures[row.name] = _why(answer)
            self.say(f"answers of {row.name}: {'got' if 'answers' in answer else _why(answer)}")
        path = self.work / "answers.json"
        path.write_text(json.dumps(answers))
        crossed = [row.name for row in rows if row.must_be_exact and row.name in answers]
        found = self.run("judge", answers=str(path), crossed_rows=crossed)
        if "rows" not in found:
            verdicts.failures["judge"] = _why(found)
            return verdicts
        verdicts.rows, verdicts.crossed = found["rows"], found["crossed"]
        self.say("judged: " + ", ".join(f"{row} {_least(found):.1%}" for row, found in verdicts.rows.items()))
        return verdicts

    def measure(self, rows: Sequence[Row], *, minutes: float) -> Result:
        """At least one round of all rows; another as long as it should fit into `minutes`, up to the plan's.

        Later rounds leave out the dtype in which a program turned out to be slow: their answer is empty.
        """
        result = Result(tuple(rows), {row.name: [] for row in rows})
        for number in range(1, self.plan.rounds + 1):
            started_s = self.elapsed_s()
            beaten = result.beaten()
            for row in rows:
                if not row.timed and not row.loads:
                    continue
                if row.name in beaten:
                    result.answers[row.name].append({})
                    continue
                answer = self.run_row(row, "time", number=number)
                result.answers[row.name].append(answer)
                self.say(f"round {number}, {row.name}: {_in_short(answer)}")
            round_s = self.elapsed_s() - started_s
            if self.elapsed_s() + round_s > 60 * minutes:
                break
        return result


def _least(scenarios: dict[str, dict[str, float]]) -> float:
    return min(verdict["share"] for verdict in scenarios.values())


def _in_short(answer: dict[str, Any]) -> str:
    if "rates" not in answer:
        return _why(answer)
    rates = [f"{SCENARIOS[name].title} {rate:.0f}" for name, rate in answer["rates"].items()]
    rates += [name for name in ("cold", "zipf", "open") if name in answer]
    return f"{', '.join(rates)}; {answer['wall_s']:.0f} s in all"


def _why(answer: dict[str, Any]) -> str:
    return f"FAILED: {answer['failed']}" if "failed" in answer else f"not available: {answer['unavailable']}"
