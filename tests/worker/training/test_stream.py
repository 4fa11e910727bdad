"""What a stream gains, against each sample alone through the untouched model, for every supported architecture."""

import hashlib
from array import array
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shared.specs import LoraSpec
from tests.worker.test_attention import VOCAB, WINDOW, every_architecture, make_model
from tests.worker.training.conftest import base_around
from worker.base_model import BaseModel
from worker.kernels import accelerate
from worker.lora.manager import AdapterManager
from worker.training.dataset import TokenisedDataset
from worker.training.stream import Part, Stream

__all__ = ["make_model"]  # a fixture

LENGTHS = [5, 2, 3 * WINDOW, WINDOW + 1, 17]


@pytest.fixture
def data(tiny_dataset: Callable[..., TokenisedDataset]) -> TokenisedDataset:
    return tiny_dataset(LENGTHS)


@pytest.fixture
def tiny_dataset() -> Callable[..., TokenisedDataset]:
    """tiny_dataset(lengths) -> random tokens, of which about half are labels."""

    def make(lengths: list[int]) -> TokenisedDataset:
        draws = torch.Generator().manual_seed(4)
        tokens = torch.randint(2, VOCAB, (sum(lengths),), generator=draws, dtype=torch.int32)
        is_label = torch.rand(sum(lengths), generator=draws) < 0.5
        starts = array("q", [0])
        for length in lengths:
            is_label[starts[-1]], is_label[starts[-1] + length - 1] = False, True
            starts.append(starts[-1] + length)
        unused: Any = None
        digest = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
        return TokenisedDataset(
            tokens=tokens, is_label=is_label, starts=starts, report=unused, digest=digest, facts=unused, longest=64
        )

    return make


def attached(manager: AdapterManager, name: str, **spec: Any) -> list[nn.Parameter]:
    """An adapter whose B is not zero, which would hide A's gradients."""
    manager.add(name, LoraSpec(r=3, **{"target_modules": "all-linear", **spec}), seed=len(name))
    parameters = list(manager.parameters(name).values())
    draws = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=draws)
    return parameters


def part_of(data: TokenisedDataset, name: str, parameters: list[nn.Parameter], indices: list[int]) -> Part:
    num_labels = sum(map(data.num_labels, indices))
    return Part(
        adapter=name, parameters=parameters, data=data, indices=indices, seeds=indices, num_labels=num_labels
    )  # fmt: skip


def loss_alone(model: PreTrainedModel, data: TokenisedDataset, indices: list[int]) -> Tensor:
    """The mean loss over all labels, from Transformers' own loss of one sample at a time."""
    total = torch.zeros(())
    for index in indices:
        tokens, is_label = data[index]
        labels = tokens.long().masked_fill(~is_label, -100)
        total = total + model(tokens.long()[None], labels=labels[None], use_cache=False).loss * int(is_label.sum())
    return total / sum(map(data.num_labels, indices))


def base_of(model: PreTrainedModel, tokenizer: Any) -> BaseModel:
    return replace(base_around(model, tokenizer), context_length=64)


def assert_gained(found: tuple[Tensor, ...], expected: list[Tensor]) -> None:
    """Equal but for fp32 sums of up to 50 terms in another order, relative to the largest of a tensor."""
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
        assert theirs.abs().max() > 0


@every_architecture
def test_packed_equals_one_by_one(
    make_model: Callable[..., PreTrainedModel], model_type: str, data: TokenisedDataset, tiny_tokenizer: Any
) -> None:
    """Loss and gradients of a packed, accelerated stream are those of Transformers' eager attention and own loss over
    each sample alone, with sequences beyond any sliding window; and the loss of the base alone is another."""
    everything = list(range(len(data)))
    eager = make_model(model_type, "eager").requires_grad_(False)
    reference = AdapterManager(eager)
    parameters = attached(reference, "a")
    base_loss = loss_alone(eager, data, everything)
    reference.activate("a")
    loss = loss_alone(eager, data, everything)
    grads = list(torch.autograd.grad(loss, parameters))
    model = make_model(model_type).requires_grad_(False)
    accelerate(model)
    manager = AdapterManager(model)
    stream = Stream(base_of(model, tiny_tokenizer), manager)
    own = attached(manager, "a")
    (gained,) = stream.learn([part_of(data, "a", own, everything)])

    torch.testing.assert_close(gained.loss, loss.detach(), rtol=1e-4, atol=0)
    assert_gained(gained.gradients, grads)
    assert abs(float(base_loss - loss.detach())) > 1e-3


def test_parts_of_several_jobs_are_told_apart(
    make_model: Callable[..., PreTrainedModel], data: TokenisedDataset, tiny_tokenizer: Any
) -> None:
    """Two jobs with different adapters in one stream gain what each gains in a stream of its own."""
    model = make_model("llama").requires_grad_(False)
    manager = AdapterManager(model)
    stream = Stream(base_of(model, tiny_tokenizer), manager)
    first, second = attached(manager, "a"), attached(manager, "bb", target_modules=["v_proj"])
    parts = [part_of(data, "a", first, [0, 3]), part_of(data, "bb", second, [1, 2, 4])]
    together = stream.learn(parts)

    for part, found in zip(parts, together, strict=True):
        (expected,) = stream.learn([part])
        torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
        assert_gained(found.gradients, list(expected.gradients))


def test_accumulating_four_times_two_is_one_times_eight(
    make_model: Callable[..., PreTrainedModel], tiny_dataset: Callable[..., TokenisedDataset], tiny_tokenizer: Any
) -> None:
    """Four parts of two samples add up to the loss and gradients of one part of eight, however long each sample is."""
    data = tiny_dataset([3, 30, 4, 25, 6, 9, 2, 11])
    model = make_model("llama").requires_grad_(False)
    manager = AdapterManager(model)
    stream, parameters = Stream(base_of(model, tiny_tokenizer), manager), attached(manager, "a")
    whole = part_of(data, "a", parameters, list(range(8)))
    (expected,) = stream.learn([whole])
    quarters = [stream.learn([replace(whole, indices=[i, i + 1], seeds=[i, i + 1])])[0] for i in range(0, 8, 2)]

    torch.testing.assert_close(sum(q.loss for q in quarters), expected.loss, rtol=1e-5, atol=0)
    assert_gained(tuple(map(sum, zip(*(q.gradients for q in quarters), strict=True))), list(expected.gradients))


def test_learning_changes_nothing(
    make_model: Callable[..., PreTrainedModel], data: TokenisedDataset, tiny_tokenizer: Any
) -> None:
    """Gradients are handed back: no parameter moves and no `.grad` is left."""
    model = make_model("llama").requires_grad_(False)
    manager = AdapterManager(model)
    stream = Stream(base_of(model, tiny_tokenizer), manager)
    parameters = attached(manager, "a")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stream.learn([part_of(data, "a", parameters, [0, 1])])

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in model.parameters())
