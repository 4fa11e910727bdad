"""What `make bench-serve` asks for and how it counts: loads, latencies, scenarios, and the adapters that it makes."""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks.serve import data, loads
from benchmarks.serve.loads import Heard
from benchmarks.serve.plan import FAMILIES, ROWS, SCENARIOS, Plan, Row, adapter_names, pairs
from benchmarks.stats import percentile
from tests.benchmarks.conftest import PLAN


def test_zipf_draws_follow_the_law() -> None:
    """Over many draws the first comes up about k times as often as number k, and every draw is in the store."""
    draws = loads.zipf(20_000, size=100, exponent=1.0, seed=3)

    often = Counter(draws)
    assert set(draws) <= set(range(100))
    # 20,000 draws: some 3,850 of number 0, with a standard deviation of 56; of number 9 a tenth, give or take 19.
    assert often[0] / often[1] == pytest.approx(2, rel=0.15)
    assert often[0] / often[9] == pytest.approx(10, rel=0.3)
    assert loads.zipf(50, size=100, exponent=1.0, seed=3) == draws[:50]
    assert loads.zipf(50, size=100, exponent=1.0, seed=4) != draws[:50]


def test_poisson_arrivals_have_their_rate_and_no_memory() -> None:
    """The number is about rate times seconds, gaps vary as much as their mean, and all lie in order before the end."""
    arrivals = loads.poisson_arrivals(50.0, seconds=100.0, seed=1)

    gaps = [after - before for before, after in pairwise(arrivals)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] < 100
    assert len(arrivals) == pytest.approx(5000, rel=0.05)  # the standard deviation is 71
    assert deviation == pytest.approx(mean, rel=0.1)


def test_the_slowest_rate_still_has_an_arrival() -> None:
    """However short the time, there is a request to measure, and it arrives within that time."""
    for seed in range(20):
        [first, *_] = loads.poisson_arrivals(0.01, seconds=2.0, seed=seed)
        assert 0 <= first < 2


def test_latency_counts_from_when_a_request_was_due() -> None:
    """First token since the arrival, gaps between pieces, all tokens over the time from first arrival to the end."""
    early = Heard(10.0, [10.5, 10.6, 10.8], num_tokens=3)
    late = Heard(11.0, [12.0, 14.0], num_tokens=5)

    found = loads.latencies([early, late])

    assert found["first_ms"] == [500.0, 1000.0]
    assert found["gaps_ms"] == [100.0, 200.0, 2000.0]
    assert found["tokens_per_second"] == 8 / 4.0


def test_runs_repeat_until_they_took_long_enough() -> None:
    """As many as the plan says of short runs; of long ones as many as it takes to have some seconds; always one."""
    plan = Plan(repeats=3, enough_s=6.0)

    assert loads.timed(lambda: 1.0, plan) == [1.0] * 3
    assert loads.timed(lambda: 4.0, plan) == [4.0] * 2
    assert loads.timed(lambda: 60.0, plan) == [60.0]


def test_percentiles_are_linear_between_two_values() -> None:
    """The middle of two is their mean; the ends are the least and the greatest; order does not matter."""
    values = [float(n) for n in range(101)]
    random.Random(0).shuffle(values)

    assert percentile([1.0, 3.0], 0.5) == 2.0
    assert [percentile(values, share) for share in (0.0, 0.5, 0.99, 1.0)] == [0, 50, 99, 100]
    with pytest.raises(ValueError, match="no value"):
        percentile([], 0.5)


def test_requests_of_a_scenario_go_round_its_adapters() -> None:
    """8 adapters over 16 prompts: each has two; without adapters there is none; `shift` names another."""
    prompts = [[number] for number in range(16)]

    eight = [adapter for _, adapter in pairs(SCENARIOS["eight"], prompts)]

    assert Counter(eight) == {f"qv-{number}": 2 for number in range(8)}
    assert {adapter for _, adapter in pairs(SCENARIOS["base"], prompts)} == {None}
    assert all(SCENARIOS["eight"].adapter(n, shift=1) != SCENARIOS["eight"].adapter(n) for n in range(16))


def test_the_store_holds_what_every_scenario_asks_for() -> None:
    """Also a quick run's small store; and it has no adapter twice."""
    names = adapter_names(store_size=40)

    wanted = {scenario.adapter(n) for scenario in SCENARIOS.values() for n in range(16)} - {None}
    assert wanted <= set(names)
    assert len(set(names)) == len(names)
    assert sum(name.startswith("qv-") for name in names) == 40


def test_values_survive_the_way_to_a_child() -> None:
    """A plan and every row are the same after JSON, and no two rows share a name."""
    assert Plan(**json.loads(json.dumps(Plan(rounds=9).to_json()))) == Plan(rounds=9)
    assert [Row.from_json(json.loads(json.dumps(row.to_json()))) for row in ROWS] == list(ROWS)
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_a_scenario_is_answered_exactly_once_by_each_title() -> None:
    """A column of the table has one figure a row: processes that share a title share out the scenarios."""
    answered = Counter((row.title, scenario) for row in ROWS for scenario in row.scenarios)

    assert set(answered.values()) == {1}


def test_only_the_exact_row_leaves_scenarios_untimed() -> None:
    """Every other row is timed in all that it answers, and every scenario is answered by an exact row."""
    exact = [row for row in ROWS if row.must_be_exact]

    assert {scenario for row in exact for scenario in row.scenarios} == set(SCENARIOS)
    assert all(row.timed == row.scenarios for row in ROWS if row not in exact)
    assert [row.timed for row in exact] == [("base", "eight"), ()]


def test_bundled_prompts_are_as_many_as_are_asked(tmp_path: Path) -> None:
    """Without GSM8K there are still 16 different prompts; with it, its questions; a directory without it is refused."""
    bundled = data.find(None, tmp_path, count=16)
    (tmp_path / data.FILE).write_text('{"question": "How many?", "answer": "4"}\n' * 20)

    assert len(set(bundled.texts)) == 16
    assert all(bundled.texts)
    assert data.find(tmp_path, tmp_path, count=16).texts == ["How many?"] * 16
    with pytest.raises(SystemExit, match="lacks"):
        data.find(tmp_path / "nowhere", tmp_path, count=16)


# PEFT asks Transformers for what is called something else now.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["qv-0", "mixed-4", "linear-1"])
def test_made_adapters_are_peft_adapters_of_the_planned_size(bench_work: Path, name: str) -> None:
    """PEFT loads each; merged, every module it targets moves by the planned share of its norm, and nothing else."""
    base = AutoModelForCausalLM.from_pretrained(bench_work / "base", dtype=torch.float32)
    before = {path: weight.clone() for path, weight in base.state_dict().items()}

    merged = PeftModel.from_pretrained(base, data.adapter_path(bench_work, name)).merge_and_unload()

    family, number = name.split("-")
    config = json.loads((data.adapter_path(bench_work, name) / "adapter_config.json").read_text())
    assert config["r"] == FAMILIES[family].rank(int(number))
    moved = {path: float((w - before[path]).norm() / before[path].norm()) for path, w in merged.state_dict().items()}
    touched = {path for path, share in moved.items() if share > 0}
    assert [moved[path] for path in touched] == pytest.approx([PLAN.update_shares[family]] * len(touched), rel=1e-3)
    assert {path.split(".")[-2] for path in touched} == (
        {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
        if family == "linear"
        else {"q_proj", "v_proj"}
    )
