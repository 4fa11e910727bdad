"""AdapterBank: every token of a step through its own adapters, against the formula computed here."""

import gc
import random
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shared.errors import IncompatibleAdapter, StateConflict
from shared.specs import AdapterShare, LoraSpec
from tests.worker.compiled_kernels import kernels_or_skip
from worker.lora import bank as bank_module
from worker.lora import update_table
from worker.lora.bank import AdapterBank
from worker.lora.bank_route import Shares
from worker.lora.manager import AdapterManager
from worker.lora.spec import LoadedAdapter
from worker.lora.stack import Stack
from worker.lora.targets import linear_modules
from worker.lora.update import weight_OI
from worker.lora.update_table import UpdateKernel

# Float32 products in another order, on values of order 1 to 10.
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
MODELS = ("tiny_llama", "tiny_opt", "tiny_gpt2")


def made(model: nn.Module, name: str, *, r: int, targets: Any = "all-linear", scale: float = 0.3) -> LoadedAdapter:
    """An adapter whose A and B are drawn around 0, with alpha = 2 r."""
    manager = AdapterManager(model)
    manager.add(name, LoraSpec(r=r, alpha=2.0 * r, target_modules=targets), seed=0)
    draws = torch.Generator().manual_seed(sum(name.encode()))
    with torch.no_grad():
        for parameter in manager.parameters(name).values():
            parameter.copy_(torch.randn(parameter.shape, generator=draws) * scale)
    adapter = manager.snapshot(name)
    manager.remove(name)
    return adapter


def bank_on(model: Any, kernel: UpdateKernel | None = None) -> AdapterBank:
    return AdapterBank(model, lambda: model(input_ids=torch.zeros(1, 2, dtype=torch.long)), kernel=kernel)


def shares(*names: str, weight: float = 1.0) -> Shares:
    return tuple(AdapterShare(version_id=name, weight=weight) for name in names)


def expected(path: str, layer: Any, x_TI: Tensor, token_shares: Sequence[Shares],
             adapters: dict[str, LoadedAdapter]) -> Tensor:  # fmt: skip
    """y = x W^T + b + sum of w s (x A^T) B^T, token by token."""
    y = x_TI @ weight_OI(layer).t() + (0 if layer.bias is None else layer.bias)
    for token, own in enumerate(token_shares):
        for share in own:
            adapter = adapters[share.version_id]
            if path in adapter.tensors:
                a_RI, b_OR = adapter.tensors[path]
                y[token] += share.weight * adapter.spec.scaling(path) * (b_OR @ (a_RI @ x_TI[token]))
    return y


@torch.no_grad()
def check(model: Any, bank: AdapterBank, adapters: dict[str, LoadedAdapter], decode: Sequence[Shares],
          prefill: Sequence[tuple[int, Shares]] = ()) -> None:  # fmt: skip
    """Every layer, given any input inside a routed step, gives what the formula says."""
    token_shares = [*decode, *(own for num_tokens, own in prefill for _ in range(num_tokens))]
    draws = torch.Generator().manual_seed(len(token_shares))
    for path, layer in linear_modules(model).items():
        x_TI = torch.randn(len(token_shares), weight_OI(layer).shape[1], generator=draws)
        with bank.routed([*((1, own) for own in decode), *prefill]):
            y_1TO = layer(x_TI[None])
        torch.testing.assert_close(y_1TO[0], expected(path, layer, x_TI, token_shares, adapters), **CLOSE)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    found: Any = request.getfixturevalue(request.param)
    return found.requires_grad_(False)


@pytest.fixture
def adapters(model: Any) -> dict[str, LoadedAdapter]:
    """Ranks 1 to 16; one that targets two modules only, one with a rank of its own for some."""
    two = {"tiny_llama": ["q_proj", "v_proj"]}.get(f"tiny_{model.config.model_type}")
    names = [path.rpartition(".")[2] for path in linear_modules(model)]
    return {
        "a": made(model, "a", r=1),
        "b": made(model, "b", r=4),
        "c": made(model, "c", r=16),
        "d": made(model, "d", r=8, targets=two or sorted(set(names))[:2]),
    }


def bank_with(model: Any, adapters: dict[str, LoadedAdapter], kernel: UpdateKernel | None = None) -> AdapterBank:
    made_bank = bank_on(model, kernel)
    for name, adapter in adapters.items():
        made_bank.attach(name, made_bank.pack(adapter, name=name))
    return made_bank


