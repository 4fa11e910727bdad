"""LoRALinear and its gradients, against the formula computed apart."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from worker.lora import routing
from worker.lora.layer import LoRALinear, LowRank, initial_a
from worker.lora.routing import Route, Routing
from worker.lora.update import Update, updated_linear

IN, OUT, RANK = 6, 5, 3


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=draws(seed), dtype=dtype)


@pytest.fixture(params=[nn.Linear, Conv1D])
def wrapped(request: pytest.FixtureRequest) -> nn.Module:
    """A plain layer from IN to OUT features, of both kinds, with a bias that is not zero."""
    layer = nn.Linear(IN, OUT) if request.param is nn.Linear else Conv1D(OUT, IN)
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(random(*parameter.shape, seed=i))
    return layer


def lora(wrapped: nn.Module, route: Route, *, dropout: float = 0.0, names: tuple[str, ...] = ("math",)) -> LoRALinear:
    layer = LoRALinear(wrapped, Routing())
    for i, name in enumerate(names):
        a, b = random(RANK, IN, seed=10 + i), random(OUT, RANK, seed=20 + i)
        layer.attach(name, LowRank(a, b, scaling=2.0 + i, dropout=dropout, draws=draws(i)))
    layer.routing.route = route
    return layer


def expected(wrapped: nn.Module, layer: LoRALinear, x: Tensor, name: str = "math") -> Tensor:
    low = layer.update(name)
    return wrapped(x) + low.scaling * (x @ low.lora_A.T) @ low.lora_B.T


def test_forward_is_the_formula(wrapped: nn.Module) -> None:
    """y = x W^T + b + s (x A^T) B^T, for nn.Linear and for Conv1D with its transposed weight."""
    layer, x = lora(wrapped, routing.whole("math")), random(2, 4, IN)

    torch.testing.assert_close(layer(x), expected(wrapped, layer, x))
    assert not torch.allclose(layer(x), wrapped(x), atol=0.1)


@pytest.mark.parametrize("shape", [(4, IN), (2, 4, IN), (2, 2, 2, IN)])
def test_any_leading_shape_is_kept(wrapped: nn.Module, shape: tuple[int, ...]) -> None:
    """An adapter for the whole input works on x (..., I) of any number of dimensions."""
    layer, x = lora(wrapped, routing.whole("math")), random(*shape)

    torch.testing.assert_close(layer(x), expected(wrapped, layer, x))


def test_unrouted_is_the_wrapped_layer_bit_for_bit(wrapped: nn.Module) -> None:
    """With no adapter routed, and with one routed that this layer lacks, the output is the wrapped layer's."""
    layer, x = lora(wrapped, routing.BASE), random(2, 4, IN)
    assert torch.equal(layer(x), wrapped(x))

    layer.routing.route = routing.whole("elsewhere")
    assert torch.equal(layer(x), wrapped(x))


def test_gradients_agree_with_numeric_ones(wrapped: nn.Module) -> None:
    """dx, dA and dB of the hand-written backward pass agree with finite differences in float64, with dropout,
    two adapters, adjacent and scattered rows."""
    x = random(6, 2, IN, dtype=torch.float64).requires_grad_()
    kept = torch.rand(6, IN, generator=draws(5)) < 0.7
    weights = [random(*shape, seed=30 + i, dtype=torch.float64).requires_grad_()
               for i, shape in enumerate([(RANK, IN), (OUT, RANK), (2, IN), (OUT, 2)])]  # fmt: skip
    wrapped.double().requires_grad_(False)

    def forward(x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        scattered = Update(torch.tensor([0, 3, 5]), a1, b1, 1.5, kept, 0.3)
        adjacent = Update(slice(1, 3), a2, b2, 0.5, None, 0.0)
        return updated_linear(x, wrapped, (6, 2), [scattered, adjacent])

    assert torch.autograd.gradcheck(forward, (x, *weights))


def test_gradients_agree_with_autograd(wrapped: nn.Module) -> None:
    """The hand-written backward pass gives what autograd gives for the formula written out."""
    layer, x = lora(wrapped, routing.whole("math")), random(3, 4, IN).requires_grad_()
    low, dy = layer.update("math"), random(3, 4, OUT, seed=9)
    inputs = (x, low.lora_A, low.lora_B)

    mine = torch.autograd.grad(layer(x), inputs, dy)
    reference = torch.autograd.grad(expected(wrapped, layer, x), inputs, dy)

    for given, wanted in zip(mine, reference, strict=True):
        torch.testing.assert_close(given, wanted)


def test_only_a_and_b_get_gradients(wrapped: nn.Module) -> None:
    """The wrapped weight and bias stay frozen while wrapped, and the backward pass leaves them none."""
    layer = lora(wrapped, routing.whole("math"))

    layer(random(4, IN)).sum().backward()

    assert [name for name, p in layer.named_parameters() if p.grad is not None] == [
        "updates.lora math.lora_A",
        "updates.lora math.lora_B",
    ]


@pytest.mark.parametrize("flags", [(True, True), (False, True), (False, False)])
def test_unwrap_restores_requires_grad(flags: tuple[bool, bool]) -> None:
    """The wrapped layer comes back as the same object, requiring gradients parameter by parameter as before."""
    linear = nn.Linear(IN, OUT)
    linear.weight.requires_grad_(flags[0])
    linear.bias.requires_grad_(flags[1])
    layer = LoRALinear(linear, Routing())
    assert not any(parameter.requires_grad for parameter in linear.parameters())

    assert layer.unwrap() is linear
    assert (linear.weight.requires_grad, linear.bias.requires_grad) == flags


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_output_follows_the_inputs_dtype(wrapped: nn.Module, dtype: torch.dtype) -> None:
    """A layer in another dtype answers in it, while A, B and their gradients stay fp32."""
    wrapped.to(dtype)
    layer, x = lora(wrapped, routing.whole("math")), random(4, IN).to(dtype)

    y = layer(x)
    y.sum().backward()

    low = layer.update("math")
    assert y.dtype == dtype
    assert low.lora_A.dtype == low.lora_A.grad.dtype == torch.float32
    # bfloat16 has 8 bits: two roundings of values of about 10.
    exact = wrapped.float()(x.float()) + low.scaling * x.float() @ low.lora_A.T @ low.lora_B.T
    torch.testing.assert_close(y.float(), exact, rtol=2**-6, atol=0.1 if dtype == torch.bfloat16 else 1e-5)


def test_dropout_acts_in_training_mode_only() -> None:
    """In training mode the update is random, in eval mode exactly the formula."""
    linear = nn.Linear(IN, OUT)
    layer, x = lora(linear, routing.whole("math"), dropout=0.5), random(8, IN)

    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), expected(linear, layer, x))


