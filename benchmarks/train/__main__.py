"""The benchmark from its command line to its tables; exits with 1 if a row crashed or the losses do not agree."""

import argparse
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from benchmarks import publish
from benchmarks.processes import ROOT
from benchmarks.train import data, report
from benchmarks.train.plan import GPU, QUICK, Plan, Section, sections
from benchmarks.train.rounds import Bench, JobsResult, SectionResult

MINUTES: Final = 25.0
PACKAGES: Final = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")


def main() -> None:
    options = _options()
    plan = Plan(threads=min(2, os.cpu_count() or 1))
    if options.device == "cuda":
        plan = replace(plan, **GPU)
    if options.quick:
        plan = replace(plan, **QUICK)
    if options.threads:
        plan = replace(plan, threads=options.threads)
    problems = data.find(options.data, ROOT)
    work = ROOT / "build" / "bench-train"
    work.mkdir(parents=True, exist_ok=True)

    budget_s = 1.0 if plan.device == "cpu" else 0.2
    bench = Bench(plan, work)
    prepared = bench.run("prepare", train=problems.train, valid=problems.valid)
    if "failed" in prepared:
        sys.exit(f"the data could not be prepared: {prepared['failed']}; see {bench.log.relative_to(ROOT)}")
    bench.say(f"prepared: {problems.name}")
    gemm = bench.run("gemm", budget_s=budget_s)
    results, jobs = bench.measure(_chosen(options), with_jobs=not options.no_jobs, minutes=options.minutes)
    gemm = _better(gemm, bench.run("gemm", budget_s=budget_s))

    text = _markdown(options, plan, problems.name, prepared, bench, gemm, results, jobs)
    wrong = [p for result in results for p in (*report.failures(result), *report.disagreements(result, plan))]
    wrong += report.job_disagreements(jobs, plan) if jobs else []
    record = {
        "command": _command(options),
        "date": publish.today(),
        "processor": prepared["processor"],
        "versions": publish.versions(PACKAGES),
        "data": problems.name,
        "plan": asdict(plan),
        "gemm": gemm,
        "sections": [asdict(result) for result in results],
        "jobs": asdict(jobs) if jobs else None,
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
    if options.quick or options.rows or options.no_jobs or options.device != "cpu":
        print("Only a full run on the CPU is published: docs/benchmarks.md is as it was.")
        return
    publish.publish("train", text, record)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-train", description=__doc__)
    parser.add_argument("--data", type=Path, help=f"directory with {' and '.join(data.FILES)}")
    parser.add_argument("--quick", action="store_true", help="few steps, one round: does every row work?")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="rounds are added as long as they should fit")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where everybody trains")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows")
    parser.add_argument("--no-jobs", action="store_true", help="leave the small jobs out")
    return parser.parse_args()


def _command(options: argparse.Namespace) -> str:
    """As typed, but for the path of the data, which is a matter of the machine."""
    given = {
        "DATA=dir": options.data,
        "DEVICE=cuda": options.device == "cuda",
        "QUICK=1": options.quick,
        f"MINUTES={options.minutes:g}": options.minutes != MINUTES,
        f"THREADS={options.threads}": options.threads,
    }
    return " ".join(["make bench-train", *(text for text, is_given in given.items() if is_given)])


def _chosen(options: argparse.Namespace) -> list[Section]:
    chosen = [
        replace(section, rows=tuple(row for row in section.rows if not options.rows or row.name in options.rows))
        for section in sections(quick=options.quick, device=options.device)
    ]
    known = {row.name for section in sections(device=options.device) for row in section.rows}
    if unknown := set(options.rows or []) - known:
        sys.exit(f"no such rows: {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    return [section for section in chosen if section.rows]


def _better(first: report.Gemm, second: report.Gemm) -> report.Gemm:
    dtypes = ("float32", "bfloat16")
    return {d: max(first[d], second[d], key=lambda measured: measured["flops_per_second"]) for d in dtypes}


def _markdown(
    options: argparse.Namespace,
    plan: Plan,
    data_name: str,
    prepared: dict[str, Any],
    bench: Bench,
    gemm: report.Gemm,
    results: list[SectionResult],
    jobs: JobsResult | None,
) -> str:
    num_rounds = max(len(answers) for result in results for answers in result.answers.values())
    installed = ", ".join(f"{name} {version}" for name, version in publish.versions(PACKAGES).items())
    parts = [
        f"`{_command(options)}`, {publish.today()}, {prepared['processor']}, {plan.threads} threads; {installed}.",
        f"Data: {data_name}. Batch {plan.batch_size}, r {plan.r}, alpha {plan.alpha}, learning rate "
        f"{plan.learning_rate:g} falling linearly, steps of warm-up: {plan.warmup_steps}, timed: {plan.timed_steps}"
        f"; rounds: {num_rounds}. Figures are medians over rounds, with the range in brackets.",
        f"The machine's matrix products: {_gemm(gemm)}.",
    ]
    samples = data.read_tokens(bench.work, "train")
    for result in results:
        ours = result.fastest(lambda row: row.role == "ours")
        parts.append(report.section_table(result, ours or result.section.rows[-1]))
        shares = [report.peak_share(result, ours, samples, prepared["config"], plan, gemm)] if ours else []
        parts.append("\n".join(report.section_notes(result, plan) + shares))
    if jobs is not None:
        parts.append(report.jobs_table(jobs))
        memory = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in jobs.peak_bytes.items())
        parts.append(
            f"Each small job: {plan.job_samples} samples in batches of {plan.job_batch_size}, its own samples, seed "
            f"and rank. Seconds from the start of the process; in brackets from the loaded base. Peak memory: {memory}."
        )
    return "\n\n".join([*parts, "\n".join(report.claims(results, jobs))])


def _gemm(gemm: report.Gemm) -> str:
    return "; ".join(f"{d} {m['flops_per_second'] / 1e9:.0f} GFLOP/s ({m['shape']})" for d, m in gemm.items())


if __name__ == "__main__":
    main()
