"""The results as Markdown: one table a section, the small jobs, the claims, and what it was measured on."""

from collections.abc import Sequence
from typing import Any

from benchmarks.stats import off_by_more, paired_ratios, spread
from benchmarks.train.flops import Shape, training_flops
from benchmarks.train.plan import Plan, Row
from benchmarks.train.rounds import JobsResult, SectionResult

Gemm = dict[str, dict[str, Any]]


def section_table(result: SectionResult, ours: Row) -> str:
    """Rows with figures, and what kept a row from having any."""
    lines = [
        f"| target modules: {result.section.name} | tokens/s | label tokens/s | peak memory | final loss | "
        f"{ours.title}: times as fast |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in result.section.rows:
        answers = result.answers[row.name]
        good = [answer for answer in answers if "tokens_per_second" in answer]
        if not good:
            why = next(answer.get("failed") or answer["unavailable"] for answer in answers)
            lines.append(f"| {row.title} | not measured: {_cell(why)} | | | | |")
            continue
        ratio = paired_ratios(result.rates(ours.name), result.rates(row.name))
        loss = result.losses.get(row.name)
        without = (
            f" (without {', '.join(good[0]['left_out'])}, which this version lacks)" if good[0]["left_out"] else ""
        )
        lines.append(
            f"| {row.title}{without} | {spread([a['tokens_per_second'] for a in good]):.0f} "
            f"| {spread([a['labels_per_second'] for a in good]).median:.0f} "
            f"| {max(a['peak_bytes'] for a in good) / 1e9:.2f} GB "
            f"| {'none' if loss is None else f'{loss:.4f}'} "
            f"| {'none' if ratio is None else f'{ratio:.2f}'} |"
        )
    return "\n".join(lines)


def section_notes(result: SectionResult, plan: Plan) -> list[str]:
    """How far the losses agree, in one sentence."""
    losses = {name: loss for name, loss in result.losses.items() if name != "base"}
    if not losses:
        return ["There are no losses to compare."]
    return [
        f"Validation loss of the base alone: {result.losses['base']:.4f}; the rows span "
        f"{min(losses.values()):.4f} to {max(losses.values()):.4f} (tolerance: {plan.tolerance:g} from the median)."
    ]


def disagreements(result: SectionResult, plan: Plan) -> list[str]:
    """Rows whose loss is off, is missing though they trained, or is no better than the base's."""
    losses = {name: loss for name, loss in result.losses.items() if name != "base"}
    trained = {name for name, answers in result.answers.items() if any("steps" in answer for answer in answers)}
    where = f"{result.section.name}: "
    problems = [f"{where}{name} has no validation loss" for name in sorted(trained - losses.keys())]
    problems += [
        f"{where}{name} has loss {losses[name]:.4f}, {distance:+.4f} from the median; allowed is {plan.tolerance:g}"
        for name, distance in off_by_more(losses, plan.tolerance).items()
    ]
    problems += [
        f"{where}{name} has loss {loss:.4f}, hardly better than the base's {result.losses['base']:.4f}: "
        "it did not train, and agreement would mean nothing"
        for name, loss in losses.items()
        if not loss < result.losses["base"] - 2 * plan.tolerance
    ]
    steps = {name: answers[0]["steps"] for name, answers in result.answers.items() if "steps" in answers[0]}
    problems += [
        f"{where}{name} made {made} optimizer steps, not {plan.num_steps}"
        for name, made in steps.items()
        if made != plan.num_steps
    ]
    return problems


def failures(result: SectionResult) -> list[str]:
    """Rows that crashed; a feature that the installed peer lacks is none."""
    return [
        f"{result.section.name}: {name} failed: {answer['failed']}"
        for name, answers in result.answers.items()
        for answer in answers[:1]
        if "failed" in answer
    ]


def jobs_table(result: JobsResult) -> str:
    """Makespans with model loads, and without them in brackets; ratios of the same round."""
    lines = [
        f"| small jobs | {result.ours.title}: at once | one after the other | {result.peer.title}, one process a job "
        "| at once against one after the other | at once against PEFT |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for n in result.at_once:
        columns = [
            (result.at_once[n], result.at_once_loaded[n]),
            (result.one_by_one[n], result.one_by_one_loaded[n]),
            (result.peer_serial[n], result.peer_serial_loaded[n]),
        ]
        times = [f"{_seconds(whole)} ({_seconds(loaded)})" for whole, loaded in columns]
        ratios = [f"{_ratio(columns[k][0], columns[0][0])} ({_ratio(columns[k][1], columns[0][1])})" for k in (1, 2)]
        lines.append(f"| {n} | {' | '.join(times + ratios)} |")
    return "\n".join(lines)


def job_disagreements(result: JobsResult, plan: Plan) -> list[str]:
    """Small jobs whose fused adapter differs from PEFT's by more than the tolerance, and programs that failed."""
    problems = [f"small jobs, {failure}" for failure in result.failures]
    for job in range(plan.jobs):
        ours, theirs = (result.losses.get(f"{program}/job-{job}") for program in ("at-once", "peer"))
        if ours is None or theirs is None:
            problems.append(f"small job {job} has no validation loss to compare")
        elif not abs(ours - theirs) <= plan.job_tolerance:
            problems.append(
                f"small job {job}: loss {ours:.4f} at once, {theirs:.4f} in PEFT; allowed is {plan.job_tolerance:g}"
            )
    return problems


def peak_share(
    result: SectionResult,
    row: Row,
    samples: Sequence[dict[str, list[int]]],
    config: dict[str, Any],
    plan: Plan,
    gemm: Gemm,
) -> str:
    """A sentence: the operations per token that this section needs, and the share of the machine's peak reached."""
    timed = samples[plan.warmup_steps * plan.batch_size :]
    num_labels = sum(label != -100 for sample in timed for label in sample["labels"])
    lengths = [len(sample["input_ids"]) for sample in timed]
    needed = training_flops(Shape.of(config), lengths, num_labels, targets=result.section.targets, r=plan.r)
    per_token = needed / sum(lengths)
    rate = spread([rate for rate in result.rates(row.name) if rate is not None]).median
    reached = rate * per_token / gemm[row.dtype]["flops_per_second"]
    return (
        f"{row.title} on {result.section.name}: {per_token / 1e6:.0f} MFLOP a token, "
        f"{rate * per_token / 1e9:.0f} GFLOP/s, {reached:.0%} of the machine's {row.dtype} product peak."
    )


def claims(results: Sequence[SectionResult], jobs: JobsResult | None) -> list[str]:
    """What the project promises of its training, and whether this run shows it."""
    lines = []
    for result in results:
        ours = result.fastest(lambda row: row.role == "ours")
        written = result.fastest(lambda row: row.role == "as written" and row.program == "peft")
        peer = result.fastest(lambda row: row.role != "ours")
        for wanted, other, what in (
            (3.0, written, "PEFT as written in its best dtype"),
            (1.5, peer, "the fastest peer"),
        ):
            if ours and other and (ratio := paired_ratios(result.rates(ours.name), result.rates(other.name))):
                what = f"{result.section.name}: {ratio:.2f} times {what} ({other.name}); wanted {wanted}"
                lines.append(_claim(what, ratio.median >= wanted))
        whole = [_peak(result, row) for row in result.section.rows if row.takes_whole_batch and _peak(result, row)]
        if ours and whole:
            share = _peak(result, ours) / min(whole)
            what = f"{result.section.name}: {share:.2f} of the memory of the leanest row that takes the whole batch"
            lines.append(_claim(f"{what}; wanted 0.5", share <= 0.5))
    if jobs is not None:
        n = max(jobs.at_once)
        for name, ours_s, peer_s in (
            ("with loading", jobs.at_once[n], jobs.peer_serial[n]),
            ("without loading", jobs.at_once_loaded[n], jobs.peer_serial_loaded[n]),
        ):
            if ratio := paired_ratios(peer_s, ours_s):
                what = f"{n} small jobs at once, {name}: {ratio:.2f} times as fast as PEFT one by one; wanted 4"
                lines.append(_claim(what, ratio.median >= 4))
    return lines


def _claim(what: str, is_reached: bool) -> str:
    return f"- {'reached' if is_reached else '**not reached**'}: {what}"


def _peak(result: SectionResult, row: Row) -> int:
    return max((answer.get("peak_bytes", 0) for answer in result.answers[row.name]), default=0)


def _seconds(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{spread(known).median:.1f} s" if known else "none"


def _ratio(theirs: Sequence[float | None], ours: Sequence[float | None]) -> str:
    ratio = paired_ratios(theirs, ours)
    return "none" if ratio is None else f"{ratio:.2f}"


def _cell(text: str) -> str:
    return text.replace("|", "/")
