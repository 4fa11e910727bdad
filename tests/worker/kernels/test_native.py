"""The compiled kernels of a generation step: right on every processor, for each token by itself, and never needed."""

# Shapes: T tokens, I in features, O out features, H query heads, G key-value heads, D head width, S rows, L positions.

import logging
import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from worker.kernels.native import step_kernels as module
from worker.kernels.native.compiler import compile_kernels
from worker.kernels.native.step_kernels import StepKernels, pack_weight, step_kernels
from worker.kernels.native.streamed_product import StreamedProduct, packed_by
from worker.kernels.native.trial import failures
from worker.kernels.packed_linear import PackedProduct
from worker.lora.stack import Part
from worker.lora.update_table import UpdateTable

DTYPES = (torch.bfloat16, torch.float32)
NAMES = ("rms_norm", "gated", "turn", "attend", "add_updates", "product")


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.fixture(params=DTYPES, ids=str)
def kernels(request: pytest.FixtureRequest) -> StepKernels:
    found = step_kernels(request.param)
    if found is None:
        pytest.skip("needs a C compiler")
    return found


@pytest.fixture
def with_product() -> StepKernels:
    found = step_kernels(torch.bfloat16)
    if found is None or not found.has_product:
        pytest.skip("needs a C compiler and a processor that multiplies bfloat16")
    return found


def attended(kernels: StepKernels, q_THD: Tensor, keys_SLGD: Tensor, values_SLGD: Tensor, first_T: Tensor,
             count_T: Tensor, scaling: float = 0.125) -> Tensor:  # fmt: skip
    return kernels.attend(q_THD, keys_SLGD.transpose(1, 2), values_SLGD.transpose(1, 2), first_T, count_T, scaling)


def expected_attention(q_THD: Tensor, keys_SLGD: Tensor, values_SLGD: Tensor, first_T: Tensor, count_T: Tensor,
                       scaling: float) -> Tensor:  # fmt: skip
    """In float64, token by token."""
    rows = []
    for q_HD, first, count in zip(q_THD.double(), first_T.tolist(), count_T.tolist(), strict=True):
        k, v = (held.flatten(0, 1)[first : first + count].double() for held in (keys_SLGD, values_SLGD))
        q_GgD = q_HD.view(k.shape[1], -1, q_HD.shape[-1])
        weights = torch.einsum("ghd,lgd->ghl", q_GgD, k).mul(scaling).softmax(-1)
        rows.append(torch.einsum("ghl,lgd->ghd", weights, v).flatten(0, 1))
    return torch.stack(rows)


