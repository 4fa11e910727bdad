"""The results as Markdown: speed, latencies, how far answers agree, and the claims; and what makes a run invalid."""

from collections.abc import Sequence
from itertools import chain
from statistics import median

from benchmarks.serve.loads import summary
from benchmarks.serve.plan import SCENARIOS, Plan, Row
from benchmarks.serve.rounds import Result, Verdicts
from benchmarks.stats import Spread, paired_ratios, spread

OURS = "ours"


def speed_table(result: Result) -> str:
    """Tokens per second of each title in each scenario, and how many times as fast lorad's default row is."""
    shown = [
        scenario for scenario in SCENARIOS.values() if any(_row_for(result, t, scenario.name) for t in _titles(result))
    ]
    lines = [
        f"| tokens/s | {' | '.join(scenario.title for scenario in shown)} | peak memory |",
        f"|---|{'--:|' * (len(shown) + 1)}",
    ]
    for title in _titles(result):
        rows = [row for row in result.rows if row.title == title and row.scenarios]
        cells = [_speed(result, title, scenario.name) for scenario in shown]
        if rows:
            lines.append(f"| {_with_dtype(result, rows[0])} | {' | '.join(cells)} | {_memory(result, rows)} |")
    return "\n".join(lines)


def speed_notes(result: Result) -> list[str]:
    """Rows without any figure, and why."""
    return [
        f"{row.title} ({row.name}) was not measured: {answers[0].get('failed') or answers[0]['unavailable']}."
        for row in result.rows
        if (answers := result.answers[row.name]) and not any("rates" in answer for answer in answers)
    ]


def loads_notes(result: Result, plan: Plan) -> list[str]:
    """Cold adapters and the Zipf load, a sentence each."""
    lines = []
    if found := result.load(OURS, "cold"):
        warm, cold = (list(chain.from_iterable(one[key] for one in found)) for key in ("warm_ms", "cold_ms"))
        lines.append(
            f"- A cold adapter: {median(cold):.1f} ms to the first token against {median(warm):.1f} ms, so "
            f"**{cold_ms(result):+.1f} ms** at the median of {len(cold)} pairs of single requests (p99 cold: "
            f"{summary(cold)[1]:.1f} ms, warm: {summary(warm)[1]:.1f} ms). The files are in the page cache; their "
            "checksums are verified."
        )
    if found := result.load(OURS, "zipf"):
        last = found[-1]
        lines.append(
            f"- {plan.store_size} adapters in the store under Zipf's law (exponent {plan.zipf_exponent:g}), "
            f"{plan.num_prompts} callers at a time, {plan.zipf_requests} requests: "
            f"**{spread([one['tokens_per_second'] for one in found]):.0f} tokens/s** once warm, with one adapter "
            f"{spread([one['one_tokens_per_second'] for one in found]):.0f}. The same requests before, when most of "
            f"their {last['distinct']} adapters were asked for for the first time: "
            f"{spread([one['first_tokens_per_second'] for one in found]):.0f}."
        )
    return lines


def open_table(result: Result) -> str:
    """Time to first token and between tokens at each rate of arrivals, of lorad and vLLM; all rounds together."""
    rows = [row for row in result.rows if result.load(row.name, "open")]
    if not rows:
        return ""
    heads = [f"{row.title}: {what}" for row in rows for what in ("first token", "between tokens", "tokens/s")]
    lines = [f"| requests/s | {' | '.join(heads)} |", f"|--:|{'--:|' * len(heads)}"]
    rates = list(dict.fromkeys(chain.from_iterable(found for row in rows for found in result.load(row.name, "open"))))
    for rate in rates:
        cells = []
        for row in rows:
            found = [one[rate] for one in result.load(row.name, "open") if rate in one]
            if not found:
                cells += ["", "", ""]
                continue
            for key in ("first_ms", "gaps_ms"):
                p50, p99 = summary(list(chain.from_iterable(one[key] for one in found)))
                cells.append(f"{p50:.0f} / {p99:.0f} ms")
            cells.append(f"{median(one['tokens_per_second'] for one in found):.0f}")
        lines.append(f"| {rate} | {' | '.join(cells)} |")
    return "\n".join(lines)


def agreement_table(rows: Sequence[Row], verdicts: Verdicts) -> str:
    """Per title, the tokens that the merged fp32 model chooses too, the answers equal to the end, the greatest gap."""
    lines = [
        "| answers | tokens as the merged fp32 model's | answers equal to the end | greatest gap |",
        "|---|--:|--:|--:|",
    ]
    for title in dict.fromkeys(row.title for row in rows):
        found = [v for row in rows if row.title == title for v in verdicts.rows.get(row.name, {}).values()]
        if found:
            least, gap = min(v["share"] for v in found), max(v["gap"] for v in found)
            exact = f"{sum(v['exact'] for v in found):.0f} of {sum(v['answers'] for v in found):.0f}"
            lines.append(f"| {title} | {least:.2%} or more | {exact} | {gap:.4f} nats |")
    crossed = ", ".join(f"{SCENARIOS[name].title} {share:.1%}" for name, share in verdicts.crossed.items())
    return "\n".join([*lines, "", f"Told by the model of another adapter instead: {crossed}."])


