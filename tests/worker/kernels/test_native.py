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

from tests.worker.compiled_kernels import kernels_or_skip
from worker.kernels.native import step_kernels as module
from worker.kernels.native.compiler import compile_kernels
from worker.kernels.native.decoder_layer import SITES, DecoderLayer, LayerStep, Linears, Norm
from worker.kernels.native.step_kernels import StepKernels, step_kernels
from worker.kernels.native.streamed_product import StreamedProduct, packed_by
from worker.kernels.native.trial import failures
from worker.kernels.packed_linear import PackedProduct
from worker.lora.stack import Part
from worker.lora.update_table import UpdateTable

DTYPES = (torch.bfloat16, torch.float32)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.fixture(params=DTYPES, ids=str)
def kernels(request: pytest.FixtureRequest) -> StepKernels:
    return kernels_or_skip(request.param)


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


@pytest.mark.parametrize("name", ["attend", "add_updates", "product"])
def test_a_wrong_kernel_fails_the_trial(kernels: StepKernels, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """If one number is off by a twenty-fifth of the largest."""
    right: Callable[..., Tensor | None] = getattr(kernels, name)

    def wrong(*args: object) -> Tensor | None:
        y = right(*args)
        changed = args[-1] if y is None else y
        assert isinstance(changed, Tensor)
        changed.view(-1)[3] += changed.abs().max() / 25
        return y

    monkeypatch.setattr(kernels, name, wrong)

    assert name in failures(kernels)


@pytest.mark.parametrize("segment", range(len(SITES)))
def test_a_layer_that_leaves_something_out_fails_the_trial(kernels: StepKernels, monkeypatch: pytest.MonkeyPatch,
                                                           segment: int) -> None:  # fmt: skip
    """Any of its four parts."""
    right = kernels.layer

    def wrong(*args: int) -> None:
        *pointers, first, last = args
        for number in range(first, last):
            if number != segment:
                right(*pointers, number, number + 1)

    monkeypatch.setattr(kernels, "layer", wrong)

    assert failures(kernels) == ["layer"]


class Layer:
    """A layer of random weights over a cache of random keys and values, and tokens that see up to 49 places of it."""

    queries, groups, width, hidden, inner, places = 4, 2, 32, 64, 96, 100

    def __init__(self, kernels: StepKernels, num_tokens: int, *, gain: float = 1.0) -> None:
        """`gain`: of the MLP's norm."""
        qkv = (self.queries + 2 * self.groups) * self.width
        shapes = (qkv, self.hidden), (self.hidden, self.queries * self.width), (2 * self.inner, self.hidden)
        self.weights = [drawn(*shape, dtype=kernels.dtype) * 0.2 for shape in (*shapes, (self.hidden, self.inner))]
        self.norms = [Norm(drawn(self.hidden, dtype=kernels.dtype) * factor, 1e-5) for factor in (1.0, gain)]
        products = [StreamedProduct(kernels, weight, None) for weight in self.weights]
        self.layer = DecoderLayer(
            kernels, {site: Linears(product, 0) for site, product in zip(SITES, products, strict=True)},
            (self.norms[0], self.norms[1]), num_queries=self.queries, num_groups=self.groups, width=self.width,
            scale=0.2,
        )  # fmt: skip
        self.x = drawn(num_tokens, self.hidden, dtype=kernels.dtype)
        self.cos, self.sin = (
            drawn(num_tokens, self.width + i, dtype=kernels.dtype)[:, :32].contiguous() for i in (0, 1)
        )
        self.held = drawn(self.places, self.groups, self.width, dtype=kernels.dtype)
        self.where = torch.arange(num_tokens) + self.places - num_tokens
        self.first, self.count = torch.arange(num_tokens) % 8, torch.arange(num_tokens) % 17 * 3 + 1

    def run(self, tokens: slice = slice(None)) -> Tensor:
        """y of some of the tokens, computed without the others."""
        step = LayerStep(self.x[tokens], self.cos[tokens], self.sin[tokens], self.where[tokens], self.layer.sizes, {})
        keys, values = self.held.clone(), self.held.clone()
        return self.layer(step, self.x[tokens], keys, values, self.first[tokens], self.count[tokens])

    def expected(self) -> Tensor:
        """The same in float64."""
        x, held = self.x.double(), self.held.double()
        qkv, output, gate_up, down = (weight.double().t() for weight in self.weights)
        heads = (self._normed(x, self.norms[0]) @ qkv).view(len(x), -1, self.width)
        first, second = heads[:, : self.queries + self.groups].chunk(2, dim=-1)
        turned = heads[:, : self.queries + self.groups] * self.cos.double()[:, None]
        turned += torch.cat((-second, first), dim=-1) * self.sin.double()[:, None]
        keys, values = held.clone(), held.clone()
        keys[self.where], values[self.where] = turned[:, self.queries :], heads[:, self.queries + self.groups :]
        seen = expected_attention(turned[:, : self.queries], keys[None], values[None], self.first, self.count, 0.2)
        h = x + seen.flatten(1) @ output
        gate, up = (self._normed(h, self.norms[1]) @ gate_up).chunk(2, dim=-1)
        return h + torch.nn.functional.silu(gate) * up @ down

    def _normed(self, x: Tensor, norm: Norm) -> Tensor:
        return norm.weight_I.double() * x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()


@pytest.mark.parametrize("gain", [1.0, 300.0])
def test_a_layer_computes_what_its_formula_says(kernels: StepKernels, gain: float) -> None:
    """Also with gates so far from zero that e^x would leave float32."""
    layer = Layer(kernels, 19, gain=gain)
    expected = layer.expected()

    off = (layer.run().double() - expected).norm() / expected.norm()

    assert off < {torch.float32: 1e-5, torch.bfloat16: 2e-2}[kernels.dtype]
    assert (expected.roll(1, 0) - expected).norm() > expected.norm()


def test_a_token_of_a_layer_gets_the_same_whatever_the_others_are(kernels: StepKernels) -> None:
    """Bit for bit: alone, and as one of 19."""
    layer = Layer(kernels, 19)
    whole = layer.run()

    # No token sees what another one writes: the cache's last places.
    assert all(torch.equal(layer.run(slice(t, t + 1))[0], whole[t]) for t in range(19))


def test_a_token_that_attends_gets_the_same_whatever_the_others_are(kernels: StepKernels) -> None:
    """Bit for bit, in rows of up to 55 positions."""
    q_THD, held = drawn(19, 4, 32, dtype=kernels.dtype), drawn(19, 70, 2, 32, dtype=kernels.dtype)
    first_T, count_T = torch.arange(19) * 70, torch.arange(19) * 3 + 1
    whole = attended(kernels, q_THD, held, held, first_T, count_T)
    for t in range(19):
        one = slice(t, t + 1)
        assert torch.equal(attended(kernels, q_THD[one], held, held, first_T[one], count_T[one]), whole[one])


def test_a_product_gives_a_token_the_same_whatever_the_others_are(kernels: StepKernels) -> None:
    """Bit for bit; the opposite: another token gets something else."""
    x_TI, packed = drawn(19, 64, dtype=kernels.dtype), kernels.pack(drawn(96, 64, dtype=kernels.dtype))
    whole = kernels.product(x_TI, packed, None, None)
    for t in range(19):
        assert torch.equal(kernels.product(x_TI[t : t + 1], packed, None, None), whole[t : t + 1])

    assert not torch.equal(whole[0], whole[1])


def test_an_update_gives_a_token_the_same_whatever_the_others_are(kernels: StepKernels) -> None:
    """Bit for bit, in a run of 7 tokens and one by one."""
    part = Part((0,), 5, drawn(1, 5, 64, dtype=kernels.dtype), (drawn(1, 5, 48, dtype=kernels.dtype),))
    x_TI, y_TO = drawn(7, 64, dtype=kernels.dtype), drawn(7, 48, dtype=kernels.dtype)
    own, together, apart = ((part, 0.7),), y_TO.clone(), y_TO.clone()
    kernels.add_updates(UpdateTable.of([(0, 7, own)], (48,)), 0, x_TI, together)
    kernels.add_updates(UpdateTable.of([(t, 1, own) for t in range(7)], (48,)), 0, x_TI, apart)

    assert torch.equal(together, apart)
    assert not torch.equal(together, y_TO)


@pytest.mark.parametrize("num_threads", [2, 3, 7])
def test_any_number_of_threads_gives_the_same(kernels: StepKernels, threads: Callable[[int], None],
                                              num_threads: int) -> None:  # fmt: skip
    """Bit for bit, time and again, also with more threads than processors."""
    layer = Layer(kernels, 40)
    threads(1)
    alone = layer.run()
    threads(num_threads)

    assert all(torch.equal(layer.run(), alone) for _ in range(50))


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


def test_an_input_may_be_a_view(kernels: StepKernels) -> None:
    """A part of a wider tensor, as some models give their layers."""
    part = Part((0,), 3, drawn(1, 3, 32, dtype=kernels.dtype), (drawn(1, 3, 16, dtype=kernels.dtype),))
    table = UpdateTable.of([(0, 4, ((part, 1.0),))], (16,))
    wide_TI, y_TO = drawn(4, 64, dtype=kernels.dtype), drawn(4, 16, dtype=kernels.dtype)
    also_TO = y_TO.clone()

    kernels.add_updates(table, 0, wide_TI[:, 16:48], y_TO)
    kernels.add_updates(table, 0, wide_TI[:, 16:48].contiguous(), also_TO)

    assert torch.equal(y_TO, also_TO)


def test_weights_of_any_shape_have_a_product(kernels: StepKernels) -> None:
    """A vocabulary that is no whole number of blocks is oneDNN's."""
    make = packed_by(kernels)
    kinds = {64: StreamedProduct, 50: PackedProduct}
    for num_out, kind in kinds.items():
        weight_OI, bias_O, x_TI = (drawn(*shape, dtype=kernels.dtype) for shape in ((num_out, 32), (num_out,), (3, 32)))
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
