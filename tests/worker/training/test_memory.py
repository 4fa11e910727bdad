"""The memory estimate: sizes counted from shapes alone, and each term where it belongs."""

from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from shared.errors import UnknownTarget
from shared.specs import LoraSpec
from tests.worker.conftest import llama_config
from worker.base_model import hollow_model
from worker.training.memory import ADAPTER_COPIES, AdapterSizes, ModelSizes, training_bytes

MODEL = ModelSizes(num_parameters=1000, num_features=100)
ADAPTER = AdapterSizes(num_parameters=50, num_features=20)


def estimate(
    model: ModelSizes = MODEL, adapter: AdapterSizes = ADAPTER, *, dtype: torch.dtype = torch.float32,
    longest: int = 10, batch_size: int = 4, max_tokens: int = 100,
) -> int:  # fmt: skip
    return training_bytes(model, adapter, dtype=dtype, longest=longest, batch_size=batch_size, max_tokens=max_tokens)


def test_sizes_need_no_weights(tiny_llama: PreTrainedModel) -> None:
    """A hollow model has the sizes of the real one, tied weights counted once, and holds no numbers."""
    hollow = hollow_model(llama_config())

    assert ModelSizes.of(hollow) == ModelSizes.of(tiny_llama)
    assert ModelSizes.of(hollow).num_parameters == sum(p.numel() for p in tiny_llama.parameters())
    assert {p.device.type for p in hollow.parameters()} == {"meta"}


def test_building_a_hollow_model_changes_nothing_for_others() -> None:
    """The default dtype stays what it was, even while a bfloat16 configuration is built."""
    config = llama_config()
    config.dtype = torch.bfloat16
    hollow = hollow_model(config)

    assert {p.dtype for p in hollow.parameters()} == {torch.float32}
    assert (torch.get_default_dtype(), config.dtype) == (torch.float32, torch.bfloat16)


def test_adapter_sizes_follow_the_modules(tiny_llama: PreTrainedModel) -> None:
    """Two layers of q_proj (32 to 32) and v_proj (32 to 16) at their ranks, and no other module."""
    lora = LoraSpec(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})

    assert AdapterSizes.of(tiny_llama, lora) == AdapterSizes(2 * (4 * 64 + 2 * 48), 2 * (64 + 48))
    with pytest.raises(UnknownTarget):
        AdapterSizes.of(tiny_llama, LoraSpec(target_modules=["none"]))


def test_weights_count_in_their_dtype() -> None:
    """Half the bytes per number halve weights and activations, not the adapter."""
    more = replace(MODEL, num_parameters=2000)

    assert estimate(more) - estimate() == 1000 * 4
    assert estimate(more, dtype=torch.bfloat16) - estimate(dtype=torch.bfloat16) == 1000 * 2


def test_the_adapter_counts_with_all_its_copies() -> None:
    """Each trained parameter is there in fp32 several times, whatever the base's dtype."""
    more = replace(ADAPTER, num_parameters=51)

    for dtype in (torch.float32, torch.bfloat16):
        assert estimate(adapter=more, dtype=dtype) - estimate(dtype=dtype) == 4 * ADAPTER_COPIES


def test_a_stream_is_bounded_but_holds_the_longest_sample() -> None:
    """A batch counts up to the token budget; one sample beyond the budget goes alone and counts whole."""
    assert estimate(batch_size=10) == estimate(batch_size=99) > estimate(batch_size=9)
    assert estimate(longest=200) > estimate(longest=100, batch_size=99)
    assert estimate(longest=200, batch_size=1) == estimate(longest=200, batch_size=99)


def test_adapted_layers_keep_more() -> None:
    """A layer with an adapter keeps its input for the backward pass, at any rank."""
    assert estimate(adapter=replace(ADAPTER, num_features=100)) > estimate()
