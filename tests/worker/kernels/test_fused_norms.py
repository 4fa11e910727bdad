"""RMSNorm as one kernel against the module's own."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from worker.kernels.norms import fused_forward


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Olmo2RMSNorm])
def test_one_kernel_gives_what_the_module_gives(kind: type[nn.Module]) -> None:
    """Values of the module's own forward, within rounding, for inputs of any size and shape."""
    norm = kind(32, eps=1e-3)
    norm.weight.data = torch.linspace(0.5, 2, 32)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 100.0])[:, None, None]
    fused = fused_forward(norm)
    assert fused is not None

    torch.testing.assert_close(fused(x), norm(x), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(fused(x), x, rtol=0.1)


def test_a_norm_that_scales_by_one_plus_its_weight_stays_as_it_is() -> None:
    """Gemma's factor is not its weight, which is what the kernel would multiply by."""
    assert fused_forward(Gemma2RMSNorm(32)) is None