def disagreements(rows: Sequence[Row], verdicts: Verdicts, plan: Plan) -> list[str]:
    """What makes timing worthless: no answers, answers that are not the model's, adapters that change too little."""
    problems = [f"{name} gave no answers: {why}" for name, why in verdicts.failures.items() if "FAILED" in why]
    for row in rows:
        for name, verdict in verdicts.rows.get(row.name, {}).items():
            where = f"{row.name}, {SCENARIOS[name].title}"
            if row.must_be_exact and not verdict["gap"] <= plan.max_gap:
                problems.append(f"{where}: a token is {verdict['gap']:.4f} nats off; allowed is {plan.max_gap:g}")
            if not verdict["share"] >= plan.min_agreement:
                problems.append(
                    f"{where}: {verdict['share']:.1%} of the tokens are the merged model's; at least "
                    f"{plan.min_agreement:.0%} are needed"
                )
    problems += [
        f"{SCENARIOS[name].title}: another adapter would give {share:.1%} of the tokens too, so that agreement means "
        f"little; allowed are {plan.max_crossed:.0%}"
        for name, share in verdicts.crossed.items()
        if not share <= plan.max_crossed
    ]
    return problems


def failures(result: Result) -> list[str]:
    """Processes that crashed; a program that is not installed is none."""
    return [
        f"{name} failed in round {number}: {answer['failed']}"
        for name, answers in result.answers.items()
        for number, answer in enumerate(answers, 1)
        if "failed" in answer
    ]


def cold_ms(result: Result) -> float | None:
    """The median, over all pairs, of what a cold adapter adds to the time to first token."""
    found = result.load(OURS, "cold")
    added = [c - w for one in found for c, w in zip(one["cold_ms"], one["warm_ms"], strict=True)]
    return median(added) if added else None


def claims(result: Result) -> list[str]:
    """What the project promises of serving, and whether this run shows it."""
    lines = []

    def claim(what: str, ratio: Spread | None, wanted: float, aim: float | None = None) -> None:
        if ratio is not None:
            more = f" (aim {aim:g}: {'reached' if ratio.median >= aim else 'not reached'})" if aim else ""
            lines.append(_line(f"{what}: {ratio:.2f} times; wanted {wanted:g}{more}", ratio.median >= wanted))

    def over(other: str, scenario: str, mine: str = "eight") -> Spread | None:
        return paired_ratios(result.rates(OURS, mine), result.rates(other, scenario)) if other else None

    def best(program: str, scenario: str) -> str:
        rows = result.with_figures(program, scenario)
        return max(rows, key=lambda row: _median(result.rates(row.name, scenario)) or 0).name if rows else ""

    claim("8 adapters, against vLLM with 8", over(best("vllm", "eight"), "eight"), 2.5, aim=3)
    claim("8 adapters, against PEFT's mixed batch in its best dtype", over(best("peft", "eight"), "eight"), 2.5)
    claim("8 adapters, against vLLM without LoRA on the base alone", over(best("vllm", "base"), "base"), 1)
    claim("8 adapters, against our base alone", over(OURS, "base"), 0.9)
    if (added := cold_ms(result)) is not None:
        lines.append(_line(f"a cold adapter adds {added:.1f} ms to the first token; allowed are 20", added <= 20))
    found = result.load(OURS, "zipf")
    rates = [[one[key] for one in found] for key in ("tokens_per_second", "one_tokens_per_second")]
    claim("adapters by Zipf's law, once warm, against one", paired_ratios(*rates), 0.9)
    return lines


def _line(what: str, is_reached: bool) -> str:
    return f"- {'reached' if is_reached else '**not reached**'}: {what}"


def _titles(result: Result) -> list[str]:
    return list(dict.fromkeys(row.title for row in result.rows))


def _row_for(result: Result, title: str, scenario: str) -> Row | None:
    """The row under this title that has a figure for the scenario."""
    rows = (row for row in result.rows if row.title == title and scenario in row.scenarios)
    return next((row for row in rows if _median(result.rates(row.name, scenario)) is not None), None)


def _speed(result: Result, title: str, scenario: str) -> str:
    """Tokens per second; in brackets how many times as fast lorad is in the same rounds."""
    if (row := _row_for(result, title, scenario)) is None:
        return ""
    rate = f"{_median(result.rates(row.name, scenario)):.0f}"
    ours = next((one for one in result.with_figures("ours", scenario) if not one.must_be_exact), None)
    if ours is None or ours is row:
        return rate
    ratio = paired_ratios(result.rates(ours.name, scenario), result.rates(row.name, scenario))
    return rate if ratio is None else f"{rate} ({ratio.median:.2f})"


def _with_dtype(result: Result, row: Row) -> str:
    dtype = next((answer["dtype"] for answer in result.answers[row.name] if "dtype" in answer), row.dtype)
    return f"{row.title} ({dtype})" if row.dtype == "auto" else row.title


def _memory(result: Result, rows: Sequence[Row]) -> str:
    sizes = [answer.get("peak_bytes", 0) for row in rows for answer in result.answers[row.name]]
    return f"{max(sizes) / 1e9:.2f} GB" if any(sizes) else ""


def _median(rates: Sequence[float | None]) -> float | None:
    known = [rate for rate in rates if rate is not None]
    return median(known) if known else None
