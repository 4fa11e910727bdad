"""CUDA graphs of decoding against the same steps kernel by kernel."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.gpu.conftest import relative_error
from tests.gpu.rows import Fleet, added, decoded, shares
from tests.worker.lora.test_bank import made
from worker.inference.forward import Piece, RowForward
from worker.inference.graphs import PAYS_FROM, StepGraphs

RANKS = {"a": 4, "b": 8, "big": 64}
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
"""Of sums in other orders, since rows are filled up to a round number, relative to the norm of the logits."""
DTYPES = pytest.mark.parametrize("dtype", list(ROUNDING))


@pytest.fixture
def fleet() -> Fleet:
    return Fleet("llama", RANKS, max_position_embeddings=1000)


def graphs_of(forward: RowForward) -> StepGraphs:
    assert forward._graphs is not None
    return forward._graphs


def kernel_by_kernel(forward: RowForward) -> RowForward:
    forward._graphs = None
    return forward


def eventful(fleet: Fleet, forward: RowForward) -> list[Tensor]:
    """The logits of many steps, between which adapters come and go, and rows move, leave and are laid out anew."""
    found = []
    own = {0: shares("a"), 1: shares("b"), 2: ()}

    def go_on(rows: int, steps: int = PAYS_FROM + 1, first: int = 0) -> None:
        for step in range(steps):
            found.append(decoded(forward, {row: 5 + row + step for row in range(first, rows)}, own))

    for row in own:
        forward.step([Piece(added(forward, 40), [3, 4 + row], own[row])])
    go_on(3)
    other = made(fleet._plain, "another", r=6, scale=0.2)
    forward.bank.detach("b")
    fleet.attach(forward, "b", other)  # the columns of b hold another adapter now
    go_on(3)
    ids = torch.randint(2, 50, (300,), generator=torch.Generator().manual_seed(2)).tolist()
    own[3] = shares("b")
    forward.step([Piece(added(forward, 400), ids, own[3])])  # the others are carried over into longer places
    go_on(4)
    go_on(2, first=1)  # some rows rest, and are as they were
    go_on(4, 1)
    forward.remove_row(0)
    own[0] = own.pop(3)
    go_on(3)
    own[1], own[2] = (*shares("a", weight=0.5), *shares("b", weight=-0.25)), shares("a", weight=2.0)
    go_on(3)
    own[2] = shares("big")  # more columns than there were
    go_on(3)
    own = {}
    go_on(3)
    own = dict.fromkeys(range(3), shares("a"))
    go_on(3)
    return found


@DTYPES
def test_replayed_equals_kernel_by_kernel(fleet: Fleet, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens between the steps, their logits are those that they have apart; most were replayed."""
    forward, replays = fleet.rows(dtype), []
    plain = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), plain(graph)))
    by_graph = eventful(fleet, forward)
    num_replays = len(replays)
    apart = eventful(fleet, kernel_by_kernel(fleet.rows(dtype)))

    assert len(replays) == num_replays
    assert num_replays > len(apart) / 2
    errors = [relative_error(found, expected) for found, expected in zip(by_graph, apart, strict=True)]
    assert max(errors) < ROUNDING[dtype], errors
    assert all(relative_error(one, other) > 0.1 for one, other in pairwise(apart[:3]))


@DTYPES
def test_nothing_waits_for_the_gpu_in_a_step(fleet: Fleet, dtype: torch.dtype) -> None:
    """Steps like those before, replayed or kernel by kernel, start no copy that the processor waits for."""
    own = {0: shares("a"), 1: shares("b"), 2: ()}
    for forward in (fleet.rows(dtype), kernel_by_kernel(fleet.rows(dtype))):
        for row in own:
            forward.step([Piece(added(forward), [3, 4 + row], own[row])])
        for token in range(2, 6):
            decoded(forward, dict.fromkeys(own, token), own)
        torch.cuda.set_sync_debug_mode("error")
        try:
            decoded(forward, dict.fromkeys(own, 7), own)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@DTYPES
def test_what_stays_the_same_is_the_same_to_the_last_bit(fleet: Fleet, dtype: torch.dtype) -> None:
    """A row of the base has, replayed beside adapters, exactly what it has beside others of the base."""
    forward = fleet.rows(dtype)
    for _ in range(3):
        forward.step([Piece(added(forward), [3, 4, 5], ())])
    own = {1: shares("a"), 2: shares("b")}
    before = forward.cache._kinds
    found = []
    for used in ({}, own):
        for _ in range(PAYS_FROM + 1):
            found.append(decoded(forward, dict.fromkeys(range(3), 7), used)[0])
            for lengths in (forward.cache._lengths, forward.cache._touched):
                lengths[:] = [3] * 3  # the same step once more
    assert before is forward.cache._kinds

    assert torch.equal(found[PAYS_FROM], found[-1])


def test_graphs_of_gone_stacks_are_dropped(fleet: Fleet) -> None:
    """After new layouts of the adapters only graphs of the last one are kept, and those of the base."""
    forward = fleet.rows(torch.bfloat16)
    eventful(fleet, forward)
    graphs = graphs_of(forward)

    assert {size.layout for size in graphs._made} <= {None, forward.bank.num_layouts}
    forward.close()
    assert not graphs._made


def test_what_cannot_be_captured_is_answered_without(fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
    """A layer that waits for a value on the GPU ends the use of graphs, with one line in the log, not the answers."""
    expected = eventful(fleet, kernel_by_kernel(fleet.rows(torch.float32)))
    forward = fleet.rows(torch.float32)
    forward._model.get_input_embeddings().register_forward_hook(
        lambda *arguments: arguments[-1] * float(arguments[-1].isfinite().all())
    )
    found = eventful(fleet, forward)

    assert [record.getMessage() for record in caplog.records] == ["generation goes on without CUDA graphs"]
    assert max(relative_error(one, other) for one, other in zip(found, expected, strict=True)) < ROUNDING[torch.float32]
