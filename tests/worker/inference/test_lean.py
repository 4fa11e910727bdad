"""Decoder layers of Llama's kind in their lean form, against Transformers' own forward of the same layers."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.worker.inference.test_forward import tiny
from tests.worker.test_attention import CONFIGS, VOCAB, WINDOW
from worker import attention
from worker.base_model import BaseModel
from worker.inference.compiled import CompiledLayer
from worker.inference.forward import Piece, RowForward
from worker.inference.lean import LeanLayer

pytestmark = pytest.mark.usefixtures("computed_by")
LEAN = ("llama", "mistral", "qwen2")
LENGTHS = (1, 3, 2 * WINDOW, 17)
# Float32 sums in another order; the logits are of order 1 to 10.
CLOSE = {"atol": 2e-5, "rtol": 2e-5}


def forward_of(model: Any, *, compiles: bool = True) -> RowForward:
    base = BaseModel(
        model=model, tokenizer=None, name="tiny", digest="", context_length=model.config.max_position_embeddings,
        architecture=model.config.model_type, eos_token_ids=frozenset(), device=torch.device("cpu"), dtype=model.dtype,
    )  # fmt: skip
    return RowForward(base, max_rows=4, cache_bytes=1 << 24, compiles=compiles)


def lean_layers(model: Any) -> list[bool]:
    return [isinstance(layer.forward, LeanLayer | CompiledLayer) for layer in model.model.layers]


def read_all(forward: RowForward, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits after the prompts, and after each of three tokens more."""
    rows = [forward.add_row(64) for _ in prompts]
    steps = [forward.step([Piece(row, ids, ()) for row, ids in zip(rows, prompts, strict=True) if row is not None])]
    steps += [forward.step([Piece(row, [token], ()) for row in range(len(prompts))]) for token in (3, 4, 5)]
    return torch.stack(steps)


@pytest.fixture
def prompts() -> list[list[int]]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCAB, (length,), generator=draws).tolist() for length in LENGTHS]


def own_forward_of(model: Any) -> RowForward:
    """With the layers' own forward."""
    forward = forward_of(model)
    for layer in model.model.layers:
        vars(layer).pop("forward")
    return forward


@pytest.mark.parametrize("model_type", LEAN)
def test_a_lean_layer_computes_what_transformers_layer_does(model_type: str, prompts: list[list[int]]) -> None:
    """Prompts beyond the sliding window and steps after them, with biases and grouped heads where the model has them:
    the same logits as with the layers' own forward."""
    lean, own = (tiny(model_type, attention.NAME) for _ in range(2))
    forwards = forward_of(lean), own_forward_of(own)

    assert (lean_layers(lean), lean_layers(own)) == ([True, True], [False, False])
    torch.testing.assert_close(*(read_all(forward, prompts) for forward in forwards), **CLOSE)


@pytest.mark.parametrize("model_type", LEAN)
def test_in_bfloat16_it_is_as_near_to_the_exact_layer(model_type: str, prompts: list[list[int]]) -> None:
    """It rounds in other places, but not worse: its logits are off by no more than those of the layers' own forward."""
    models = [tiny(model_type, attention.NAME) for _ in range(3)]
    for model in models:  # the exact model has the rounded weights too
        model.to(torch.bfloat16)
    exact = read_all(own_forward_of(models[0].float()), prompts)
    lean, own = (
        read_all(make(model), prompts) for make, model in zip((forward_of, own_forward_of), models[1:], strict=True)
    )

    assert all(lean_layers(models[1]))
    assert (lean.float() - exact).norm() <= 1.25 * (own.float() - exact).norm()


@pytest.mark.parametrize(
    ("model_type", "changed"),
    [
        ("llama", {"hidden_act": "gelu"}),
        ("granite", {"residual_multiplier": 0.5}),
        ("cohere", {}),
        ("gemma2", {}),
        ("olmo2", {}),
        ("qwen3", {}),
        ("stablelm", {}),
    ],
)
def test_what_differs_keeps_its_own_forward(model_type: str, changed: dict[str, Any]) -> None:
    """The opposite: another activation, a factor on what is added, other norms, or norms of queries and keys."""
    model = tiny(model_type, attention.NAME, **changed)

    forward_of(model)

    assert not any(lean_layers(model))


def test_what_differs_for_far_tokens_only_keeps_its_own_forward() -> None:
    """Ministral 3 is a Llama up to the context that it was first trained with; beyond, its queries grow."""
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 16}
    config = AutoConfig.for_model(
        "ministral3", **CONFIGS["llama"], head_dim=16, rope_parameters=rope | {"llama_4_scaling_beta": 0.5}
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention.NAME).eval()

    forward_of(model)

    assert not any(lean_layers(model))


def test_a_layer_that_fails_on_the_trial_keeps_its_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it needs and is not given in a trial does not keep its model from being served."""
    model = tiny("llama", attention.NAME)
    forward = model.model.layers[0].self_attn.forward

    def picky(*args: Any, **kwargs: Any) -> Any:
        if kwargs["position_embeddings"][0].shape[1] == 3:
            raise ValueError("not with three tokens")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model.layers[0].self_attn, "forward", picky)

    forward_of(model)

    assert lean_layers(model) == [False, True]


def test_a_factor_of_one_is_no_difference() -> None:
    """Granite without its multipliers is a Llama."""
    model = tiny("granite", attention.NAME, residual_multiplier=1.0)

    forward_of(model)

    assert all(lean_layers(model))


def test_close_gives_the_layers_back_and_other_forwards_are_their_own() -> None:
    """Outside of a generation step a lean layer is Transformers' own, bit for bit; after `close` it is not lean."""
    model = tiny("llama", attention.NAME)
    ids = torch.tensor([[3, 5, 7, 9]])
    with torch.inference_mode():
        before = model(input_ids=ids, use_cache=False).logits
        forward = forward_of(model)
        assert all(lean_layers(model))
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, before)
        forward.close()

        assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    assert not any(lean_layers(model))
