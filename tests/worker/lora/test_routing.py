"""Which rows and tokens go through which adapter, in whole models."""

import pytest
import torch
from torch import Tensor

from shared.errors import NotFound, StateConflict
from tests.worker.lora.conftest import Subject, add_trained
from worker.attention import packed_segments
from worker.lora import AdapterManager


@pytest.fixture
def manager(subject: Subject) -> AdapterManager:
    """Two adapters of different ranks on different modules."""
    manager = AdapterManager(subject.model)
    add_trained(manager, "a", subject.spec(), seed=1)
    add_trained(manager, "b", subject.spec(r=2, target_modules="all-linear"), seed=2)
    return manager


def solo(subject: Subject, manager: AdapterManager, name: str | None) -> Tensor:
    """The logits of the whole batch through one adapter, or through the base."""
    manager.deactivate()
    if name is not None:
        manager.activate(name)
    logits = subject.logits()
    manager.deactivate()
    return logits


@pytest.mark.parametrize("names", [["a", "b", None], ["a", None, "a"], ["b", "a", "b"], [None, "b", "b"]])
def test_mixed_rows_equal_solo_rows(subject: Subject, manager: AdapterManager, names: list[str | None]) -> None:
    """Each row of a mixed batch gets what it would get in a batch of its own adapter, up to rounding."""
    with manager.routed_rows(names):
        mixed = subject.logits()

    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i], solo(subject, manager, name)[i], rtol=1e-5, atol=1e-5)


def test_base_rows_are_bit_equal(subject: Subject, manager: AdapterManager) -> None:
    """No adapter in the batch changes a single bit of a base row."""
    base = solo(subject, manager, None)

    with manager.routed_rows([None, "a", None]):
        mixed = subject.logits()

    assert torch.equal(mixed[0], base[0])
    assert torch.equal(mixed[2], base[2])
    assert not torch.allclose(mixed[1], base[1], atol=1e-2)


def test_a_poisoned_adapter_stays_in_its_rows(subject: Subject, manager: AdapterManager) -> None:
    """An adapter full of NaN spoils its own row and leaves every other one bit-equal."""
    base = solo(subject, manager, None)
    with torch.no_grad():
        for parameter in manager.parameters("b").values():
            parameter.fill_(torch.nan)

    with manager.routed_rows([None, "b", None]):
        mixed = subject.logits()

    assert mixed[1].isnan().all()
    assert torch.equal(mixed[[0, 2]], base[[0, 2]])


@pytest.mark.parametrize("names", [["a", "b", None], ["a", None, "a"], ["b", "b", "a"]])
def test_mixed_segments_equal_solo_rows(subject: Subject, manager: AdapterManager, names: list[str | None]) -> None:
    """A packed stream of three samples gives each what it gets as a row through its own adapter."""
    num_rows, length = subject.ids_BT.shape
    positions = torch.arange(length).repeat(num_rows)[None]

    route = manager.routed_segments([(name, length) for name in names])
    with torch.no_grad(), packed_segments([length] * num_rows), route:
        stream = subject.model(subject.ids_BT.reshape(1, -1), position_ids=positions, use_cache=False).logits
    packed = stream.view(num_rows, length, -1)

    for i, name in enumerate(names):
        torch.testing.assert_close(packed[i], solo(subject, manager, name)[i], rtol=1e-4, atol=1e-5)


def test_blocks_nest_and_restore(subject: Subject, manager: AdapterManager) -> None:
    """After a routed block, also one that raised, the route is what it was before, not the base."""
    manager.activate("a")
    active = subject.logits()

    with manager.routed_rows(["b", "b", "b"]):
        with pytest.raises(RuntimeError, match="boom"), manager.routed_rows([None, None, None]):
            raise RuntimeError("boom")
        inside = subject.logits()

    torch.testing.assert_close(inside, solo(subject, manager, "b"))
    manager.activate("a")
    assert torch.equal(subject.logits(), active)
    with manager.routed_rows(["b", None, None]):
        pass
    assert torch.equal(subject.logits(), active)


@pytest.mark.parametrize("num_rows", [2, 4])
def test_another_number_of_rows_is_an_error(subject: Subject, manager: AdapterManager, num_rows: int) -> None:
    """A batch that is not the one that was routed raises, instead of giving rows to the wrong adapter."""
    with manager.routed_rows(["a"] * num_rows), pytest.raises(ValueError, match=f"routed {num_rows} rows"):
        subject.logits()


@pytest.mark.parametrize("num_tokens", [6, 8, 21])
def test_another_number_of_tokens_is_an_error(subject: Subject, manager: AdapterManager, num_tokens: int) -> None:
    """A stream that is not as long as its segments raises; a batch of several rows is no stream, also when its
    number of tokens agrees."""
    with manager.routed_segments([("a", num_tokens)]), pytest.raises(ValueError, match=f"routed {num_tokens} tokens"):
        subject.model.get_submodule(next(iter(manager.parameters("a"))).removesuffix(".lora_A"))(torch.zeros(3, 7, 32))


def test_a_negative_segment_is_an_error(subject: Subject, manager: AdapterManager) -> None:
    """Lengths that would cancel out are refused before any forward."""
    with pytest.raises(ValueError, match="negative"), manager.routed_segments([("a", 8), (None, -1)]):
        pass


def test_unknown_names_are_refused(subject: Subject, manager: AdapterManager) -> None:
    """Routing or activating a name that is not attached raises and lists those that are."""
    with pytest.raises(NotFound, match="'c' is not attached; there are a, b"), manager.routed_rows(["c"]):
        pass
    with pytest.raises(NotFound, match="'c'"):
        manager.activate("c")


def test_no_adapter_is_removed_while_routed(subject: Subject, manager: AdapterManager) -> None:
    """Removing inside a block would silently serve its rows by the base; it is refused and changes nothing."""
    with manager.routed_rows(["a", "a", "a"]):
        with pytest.raises(StateConflict, match="routed"):
            manager.remove("a")
        inside = subject.logits()

    assert torch.equal(inside, solo(subject, manager, "a"))


def test_decode_rows_of_one_token(subject: Subject, manager: AdapterManager) -> None:
    """A step that feeds one token per row is routed row by row too."""
    with manager.routed_rows(["a", None, "b"]):
        mixed = subject.model(subject.ids_BT[:, :1], use_cache=False).logits

    for i, name in enumerate(["a", None, "b"]):
        with manager.routed_rows([name] * 3):
            alone = subject.model(subject.ids_BT[:, :1], use_cache=False).logits
        torch.testing.assert_close(mixed[i], alone[i], rtol=1e-5, atol=1e-5)
