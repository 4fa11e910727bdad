"""The three tiny models in turn, and adapters that do something."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from worker.lora import AdapterManager, LoraSpec

TARGETS = {
    "opt": ["q_proj", "v_proj", "fc1"],
    "gpt2": ["c_attn", "mlp.c_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
}


@dataclass
class Subject:
    """A tiny model, the targets that suit it, and three rows of seven tokens to try it on."""

    model: PreTrainedModel
    targets: list[str]
    ids_BT: Tensor

    def logits(self, model: torch.nn.Module | None = None) -> Tensor:
        with torch.no_grad():
            found: Tensor = (model or self.model)(self.ids_BT, use_cache=False).logits
        return found

    def spec(self, **changes: object) -> LoraSpec:
        return LoraSpec.model_validate({"r": 4, "alpha": 8.0, "target_modules": self.targets} | changes)


@pytest.fixture(params=["opt", "gpt2", "llama"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return _subject(request, request.param)


@pytest.fixture
def llama(request: pytest.FixtureRequest) -> Subject:
    return _subject(request, "llama")


def _subject(request: pytest.FixtureRequest, kind: str) -> Subject:
    model = request.getfixturevalue(f"tiny_{kind}")
    ids_BT = torch.randint(3, 200, (3, 7), generator=torch.Generator().manual_seed(1))
    return Subject(model, TARGETS[kind], ids_BT)


def add_trained(manager: AdapterManager, name: str, spec: LoraSpec, *, seed: int = 0) -> None:
    """Add an adapter whose B is random instead of zero, as if it had been trained."""
    manager.add(name, spec, seed=seed)
    draws = torch.Generator().manual_seed(seed + 1000)
    with torch.no_grad():
        for path, parameter in manager.parameters(name).items():
            if path.endswith(".lora_B"):
                parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.3)