@pytest.fixture(params=["stacks", "kernel"])
def bank(request: pytest.FixtureRequest, model: Any, adapters: dict[str, LoadedAdapter]) -> AdapterBank:
    """One that computes with torch's products, and one with a compiled kernel."""
    if request.param == "stacks":
        return bank_with(model, adapters)
    return bank_with(model, adapters, kernels_or_skip().add_updates)


def test_every_token_goes_through_its_own_adapter(
    model: Any, bank: AdapterBank, adapters: dict[str, LoadedAdapter]
) -> None:
    """Mixed ranks and targets and bare base tokens in decoding, beside prompts of an adapter and of the base."""
    decode = [shares("a"), (), shares("c"), shares("d"), shares("a"), shares("b")]
    check(model, bank, adapters, decode, [(5, shares("b")), (3, ()), (4, shares("d"))])


def test_the_adapters_change_the_output(model: Any, bank: AdapterBank) -> None:
    """The opposite: outside a routed step, and for other adapters, the same input gives other outputs."""
    layer = linear_modules(model)[next(path for path in linear_modules(model) if "v_proj" in path or "c_attn" in path)]
    x = torch.randn(1, 2, weight_OI(layer).shape[1])
    with bank.routed([(1, shares("a")), (1, shares("c"))]):
        routed = layer(x)
    with bank.routed([(1, shares("c")), (1, shares("a"))]):
        other = layer(x)

    assert not torch.allclose(routed, layer(x), atol=0.01)
    assert not torch.allclose(routed, other, atol=0.01)


def test_a_base_token_is_the_base_bit_for_bit(model: Any, bank: AdapterBank) -> None:
    """Whatever stands beside it: the same stream with and without adapters around it."""
    for layer in linear_modules(model).values():
        x_1TI = torch.randn(1, 7, weight_OI(layer).shape[1])
        bare = layer(x_1TI)
        with bank.routed([(1, shares("a")), (1, ()), (1, shares("c")), (1, ()), (2, shares("d")), (1, ())]):
            y = layer(x_1TI)

        assert torch.equal(y[0, [1, 3, 6]], bare[0, [1, 3, 6]])


def test_one_adapter_for_all_and_none_at_all(model: Any, bank: AdapterBank, adapters: dict[str, LoadedAdapter]) -> None:
    """The two uniform batches, which take other ways through the code."""
    check(model, bank, adapters, [shares("c")] * 5)
    check(model, bank, adapters, [()] * 5, [(3, ())])


def test_mixes_add_up_by_weight(model: Any, bank: AdapterBank, adapters: dict[str, LoadedAdapter]) -> None:
    """In decoding beside others, alone, and in a prompt; weights may be negative or zero."""
    mix = (AdapterShare(version_id="b", weight=0.7), AdapterShare(version_id="c", weight=-0.25))
    off = shares("a", weight=0.0)
    check(model, bank, adapters, [mix, shares("a"), (), off, mix], [(4, mix), (2, off)])
    check(model, bank, adapters, [mix, mix])


