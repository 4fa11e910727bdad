"""Steps over rows of mixed adapters on a GPU, against each sequence alone in a merged model, for every architecture."""

import pytest
import torch
from torch import Tensor

from tests.gpu.conftest import relative_error
from tests.gpu.rows import Fleet, added, decoded, last_logits, shares
from tests.worker.test_attention import VOCAB, WINDOW, every_architecture
from worker.inference.forward import Piece, RowForward
from worker.lora.bank_route import Shares

RANKS = {"a": 1, "b": 4, "c": 16}
OWN: list[Shares] = [(), shares("a"), shares("b"), shares("c"), shares("b")]
LENGTHS = (1, 3, 2 * WINDOW, 17, 9)
STEPS = 2 * WINDOW
FLOAT32 = 5e-5
"""Float32 sums in other orders, through two layers and adapters whose updates are as large as the weights."""
BFLOAT16 = 3
"""How many times the rounding error of bfloat16 alone a row may have, being other orders of sums."""


def sequences() -> list[list[int]]:
    """Prompts, each with the tokens that follow it."""
    draws = torch.Generator().manual_seed(1)
    return [torch.randint(2, VOCAB, (length + STEPS,), generator=draws).tolist() for length in LENGTHS]


def together(forward: RowForward) -> Tensor:
    """The logits of all rows at all steps, (steps, rows, V): four prompts are read at once, the last joins two steps
    later, in pieces beside the others."""
    rows = [added(forward) for _ in OWN]
    own = dict(zip(rows, OWN, strict=True))
    told = sequences()
    found: list[list[Tensor]] = [[] for _ in rows]
    logits = forward.step([Piece(row, told[row][: LENGTHS[row]], own[row]) for row in rows[:-1]])
    late, length = rows[-1], LENGTHS[-1]
    pieces = {2: (0, 5), 3: (5, 6), 4: (6, length)}
    for row, one in zip(rows[:-1], logits, strict=True):
        found[row].append(one)
    for step in range(1, STEPS + 5):
        parts = [Piece(r, told[r][LENGTHS[r] + step - 1 :][:1], own[r]) for r in rows[:-1] if step <= STEPS]
        if step in pieces:
            start, stop = pieces[step]
            parts.append(Piece(late, told[late][start:stop], own[late], wants_next=stop == length))
        elif step > 4:
            parts.append(Piece(late, told[late][length + step - 5 :][:1], own[late]))
        logits = forward.step(parts)
        for piece, one in zip([piece for piece in parts if piece.wants_next], logits, strict=True):
            found[piece.row].append(one)
    return torch.stack([torch.stack(own_logits[: STEPS + 1]) for own_logits in found], dim=1)


def one_by_one(fleet: Fleet, dtype: torch.dtype) -> Tensor:
    """The same of every row by itself."""
    told, columns = sequences(), []
    for row, own in enumerate(OWN):
        model = fleet.alone(own, dtype)
        columns.append(torch.stack([last_logits(model, told[row][: LENGTHS[row] + n]) for n in range(STEPS + 1)]))
    return torch.stack(columns, dim=1)


@every_architecture
def test_rows_equal_their_sequences_alone_in_float32(model_type: str) -> None:
    """Rows of the base and of adapters of several ranks, one of which joins late, have at each step the logits of the
    sequence alone in a model into which the adapter is merged, up to the order of fp32 sums; some steps by graph."""
    fleet = Fleet(model_type, RANKS)
    forward = fleet.rows(torch.float32)

    found = together(forward)

    assert relative_error(found, one_by_one(fleet, torch.float32)) < FLOAT32
    assert forward._graphs is not None
    assert forward._graphs._made


@every_architecture
def test_rows_round_as_their_sequences_alone_in_bfloat16(model_type: str) -> None:
    """The same rows are as far from fp32 as merged models in bfloat16 are, and not further."""
    fleet = Fleet(model_type, RANKS)
    exact, alone = one_by_one(fleet, torch.float32), one_by_one(fleet, torch.bfloat16)
    forward = fleet.rows(torch.bfloat16)

    found = together(forward)

    assert relative_error(found, exact) < BFLOAT16 * relative_error(alone, exact) < 0.3
    assert forward._graphs is not None
    assert forward._graphs._made


def test_the_adapters_matter() -> None:
    """The opposite: rows of other adapters have quite other logits."""
    fleet = Fleet("llama", RANKS)
    exact = one_by_one(fleet, torch.float32)

    assert relative_error(exact.roll(1, dims=1), exact) > 0.5
    fleet.adapters["b"] = fleet.adapters["c"]
    assert relative_error(one_by_one(fleet, torch.float32)[:, 2], exact[:, 2]) > 0.1


def test_more_adapters_than_a_cpu_lays_side_by_side() -> None:
    """Rows through 40 adapters of rank 16 equal each alone."""
    fleet = Fleet("llama", {f"n{i}": 16 for i in range(40)})
    forward = fleet.rows(torch.float32, max_rows=40)
    own = {added(forward): shares(name) for name in fleet.adapters}
    forward.step([Piece(row, [3, 4, 5], own[row]) for row in own])
    for token in (6, 7, 8):
        logits = decoded(forward, dict.fromkeys(own, token), own)

    expected = [last_logits(fleet.alone(one, torch.float32), [3, 4, 5, 6, 7, 8]) for one in own.values()]
    assert relative_error(logits, torch.stack(expected)) < FLOAT32
    assert forward._graphs is not None
    assert forward._graphs._made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_of_nan_reaches_no_other(dtype: torch.dtype) -> None:
    """An adapter that is not finite spoils its own row, by graph and without, and nothing once that has left."""
    fleet = Fleet("llama", {"good": 4, "bad": 4})
    forward = fleet.rows(dtype)
    part = next(iter(forward.bank._attached["bad"].parts.values()))
    part.a_NMI.fill_(float("inf"))
    own = {added(forward): shares("good"), added(forward): shares("bad"), added(forward): ()}
    forward.step([Piece(row, [3, 4, 5], own[row]) for row in own])
    for token in (6, 7, 8):
        logits = decoded(forward, dict.fromkeys(own, token), own)
        assert logits.isfinite().all(dim=1).tolist() == [True, False, True]
    forward.remove_row(1)  # the base's row takes its number

    assert decoded(forward, {0: 9, 1: 9}, {0: own[0]}).isfinite().all()
    assert forward.cache.is_zero()