def test_dropout_spares_the_base() -> None:
    """Dropout reaches the update only: with B zero, training mode gives the wrapped layer's output bit for bit."""
    linear = nn.Linear(IN, OUT)
    layer, x = lora(linear, routing.whole("math"), dropout=0.9), random(8, IN)
    with torch.no_grad():
        layer.update("math").lora_B.zero_()

    assert torch.equal(layer(x), linear(x))


def test_dropout_keeps_the_mean() -> None:
    """Inverted dropout: kept inputs are scaled by 1/(1-p), so the update's mean over many draws is the update."""
    linear = nn.Linear(IN, OUT)
    layer, x = lora(linear, routing.whole("math"), dropout=0.3), random(IN).expand(20_000, IN)

    mean, wanted = layer(x).mean(0), expected(linear, layer, x)[0]

    # s B A has entries of about 6, so a draw's spread is about 6 |x| sqrt(6 * 0.3 / 0.7) = 10, its mean's 0.07.
    torch.testing.assert_close(mean, wanted, rtol=0, atol=0.5)


def test_dropout_draws_from_its_own_generator() -> None:
    """The same generator state gives the same mask, whatever the global generator does and another adapter draws."""
    layer, x = lora(nn.Linear(IN, OUT), routing.whole("a"), dropout=0.5, names=("a", "b")), random(8, IN)
    state = layer.update("a").draws.get_state()
    first = layer(x)
    after, global_state = layer.update("a").draws.get_state(), torch.get_rng_state()

    layer.routing.route = routing.whole("b")
    layer(x)
    assert torch.equal(layer.update("a").draws.get_state(), after)

    layer.routing.route = routing.whole("a")
    layer.update("a").draws.set_state(state)
    assert torch.equal(layer(x), first)
    assert torch.equal(torch.get_rng_state(), global_state)


def test_dropout_does_not_depend_on_neighbours() -> None:
    """A row's tokens meet the same mask alone as between rows of another adapter: fused training is solo training."""
    layer, x = lora(nn.Linear(IN, OUT), routing.whole("a"), dropout=0.5, names=("a", "b")), random(6, 4, IN)
    state = layer.update("a").draws.get_state()
    solo = layer(x[[1, 2, 5]])

    layer.update("a").draws.set_state(state)
    layer.routing.route = routing.rows(["b", "a", "a", None, "b", "a"])

    torch.testing.assert_close(layer(x)[[1, 2, 5]], solo)


def test_a_starts_as_a_linear_weight_does() -> None:
    """A is U(-1/sqrt(I), 1/sqrt(I)): inside the bound, with that distribution's variance 1/(3 I), from one seed."""
    a = initial_a(200, 400, draws(3))

    assert a.abs().max() <= 400**-0.5
    torch.testing.assert_close(a.var().item(), 1 / 1200, rtol=0.02, atol=0)
    assert torch.equal(a, initial_a(200, 400, draws(3)))
    assert not torch.equal(a, initial_a(200, 400, draws(4)))


def test_wrong_shapes_are_refused() -> None:
    """A and B that do not fit the layer raise, and name both."""
    layer = lora(nn.Linear(IN, OUT), routing.BASE)
    low = LowRank(random(RANK, IN + 1), random(OUT, RANK), scaling=1.0, dropout=0.0, draws=draws())

    with pytest.raises(ValueError, match=rf"\({RANK}, {IN + 1}\).*needs \(R, {IN}\)"):
        layer.attach("more", low)


def test_mode_of_the_wrapped_layer_is_taken_over() -> None:
    """Wrapping a layer in eval mode does not switch dropout on."""
    layer = lora(nn.Linear(IN, OUT).eval(), routing.BASE, dropout=0.5)

    assert not layer.training
    assert not layer.update("math").training
