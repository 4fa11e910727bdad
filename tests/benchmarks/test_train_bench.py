"""The arithmetic of `make bench-train`: operation counts, paired ratios, token rates, and where results go."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.publish import markers, put_between_markers
from benchmarks.stats import off_by_more, paired_ratios, spread
from benchmarks.train.flops import Shape, training_flops
from benchmarks.train.meter import StepClock
from benchmarks.train.plan import Plan, Row, sections

CONFIG = {
    "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 80, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 128,
}  # fmt: skip


def test_forward_and_backward_to_inputs_is_what_torch_counts() -> None:
    """Without adapters and attention, the formula is what torch's own counter sees in a frozen model's training."""
    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="eager")).requires_grad_(False)
    num_tokens = 12
    embedded = torch.randn(1, num_tokens, 32)
    # Something trainable behind the first block's q, k and v, as adapters there would be.
    attention = model.model.layers[0].self_attn
    for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
        projection.register_forward_hook(lambda module, args, out: out + torch.zeros(1, requires_grad=True))

    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()

    formula = training_flops(Shape.of(CONFIG), [num_tokens], num_tokens, targets=[], r=8)
    causal, dense = (6 * 3 * 4 * 8 * num_tokens * seen for seen in (num_tokens + 1, 2 * num_tokens))
    assert counter.get_total_flops() - dense == formula - causal


def test_an_adapter_costs_three_pairs_of_products() -> None:
    """Per token and module 6 r (in + out): A and B forward, and each twice backward."""
    shape = Shape.of(CONFIG)

    bare = training_flops(shape, [5], 2, targets=[], r=4)
    adapted = training_flops(shape, [5], 2, targets=["v_proj"], r=4)

    assert adapted - bare == 5 * 3 * 6 * 4 * (32 + 16)


def test_labels_are_what_the_head_costs() -> None:
    """A token without a label does not meet the head."""
    shape = Shape.of(CONFIG)

    with_more = training_flops(shape, [5], 3, targets=[], r=4)
    with_less = training_flops(shape, [5], 2, targets=[], r=4)

    assert with_more - with_less == 4 * 32 * 128


def test_two_samples_cost_less_attention_than_one_of_their_length() -> None:
    """Attention is counted within a sample only."""
    shape = Shape.of(CONFIG)

    assert training_flops(shape, [5, 5], 2, targets=[], r=4) < training_flops(shape, [10], 2, targets=[], r=4)


def test_ratios_are_taken_within_a_round() -> None:
    """A round in which everything is half as fast leaves the ratio as it is."""
    assert paired_ratios([100.0, 50.0, 100.0], [20.0, 10.0, 20.0]) == spread([5.0])


def test_a_round_with_a_gap_does_not_count() -> None:
    """Only rounds with both figures make ratios; without any there is none."""
    assert paired_ratios([100.0, None], [50.0, 1.0]) == spread([2.0])
    assert paired_ratios([None], [1.0]) is None


def test_a_value_far_from_the_median_is_named() -> None:
    """Off means further than the tolerance from the median, either way; NaN is always off."""
    values = {"a": 1.0, "b": 1.01, "c": 1.2, "d": 0.99, "e": math.nan}

    assert off_by_more(values, 0.05).keys() == {"c", "e"}
    assert off_by_more({"a": 1.0, "b": 1.01}, 0.05) == {}


def test_warm_up_is_in_neither_time_nor_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one step of warm-up, the first step's seconds and tokens do not count; nor do batches fetched ahead."""
    clock = StepClock()
    times = iter([10.0, 12.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    for num_tokens in (1000, 1000, 30, 10, 30, 10, 99):
        clock.saw(num_tokens, num_tokens // 10)
    for _ in range(3):
        clock.tick()

    result = clock.result(Plan(warmup_steps=1, timed_steps=2))

    assert (result["num_tokens"], result["num_labels"], result["seconds"]) == (80, 8, 4.0)
    assert result["tokens_per_second"] == 20.0


def test_results_replace_what_stands_between_the_markers() -> None:
    """What stands around them stays; a page without them is refused."""
    start, end = markers("train")
    page = f"before\n{start}\nold\n{end}\nafter\n"

    new = put_between_markers(page, "new", name="train")

    assert new == f"before\n{start}\n\nnew\n\n{end}\nafter\n"
    assert put_between_markers(new, "new", name="train") == new
    with pytest.raises(ValueError, match="once each"):
        put_between_markers("no markers", "new", name="train")


def test_values_survive_the_way_to_a_child() -> None:
    """A plan and every row are the same after JSON."""
    assert Plan(**Plan(rounds=9).to_json()) == Plan(rounds=9)
    for section in (*sections(), *sections(device="cuda")):
        assert [Row(**row.to_json()) for row in section.rows] == list(section.rows)


def test_a_gpu_is_waited_for_where_timing_begins_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps in between end when their last kernel was started: waiting for each would slow every program down."""
    waits: list[int] = []
    clock = StepClock.of(Plan(device="cuda", warmup_steps=2, timed_steps=3))
    monkeypatch.setattr("torch.cuda.synchronize", lambda: waits.append(len(clock.ended_s)))
    for _ in range(5):
        clock.tick()

    assert waits == [1, 4]
