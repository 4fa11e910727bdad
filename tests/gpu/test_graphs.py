"""CUDA graphs against the same streams kernel by kernel, in bfloat16."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from shared.specs import LoraSpec
from tests.gpu.conftest import CUDA, relative_error
from tests.worker.training.conftest import base_around
from tests.worker.training.test_stream import part_of, tiny_dataset
from worker.base_model import BaseModel
from worker.kernels import accelerate, varlen
from worker.lora.manager import AdapterManager
from worker.training.dataset import TokenisedDataset
from worker.training.graphs import PAYS_FROM, Graphs
from worker.training.stream import Gained, Stream

__all__ = ["tiny_dataset"]  # a fixture

LENGTHS = [5, 30, 12, 7, 25, 3, 18, 2]
STREAMS = [[0, 1], [2, 3, 4], [5], [6, 7], [1, 2], [4, 0, 5]]
"""Different samples and numbers of them, all of one rounded size."""
ROUNDING = 5e-2
"""bfloat16 in other orders of sums, forward and backward."""


@pytest.fixture
def base(tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> BaseModel:
    base = replace(base_around(tiny_llama.to(CUDA, torch.bfloat16), tiny_tokenizer), device=CUDA, dtype=torch.bfloat16)
    if not varlen.is_available(CUDA):
        pytest.skip("this GPU or torch has no attention over segments of any length")
    accelerate(base.model)
    return base


@pytest.fixture
def data(tiny_dataset: Callable[..., TokenisedDataset]) -> TokenisedDataset:
    return tiny_dataset(LENGTHS)


def attached(manager: AdapterManager, name: str, **spec: object) -> list[nn.Parameter]:
    """An adapter whose B is not zero."""
    manager.add(name, LoraSpec.model_validate({"r": 3, "target_modules": "all-linear", **spec}), seed=len(name))
    parameters = list(manager.parameters(name).values())
    draws = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=draws).to(CUDA)
    return parameters


def kernel_by_kernel(stream: Stream) -> Stream:
    stream._graphs = None
    return stream


def assert_close(found: Gained, expected: Gained) -> None:
    assert relative_error(found.loss, expected.loss) < ROUNDING
    flat = [torch.cat([gradient.flatten() for gradient in gained.gradients]) for gained in (found, expected)]
    assert relative_error(*flat) < ROUNDING


def graphs_of(stream: Stream) -> Graphs:
    assert stream._graphs is not None
    return stream._graphs


def test_replayed_equals_kernel_by_kernel(base: BaseModel, data: TokenisedDataset) -> None:
    """Streams of several samples and lengths through one graph give the losses and gradients that they give apart;
    and earlier ones keep their gradients when a later stream is replayed."""
    manager = AdapterManager(base.model)
    parameters = attached(manager, "one")
    by_graph, apart = Stream(base, manager), kernel_by_kernel(Stream(base, manager))
    parts = [part_of(data, "one", parameters, indices) for indices in STREAMS]
    found = [by_graph.learn([part])[0] for part in parts]

    assert len(graphs_of(by_graph)._made) == 1
    for ours, part in zip(found, parts, strict=True):
        assert_close(ours, apart.learn([part])[0])
    assert relative_error(found[-1].gradients[0], found[-2].gradients[0]) > 0.2


def test_replayed_at_the_weights_of_now(base: BaseModel, data: TokenisedDataset) -> None:
    """An adapter that has moved since its graph was captured gives the gradients of where it is."""
    manager = AdapterManager(base.model)
    parameters = attached(manager, "one")
    by_graph, apart = Stream(base, manager), kernel_by_kernel(Stream(base, manager))
    part = part_of(data, "one", parameters, STREAMS[0])
    for _ in range(PAYS_FROM):
        (before,) = by_graph.learn([part])
    with torch.no_grad():
        for parameter in parameters:
            parameter.mul_(1.5)
    (after,) = by_graph.learn([part])

    assert_close(after, apart.learn([part])[0])
    assert relative_error(after.gradients[0], before.gradients[0]) > 0.2


def test_graphs_of_several_adapters(base: BaseModel, data: TokenisedDataset) -> None:
    """Captured and new adapters in one stream each give what they give alone."""
    manager = AdapterManager(base.model)
    names = {"one": {"r": 3}, "other": {"target_modules": ["q_proj"]}, "third": {"dropout": 0.5}}
    parts = [
        part_of(data, name, attached(manager, name, **spec), STREAMS[i]) for i, (name, spec) in enumerate(names.items())
    ]
    by_graph, apart = Stream(base, manager), kernel_by_kernel(Stream(base, manager))
    for _ in range(PAYS_FROM):
        by_graph.learn(parts[:1])
    manager.train(True)
    gained = by_graph.learn(parts)

    assert [name for name, _ in graphs_of(by_graph)._made] == ["one"]
    for found, part in zip(gained, parts, strict=True):
        assert_close(found, apart.learn([part])[0])


def test_an_adapter_that_came_later_has_its_own(base: BaseModel, data: TokenisedDataset) -> None:
    """A new adapter under the name of one that is gone is not trained by the old one's graph."""
    manager = AdapterManager(base.model)
    by_graph, apart = Stream(base, manager), kernel_by_kernel(Stream(base, manager))

    def train(times: int, **spec: object) -> Gained:
        parameters: list[nn.Parameter] = attached(manager, "name", **spec)
        part = part_of(data, "name", parameters, STREAMS[0])
        for _ in range(times):
            (gained,) = by_graph.learn([part])
        assert_close(gained, apart.learn([part])[0])
        manager.remove("name")
        return gained

    train(PAYS_FROM + 1)
    train(1, alpha=64)
    train(PAYS_FROM + 1, alpha=64)


def test_what_cannot_be_captured_is_trained_without(base: BaseModel, data: TokenisedDataset) -> None:
    """A layer that waits for a value on the GPU ends the use of graphs, not the training."""
    manager = AdapterManager(base.model)
    parameters = attached(manager, "one")
    by_graph, apart = Stream(base, manager), kernel_by_kernel(Stream(base, manager))
    part = part_of(data, "one", parameters, STREAMS[0])
    base.model.get_input_embeddings().register_forward_hook(  # type: ignore[operator]  # a module's own
        lambda *arguments: arguments[-1] * float(arguments[-1].isfinite().all())
    )
    gained = [by_graph.learn([part])[0] for _ in range(PAYS_FROM + 1)]

    assert by_graph._graphs is None
    for found in gained:
        assert_close(found, apart.learn([part])[0])
