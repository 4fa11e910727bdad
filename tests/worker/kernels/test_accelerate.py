"""An accelerated model against the untouched one, for every supported architecture."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from shared.specs import LoraSpec
from tests.worker.test_attention import LENGTHS, every_architecture, make_model, restarting_positions, samples
from worker.attention import packed_segments
from worker.kernels import accelerate
from worker.kernels.norms import is_rms_norm, lean_forward
from worker.kernels.swiglu import is_gated_mlp, swiglu
from worker.lora.manager import AdapterManager

__all__ = ["make_model"]  # a fixture

WITH_RMS_NORM = {"gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"}

WITH_GATED_MLP = {"cohere", "granite", "llama", "mistral", "olmo2", "qwen2", "qwen3", "stablelm"}


def hidden_and_gradients(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of a packed stream, and the gradients of a fixed all-linear adapter."""
    model.requires_grad_(False)
    manager = AdapterManager(model)
    manager.add("a", LoraSpec(target_modules="all-linear"), seed=0)
    parameters = manager.parameters("a")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if name.endswith("B"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    stream = torch.cat(samples())[None]
    with packed_segments(LENGTHS), manager.routed_segments([("a", sum(LENGTHS))]):
        hidden = model.base_model(stream, position_ids=restarting_positions(), use_cache=False).last_hidden_state
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad((hidden.float() * weights).sum(), [*parameters.values()])
    manager.remove("a")
    return hidden.detach(), dict(zip(parameters, grads, strict=True))


# Relative to the norm. fp32: sums in another order. bf16: each of some 30 roundings (2^-9) that a gradient sees may
# fall the other way.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=["fp32", "bf16"])
@every_architecture
def test_training_is_the_same(
    make_model: Callable[..., PreTrainedModel], model_type: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Hidden states are equal bit for bit, gradients to rounding; `undo` restores both; the base is untouched."""
    model = make_model(model_type).to(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hidden, grads = hidden_and_gradients(model)
    undo = accelerate(model)
    fast_hidden, fast_grads = hidden_and_gradients(model)
    undo()
    again_hidden, again_grads = hidden_and_gradients(model)

    assert torch.equal(fast_hidden, hidden)
    assert torch.equal(again_hidden, hidden)
    for name, grad in grads.items():
        assert (fast_grads[name] - grad).norm() <= tolerance * grad.norm(), name
        assert torch.equal(again_grads[name], grad), name
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@every_architecture
def test_what_can_be_faster_is_found(make_model: Callable[..., PreTrainedModel], model_type: str) -> None:
    """Every RMSNorm and every MLP gated by a SiLU is accelerated; a LayerNorm or another MLP never."""
    model = make_model(model_type)
    accelerate(model)

    changed = {type(module).__name__ for module in model.modules() if "forward" in module.__dict__}
    assert any(name.endswith("RMSNorm") for name in changed) == (model_type in WITH_RMS_NORM)
    assert any(name.endswith("MLP") for name in changed) == (model_type in WITH_GATED_MLP)
    assert all(name.endswith(("RMSNorm", "MLP")) for name in changed)


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Gemma2RMSNorm, Olmo2RMSNorm])
def test_gradient_is_the_derivative(kind: type[torch.nn.Module]) -> None:
    """The hand-written gradient is that of the formula in float64, which modules that compute in fp32 cannot show."""
    norm = kind(6, eps=1e-3)
    norm.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))
    norm.requires_grad_(False)
    scale = norm.weight.double() + (1 if kind is Gemma2RMSNorm else 0)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * scale
    (expected_grad,) = torch.autograd.grad((expected * weights).sum(), x)
    narrow = x.detach().float().requires_grad_()
    (grad,) = torch.autograd.grad((lean_forward(norm)(narrow) * weights).sum(), narrow)

    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-6)


def test_swiglu_gradient_is_the_derivative() -> None:
    """In float64, against finite differences, for both inputs; and it is torch's own product."""
    draws = torch.Generator().manual_seed(3)
    gate, up = (torch.randn(3, 5, generator=draws, dtype=torch.float64, requires_grad=True) for _ in range(2))

    assert torch.autograd.gradcheck(swiglu, (gate, up))
    assert torch.equal(swiglu(gate, up), torch.nn.functional.silu(gate) * up)


def test_another_activation_is_no_gated_mlp() -> None:
    """An MLP of the same parts with another activation keeps its own forward."""
    config = LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2)

    assert is_gated_mlp(LlamaMLP(config))
    config.hidden_act = "gelu"
    assert not is_gated_mlp(LlamaMLP(config))


def test_something_else_is_no_rms_norm() -> None:
    """A module that only has the name keeps its own forward."""

    class OddRMSNorm(LlamaRMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 0.1

    assert not is_rms_norm(OddRMSNorm(8))
    assert is_rms_norm(LlamaRMSNorm(8))


def test_trained_weight_gets_its_gradient() -> None:
    """Where the norm's own weight is trained, autograd does as it always did."""
    norm = LlamaRMSNorm(8)
    lean_forward(norm)(torch.ones(2, 8, requires_grad=True)).sum().backward()

    assert norm.weight.grad is not None