def test_the_kernels_pass_their_trial(kernels: StepKernels) -> None:
    """On the processor that runs this, compiled for it."""
    assert failures(kernels) == []


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of one family")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])
def test_they_are_right_on_smaller_processors(kernels: StepKernels, dtype: torch.dtype, processor: str,
                                              tmp_path: Path) -> None:  # fmt: skip
    """Vectors of 16 numbers are split where a processor has shorter ones: without AVX512, and without AVX at all."""
    library = compile_kernels(tmp_path, bfloat16=dtype == torch.bfloat16, target=[(f"-march={processor}",)])

    small = StepKernels(library, dtype, module._parallel())

    assert failures(small) == []
    assert not small.has_product


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_kernel_fails_the_trial(with_product: StepKernels, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Each of them, if one number is off by a twenty-fifth of the largest."""
    right: Callable[..., Tensor | None] = getattr(with_product, name)

    def wrong(*args: object) -> Tensor | None:
        y = right(*args)
        changed = args[{"turn": 0, "add_updates": -1}[name]] if y is None else y
        assert isinstance(changed, Tensor)
        changed.view(-1)[3] += changed.abs().max() / 25
        return y

    monkeypatch.setattr(with_product, name, wrong)

    assert failures(with_product) == [name]


def test_a_token_gets_the_same_whatever_the_others_are(kernels: StepKernels) -> None:
    """Bit for bit: alone, and as one of 19."""
    dtype, tokens = kernels.dtype, 19
    x_TI, gate_T2F, weight_I = drawn(tokens, 64, dtype=dtype), drawn(tokens, 96, dtype=dtype), drawn(64, dtype=dtype)
    q_THD, held = drawn(tokens, 4, 32, dtype=dtype), drawn(tokens, 70, 2, 32, dtype=dtype)
    first_T, count_T = torch.arange(tokens) * 70, torch.arange(tokens) * 3 + 1
    whole = [
        kernels.rms_norm(x_TI, weight_I, 1e-6),
        kernels.gated(gate_T2F),
        attended(kernels, q_THD, held, held, first_T, count_T),
    ]
    for t in range(tokens):
        one = slice(t, t + 1)
        alone = [
            kernels.rms_norm(x_TI[one], weight_I, 1e-6),
            kernels.gated(gate_T2F[one]),
            attended(kernels, q_THD[one], held, held, first_T[one], count_T[one]),
        ]
        assert all(torch.equal(own, all_[one]) for own, all_ in zip(alone, whole, strict=True))


def test_a_product_gives_a_token_the_same_whatever_the_others_are(with_product: StepKernels) -> None:
    """Bit for bit; the opposite: another token gets something else."""
    x_TI, packed = drawn(19, 64, dtype=torch.bfloat16), pack_weight(drawn(96, 64, dtype=torch.bfloat16))
    whole = with_product.product(x_TI, packed, None, None)
    for t in range(19):
        assert torch.equal(with_product.product(x_TI[t : t + 1], packed, None, None), whole[t : t + 1])

    assert not torch.equal(whole[0], whole[1])


def test_one_thread_and_two_give_the_same(kernels: StepKernels, threads: Callable[[int], None]) -> None:
    """Bit for bit, for work that is large enough to be shared out."""
    gate_T2F, q_THD = drawn(40, 2048, dtype=kernels.dtype), drawn(40, 6, 64, dtype=kernels.dtype)
    held = drawn(40, 100, 3, 64, dtype=kernels.dtype)
    found = []
    for number in (1, 2):
        threads(number)
        first_T, count_T = torch.arange(40) * 100, torch.full((40,), 100)
        found.append((kernels.gated(gate_T2F), attended(kernels, q_THD, held, held, first_T, count_T)))

    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("width", [16, 48, 64, 128, 256])
def test_attention_over_long_rows(kernels: StepKernels, width: int) -> None:
    """1 to 1,000 positions that begin anywhere, with scores as far apart as e^x reaches; many query heads of a key."""
    tokens, room, heads, groups = 6, 1000, 12, 2
    q_THD = drawn(tokens, heads, width, dtype=kernels.dtype) * 4
    keys, values = (
        drawn(tokens, room, groups, width + i, dtype=kernels.dtype)[..., :width].contiguous() for i in (0, 1)
    )
    first_T = torch.tensor([0, room, 2 * room + 3, 3 * room + 500, 4 * room, 5 * room])
    count_T = torch.tensor([1, 16, 64, 65, 999, 1000])

    found = attended(kernels, q_THD, keys, values, first_T, count_T, 0.5)

    expected = expected_attention(q_THD, keys, values, first_T, count_T, 0.5)
    # The scores' own rounding, of values up to some hundred, is what e^x enlarges.
    error = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[kernels.dtype]
    torch.testing.assert_close(found.double(), expected, atol=error, rtol=error)
    assert (found.double() - expected.roll(1, 0)).abs().max() > 0.5


def test_a_row_with_nan_reaches_no_other(kernels: StepKernels) -> None:
    """What a token may not see is not even multiplied by zero."""
    q_THD, held = drawn(2, 2, 32, dtype=kernels.dtype), drawn(2, 40, 1, 32, dtype=kernels.dtype)
    first_T, count_T = torch.tensor([0, 45]), torch.tensor([40, 20])
    before = attended(kernels, q_THD, held, held, first_T, count_T)
    held[0] = torch.nan
    held[1, :5] = torch.nan
    held[1, 25:] = torch.nan

    after = attended(kernels, q_THD, held, held, first_T, count_T)

    assert after[0].isnan().all()
    assert torch.equal(after[1], before[1])


def test_a_gate_far_from_zero_is_open_or_shut(kernels: StepKernels) -> None:
    """silu(x) is x or 0 there, and not infinite or undefined; what is not a number stays so."""
    gate_F = torch.tensor([1e4, 300.0, -300.0, -1e4, torch.nan] * 16, dtype=kernels.dtype)
    up_F = torch.full_like(gate_F, 0.5)

    y_F = kernels.gated(torch.cat((gate_F, up_F))[None])[0]

    assert torch.equal(y_F[:2], gate_F[:2] * 0.5)
    assert (y_F[2:4].abs() < 1e-30).all()
    assert y_F[4].isnan()


def test_updates_leave_other_tokens_bit_for_bit(kernels: StepKernels) -> None:
    """Also such that are no numbers; and a token of two adapters gets both."""
    part = Part((0,), 4, drawn(1, 4, 32, dtype=kernels.dtype), (drawn(1, 4, 16, dtype=kernels.dtype),))
    x_TI, y_TO = drawn(6, 32, dtype=kernels.dtype), drawn(6, 16, dtype=kernels.dtype)
    x_TI[0], before = torch.nan, y_TO.clone()
    table = UpdateTable.of([(2, 1, ((part, 1.0),)), (4, 1, ((part, 0.5), (part, 0.5)))], (16,))

    kernels.add_updates(table, 0, x_TI, y_TO)

    assert torch.equal(y_TO[[0, 1, 3, 5]], before[[0, 1, 3, 5]])
    for token in (2, 4):
        added = x_TI[token].float() @ part.a_NMI[0].float().t() @ part.b_NrO[0][0].float()
        torch.testing.assert_close(y_TO[token].float(), before[token].float() + added, atol=0.1, rtol=0.02)


def test_weights_of_any_shape_have_a_product(with_product: StepKernels) -> None:
    """A vocabulary that is no whole number of blocks is oneDNN's."""
    make = packed_by(with_product)
    kinds = {64: StreamedProduct, 50: PackedProduct}
    for num_out, kind in kinds.items():
        weight_OI, bias_O, x_TI = (
            drawn(*shape, dtype=torch.bfloat16) for shape in ((num_out, 32), (num_out,), (3, 32))
        )
        product = make(weight_OI, bias_O)

        assert isinstance(product, kind)
        y_TO = x_TI.float() @ weight_OI.float().t() + bias_O.float()
        torch.testing.assert_close(product(x_TI).float(), y_TO, atol=0.05, rtol=0.02)
        torch.testing.assert_close(product.onto(x_TI, product(x_TI)).float(), 2 * y_TO, atol=0.1, rtol=0.02)
        assert product(x_TI[:0]).shape == (0, num_out)


def made(dtype: torch.dtype = torch.float32) -> StepKernels | None:
    """As for a process that has none yet."""
    return step_kernels.__wrapped__(dtype)


def test_without_a_compiler_torch_computes(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                                           tmp_path: Path) -> None:  # fmt: skip
    """And the log says what is missing."""
    caplog.set_level(logging.INFO, "lorad.inference")
    monkeypatch.setenv("PATH", str(tmp_path))

    assert made() is None
    assert "there is no C compiler in the path: none of cc, gcc, clang" in caplog.text


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                                         tmp_path: Path) -> None:  # fmt: skip
    """One without headers, say."""
    caplog.set_level(logging.INFO, "lorad.inference")
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho 'stdint.h: not found' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    assert made() is None
    assert "stdint.h: not found" in caplog.text


def test_kernels_that_are_wrong_are_not_used(kernels: StepKernels, monkeypatch: pytest.MonkeyPatch,
                                             caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    """A warning names them."""
    monkeypatch.setattr("worker.kernels.native.trial.failures", lambda _: ["attend", "gated"])

    assert made(kernels.dtype) is None
    assert "compiled kernels are wrong here: attend, gated" in caplog.text


def test_without_threads_to_share_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A team of our own would be in the way of torch's."""
    monkeypatch.setattr(module, "_parallel", lambda: None)

    assert made() is None