def test_more_ranks_than_the_stacks_hold(
    model: Any, adapters: dict[str, LoadedAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What has no columns is computed by itself, also in a mix with what has."""
    bank = bank_with(model, adapters)
    monkeypatch.setattr(bank_module, "MOST_COLUMNS", 10)
    mix = (AdapterShare(version_id="b", weight=0.5), AdapterShare(version_id="c", weight=0.5))
    check(model, bank, adapters, [shares("a"), shares("c"), shares("b"), shares("d"), mix, (), shares("c")])
    monkeypatch.setattr(bank_module, "MOST_COLUMNS", 0)
    check(model, bank, adapters, [shares("a"), shares("c")])


def test_what_the_kernel_has_no_room_for(
    model: Any, bank: AdapterBank, adapters: dict[str, LoadedAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large ranks and long runs are computed by themselves, also beside what the kernel takes, and in a mix with it."""
    monkeypatch.setattr(update_table, "MOST_RANK", 4)
    monkeypatch.setattr(bank_module, "TABULATED", 12)
    mix = (AdapterShare(version_id="b", weight=0.5), AdapterShare(version_id="c", weight=0.5))
    check(
        model,
        bank,
        adapters,
        [shares("a"), shares("c"), (), mix],
        [(3, shares("b")), (4, shares("b")), (9, shares("a"))],
    )


def test_stacks_that_are_full_are_not_laid_out_again(
    model: Any, adapters: dict[str, LoadedAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as the same adapters decode, whoever joins them; adapters that take their place do change it."""
    bank = bank_with(model, adapters)
    monkeypatch.setattr(bank_module, "MOST_COLUMNS", 10)
    steps = [[shares(name) for name in names] for names in ("abcd", "dcab", "cab", "abbc")]
    check(model, bank, adapters, steps[0])
    before = bank.num_layouts

    for step in steps:
        check(model, bank, adapters, step)
    assert bank.num_layouts == before

    check(model, bank, adapters, [shares("c"), shares("d")])
    assert bank.num_layouts > before


def test_any_history_of_steps_leaves_each_step_right(model: Any, bank: AdapterBank,
                                                     adapters: dict[str, LoadedAdapter]) -> None:  # fmt: skip
    """Rows that join and leave, adapters that come, go and come back under their name with other weights."""
    draws = random.Random(7)
    pool = dict(adapters)
    for step in range(60):
        if step % 7 == 6:
            name = draws.choice(sorted(bank.names()))
            bank.detach(name)
            pool[name] = made(model, name + str(step), r=draws.choice([2, 8, 24]))
            bank.attach(name, bank.pack(pool[name], name=name))
        chosen = [draws.choice([(), *(shares(name) for name in pool)]) for _ in range(draws.randint(1, 6))]
        check(model, bank, pool, chosen, [(2, shares("a"))] if step % 3 == 0 else [])


def test_memory_that_runs_out_in_the_middle_leaves_later_steps_right(
    model: Any, adapters: dict[str, LoadedAdapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever making room for an adapter fails, it is not taken for being there, nor is what it displaced."""
    monkeypatch.setattr(bank_module, "MOST_COLUMNS", 16)
    bank, put = bank_with(model, adapters), Stack.put
    before, failing = [shares("a"), shares("b")], [shares("a"), shares("d")]
    num_failures = 0
    for num_puts in range(100):
        check(model, bank, adapters, before)
        left = [True] * num_puts

        def fail_at_last(stack: Stack, columns: slice, part: Any, left: list[bool] = left) -> None:
            if not left:
                raise torch.OutOfMemoryError
            left.pop()
            put(stack, columns, part)

        monkeypatch.setattr(Stack, "put", fail_at_last)
        try:
            with bank.routed([(1, own) for own in failing]):
                pass
        except torch.OutOfMemoryError:
            num_failures += 1
        monkeypatch.setattr(Stack, "put", put)
        check(model, bank, adapters, before)
        check(model, bank, adapters, failing)
        if left:
            break

    assert num_failures > 0
    assert left, "more puts than were tried"


def test_an_overflow_stays_in_its_row(model: Any, bank: AdapterBank, adapters: dict[str, LoadedAdapter]) -> None:
    """An adapter whose x A^T is infinite makes its own rows useless, not those that decode beside it."""
    wild = replace(adapters["b"], tensors={path: (a * 1e38, b) for path, (a, b) in adapters["b"].tensors.items()})
    bank.attach("wild", bank.pack(wild, name="wild"))
    for path, layer in linear_modules(model).items():
        x_TI = torch.randn(3, weight_OI(layer).shape[1]) * 100
        with bank.routed([(1, shares("a")), (1, shares("wild")), (1, ())]):
            y = layer(x_TI[None])[0]

        assert not y[1].isfinite().all()
        want = expected(path, layer, x_TI[[0, 2]], [shares("a"), ()], adapters)
        torch.testing.assert_close(y[[0, 2]], want, atol=2e-3, rtol=2e-5)


def test_an_adapter_that_overflows_when_packed_is_refused(
    bank: AdapterBank, adapters: dict[str, LoadedAdapter]
) -> None:
    """s B beyond float32 would be infinite, and infinity times zero is not zero."""
    tensors = {path: (a, b * 3e38) for path, (a, b) in adapters["b"].tensors.items()}

    with pytest.raises(IncompatibleAdapter, match="adapter huge overflows"):
        bank.pack(replace(adapters["b"], tensors=tensors), name="huge")


def test_an_adapter_of_another_model_is_refused(model: Any, bank: AdapterBank,
                                                adapters: dict[str, LoadedAdapter]) -> None:  # fmt: skip
    """All that does not fit is named, and nothing is attached."""
    tensors = {"elsewhere.q_proj": next(iter(adapters["a"].tensors.values()))}

    with pytest.raises(IncompatibleAdapter, match=r"elsewhere\.q_proj"):
        bank.pack(replace(adapters["a"], tensors=tensors), name="other")


def test_a_name_is_attached_once(bank: AdapterBank, adapters: dict[str, LoadedAdapter]) -> None:
    """A second adapter of the same name would change what running rows compute."""
    with pytest.raises(StateConflict, match="'a' is attached already"):
        bank.attach("a", bank.pack(adapters["a"], name="a"))


def test_detaching_gives_the_memory_back(model: Any, adapters: dict[str, LoadedAdapter]) -> None:
    """The packed tensors go with their adapter, the stacks with the last one."""
    bank = bank_on(model)
    refs = []
    for name in ("a", "b"):
        packed = bank.pack(adapters[name], name=name)
        refs += [weakref.ref(part.a_NMI) for part in packed.parts.values()]
        bank.attach(name, packed)
    del packed
    check(model, bank, adapters, [shares("a"), shares("b")])
    assert bank.stack_bytes > 0

    bank.detach("a")
    bank.detach("b")
    gc.collect()

    assert bank.stack_bytes == 0
    assert all(ref() is None for ref in refs)


def test_a_wrong_number_of_tokens_is_refused(model: Any, bank: AdapterBank) -> None:
    """Rather than rows going through the wrong adapter."""
    layer = next(iter(linear_modules(model).values()))
    with bank.routed([(1, shares("a")), (1, ())]), pytest.raises(ValueError, match="routed 2 tokens"):
        layer(torch.randn(1, 3, weight_OI(layer).shape[1]))


def test_layers_that_share_an_input_are_one_product(tiny_llama: Any, tiny_gpt2: Any) -> None:
    """q, k and v are, and gate and up; their weights are still theirs, as views of the joint ones. GPT-2 has none."""
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = tiny_llama.requires_grad_(False)(input_ids=ids).logits
        bank = bank_on(tiny_llama)
        after = tiny_llama(input_ids=ids).logits
    sites = {tuple(path.rpartition(".")[2] for path in site.paths) for site in bank.sites}

    assert sites == {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}
    torch.testing.assert_close(after, before, **CLOSE)
    layer = tiny_llama.model.layers[0].self_attn
    assert layer.q_proj.weight.untyped_storage().data_ptr() == layer.v_proj.weight.untyped_storage().data_ptr()
    assert all(len(site.paths) == 1 for site in bank_on(tiny_gpt2).sites)


def test_a_layer_called_with_another_input_is_still_right(tiny_llama: Any) -> None:
    """The joint product is handed out only for the very input that it was computed from."""
    bank_on(tiny_llama.requires_grad_(False))
    attention = tiny_llama.model.layers[0].self_attn
    x, other = torch.randn(1, 3, 32), torch.randn(1, 3, 32)

    attention.q_proj(x)
    k = attention.k_proj(other)

    torch.testing.assert_close(k, other @ attention.k_proj.weight.t(), **CLOSE)


def test_one_adapter_that_decodes_has_the_same_answer_by_either_way(model: Any) -> None:
    """Rows of one small adapter go through the stacks as long as these are small, rows of a large one, and prompts,
    through its own products: all give what the formula says."""
    bank = bank_on(model)
    adapters = {"small": made(model, "small", r=4), "large": made(model, "large", r=bank_module.FEW_COLUMNS + 2)}
    for name, adapter in adapters.items():
        bank.attach(name, bank.pack(adapter, name=name))

    for name, num_stacked in (("small", 3), ("large", 0)):
        route = bank.route([(1, shares(name))] * 3)
        assert route is not None
        assert (route.num_stacked, len(route.spans)) == (num_stacked, 0 if num_stacked else 1)
        check(model, bank, adapters, [shares(name)] * 3)
        check(model, bank, adapters, [], [(5, shares(name))])
    bank.close()
