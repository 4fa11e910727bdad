"""Decoder layers that run as compiled code, within the engine's forward."""

from typing import Any

import pytest
import torch
from torch import Tensor

from shared.specs import AdapterShare
from tests.worker.compiled_kernels import kernels_or_skip
from tests.worker.inference.test_forward import tiny
from tests.worker.inference.test_lean import LEAN, forward_of
from tests.worker.lora.test_bank import made
from worker import attention
from worker.inference.compiled import CompiledLayer
from worker.inference.forward import Piece, RowForward
from worker.kernels.native.step_kernels import StepKernels
from worker.lora import bank as bank_module

# Float32 sums in another order; the logits are of order 1 to 10.
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
PROMPTS = ([3, 5, 7, 9, 11, 13, 15], [4, 6, 8], [2] * 20)


@pytest.fixture(autouse=True)
def kernels() -> StepKernels:
    return kernels_or_skip()


def compiled_layers(model: Any) -> list[bool]:
    return [isinstance(layer.forward, CompiledLayer) for layer in model.model.layers]


def steps(forward: RowForward, model: Any) -> Tensor:
    """Logits of three prompts through two adapters and none, and of a token more of each."""
    for name, r in (("a", 4), ("b", 12)):
        forward.bank.attach(name, forward.bank.pack(made(model, name, r=r, scale=0.1), name=name))
    own = [(AdapterShare(version_id="a"),), (AdapterShare(version_id="b", weight=0.5),), ()]
    rows = [forward.add_row(32) for _ in PROMPTS]
    read = forward.step(
        [Piece(row, ids, one) for row, ids, one in zip(rows, PROMPTS, own, strict=True) if row is not None]
    )
    more = forward.step([Piece(row, [7], one) for row, one in enumerate(own)])
    return torch.stack((read, more))


@pytest.mark.parametrize("model_type", LEAN)
def test_layers_of_llamas_kind_are_compiled(model_type: str) -> None:
    """All of them, and none where compiling is not wanted."""
    model, plain = (tiny(model_type, attention.NAME) for _ in range(2))
    forward = forward_of(model)
    torch_alone = forward_of(plain, compiles=False)

    assert compiled_layers(model) == [True, True]
    assert compiled_layers(plain) == [False, False]
    torch.testing.assert_close(steps(forward, model), steps(torch_alone, plain), **CLOSE)


@pytest.mark.parametrize("changed", [{"head_dim": 8}, {"intermediate_size": 40}, {"hidden_act": "gelu"}])
def test_sizes_that_the_kernels_do_not_take_are_left_to_torch(changed: dict[str, Any]) -> None:
    """Heads and features that are no whole number of vectors; a layer that is not lean at all."""
    model = tiny("llama", attention.NAME, **changed)

    forward_of(model)

    assert compiled_layers(model) == [False, False]


def test_angles_of_a_layer_s_own_are_its_own() -> None:
    """A step is shared by layers that are turned alike, no others."""
    models = [tiny("llama", attention.NAME) for _ in range(2)]
    forwards = [forward_of(model, compiles=compiles) for model, compiles in zip(models, (True, False), strict=True)]
    for model in models:
        second, own = model.model.layers[1], model.model.layers[1].forward

        def turned(*args: Any, position_embeddings: Any, own: Any = own, **options: Any) -> Any:
            cos, sin = position_embeddings
            return own(*args, position_embeddings=(sin.contiguous(), cos.contiguous()), **options)

        vars(second)["forward"] = turned

    torch.testing.assert_close(*(steps(one, model) for one, model in zip(forwards, models, strict=True)), **CLOSE)


def test_adapters_that_are_not_for_the_kernel_stop_the_layer_four_times(
    kernels: StepKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long runs have products of their own between the layer's sites: the logits are the same."""
    models = [tiny("llama", attention.NAME) for _ in range(2)]
    at_once = steps(forward_of(models[0]), models[0])
    monkeypatch.setattr(bank_module, "TABULATED", 0)
    calls = []
    forward = forward_of(models[1])
    right = kernels.layer
    monkeypatch.setattr(kernels, "layer", lambda *args: (calls.append(args[-2:]), right(*args)))

    found = steps(forward, models[1])

    assert calls == [*[(0, 1), (1, 2), (2, 3), (3, 4)] * 2, *[(0, 4)] * 2]
    torch.testing.assert_close(found, at_once, **CLOSE)
