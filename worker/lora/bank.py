"""AdapterBank: the adapters of a model that only serves, mixed in one step at the cost of two small products a site."""

# Shapes: N layers of one kind of site, M members of a site, I in features, O out features of one member, R columns,
# r rank of one adapter, B tokens that decode, T tokens of the step.

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise, takewhile
from typing import Final

import torch
from torch import Tensor, nn

from shared.errors import IncompatibleAdapter, StateConflict
from worker.lora.bank_route import PackedAdapter, Route, Run, Shares, Span, key_of, span_places
from worker.lora.fit import Places, check_fits
from worker.lora.product import MakeProduct, PlainProduct
from worker.lora.sites import Site, find_sites
from worker.lora.spec import LoadedAdapter
from worker.lora.stack import Columns, Part, Stack
from worker.lora.targets import linear_modules
from worker.lora.update_table import Own, UpdateKernel, UpdateTable, can_tabulate

MOST_COLUMNS: Final = 512
"""Ranks of the adapters in one joint product, summed. Beyond, computing what other rows' adapters would do costs more
than a product for each adapter by itself."""
SHORT: Final = 128
"""Tokens of a run that may share the joint products; longer ones have their own."""
SHORT_COLUMNS: Final = 8192
"""Tokens of a run times columns of the stacks up to which joint products are faster than a pair of its own."""
FEW_COLUMNS: Final = 64
"""Columns of the stacks up to which they also beat the products of the one adapter that all rows have, once packed."""
TABULATED: Final = 4096
"""Tokens of a run times the rank of its adapter up to which a compiled kernel is faster than its own products: measured
on two cores with AVX512, bfloat16, q and v of 576 features."""
GPU_COLUMNS: Final = 2048
GPU_SHORT: Final = 1024
GPU_SHORT_COLUMNS: Final = 1 << 19
"""The same where starting a product takes longer than many zeros in it."""


@dataclass
class Kind:
    """The sites that are alike in every layer of the model, in order, and the stack of those that decode."""

    sites: list[Site]
    stack: Stack | None = None

    @property
    def member_sizes(self) -> tuple[int, ...]:
        return self.sites[0].sizes


class AdapterBank:
    """Attaches adapters to a model that serves, and routes each token of a step through its own.

    Semantics, for a token routed to shares (a, w):  y = x W^T + b + sum of w s_a (x A_a^T) B_a^T
    Tokens of the bare base, and layers an adapter does not have, get exactly what the base layer gives, whatever else
    is in the step. Tokens that decode and short prompts share one pair of products: all their adapters' A side by side,
    the result zeroed where a column is not the token's own, all their B. Longer runs have a pair for each adapter.
    Where there is a compiled `kernel`, it takes what would share products, and multiplies no zeros.
    A and B are in the model's dtype. Attaching, detaching and routing cost the same however many are attached.

    `probe` runs one forward of the model; sites are found by what it calls, and computed by `product`. One bank per
    model, all but `pack` for the thread that owns the model. `close` gives the model back as it was.
    """

    def __init__(self, model: nn.Module, probe: Callable[[], object], *, product: MakeProduct = PlainProduct,
                 kernel: UpdateKernel | None = None) -> None:  # fmt: skip
        self._layers = linear_modules(model)
        self._places = Places.of(model)
        first = next(iter(self._layers.values())).weight
        self._dtype, self._device, self._product = first.dtype, first.device, product
        self._kernel = kernel
        self.sites = find_sites(model, probe, product)
        self._kinds: list[Kind] = []
        self._where: dict[str, tuple[int, int, int]] = {}
        """Path -> number of its kind, of its layer in it, of the member in the site."""
        by_shape: dict[object, int] = {}
        for site in self.sites:
            shape = (tuple(_leaf(path) for path in site.paths), site.sizes, site.in_features)
            if shape not in by_shape:
                by_shape[shape] = len(self._kinds)
                self._kinds.append(Kind([]))
            number = by_shape[shape]
            layer = len(self._kinds[number].sites)
            self._kinds[number].sites.append(site)
            site.kind, site.place = number, layer
            site.add_updates = partial(self._add_updates, self._kinds[number], number, layer)
            self._where |= {path: (number, layer, member) for member, path in enumerate(site.paths)}
            site.install()
        self._attached: dict[str, PackedAdapter] = {}
        self._columns = Columns()
        self.num_layouts = 0
        """How often the stacks have got another place in memory."""
        self._route: Route | None = None
        self._last: tuple[object, Route | None] | None = None

    def pack(self, adapter: LoadedAdapter, *, name: str) -> PackedAdapter:
        """`adapter` in this bank's layout and dtype, s folded into B; any thread may. Raises IncompatibleAdapter."""
        check_fits(self._places, adapter, name=name)
        paths: dict[int, list[str]] = {}
        for path in adapter.tensors:
            paths.setdefault(self._where[path][0], []).append(path)
        parts = {}
        for number, own in paths.items():
            kind = self._kinds[number]
            parts[number] = Part.of(
                {self._where[path][1:]: (*adapter.tensors[path], adapter.spec.scaling(path)) for path in own},
                num_layers=len(kind.sites),
                dtype=self._dtype,
                device=self._device,
            )
        if not all(part.is_finite for part in parts.values()):
            raise IncompatibleAdapter(
                f"adapter {name} overflows {self._dtype} once it is scaled", param="adapter_model"
            )
        return PackedAdapter(parts, max((part.rank for part in parts.values()), default=1))

    def attach(self, version_id: str, packed: PackedAdapter) -> None:
        """From now on shares may name it. Raises StateConflict if the name is taken."""
        if version_id in self._attached:
            raise StateConflict(f"adapter {version_id!r} is attached already")
        self._attached[version_id] = packed

    def detach(self, version_id: str) -> None:
        """Forget an adapter, and with the last one what the stacks took."""
        del self._attached[version_id]
        self._columns.of.pop(version_id, None)
        self._last = None
        if not self._attached:
            self._drop_stacks()

    def names(self) -> tuple[str, ...]:
        return tuple(self._attached)

    def __contains__(self, version_id: object) -> bool:
        return version_id in self._attached

    def __len__(self) -> int:
        return len(self._attached)

    @property
    def stack_bytes(self) -> int:
        return sum(kind.stack.size_bytes for kind in self._kinds if kind.stack is not None)

    def close(self) -> None:
        """The layers of the model compute by themselves again."""
        for site in self.sites:
            site.undo()
        self._attached.clear()
        self._drop_stacks()

    @contextmanager
    def routed(self, runs: Sequence[Run]) -> Iterator[None]:
        """Inside, a forward's stream is these runs of tokens. Those of a token each come first, long ones last."""
        with self.following(self.route(runs)):
            yield

    @contextmanager
    def following(self, route: Route | None) -> Iterator[None]:
        """Inside, a forward's tokens take this route; None is the bare base."""
        assert self._route is None, "a step is being routed already"
        self._route = route
        try:
            yield
        finally:
            self._route = None

    @property
    def tables(self) -> Mapping[int, UpdateTable] | None:
        """All that the adapters of the step inside which this is asked do, by kind of site; None if not all is in
        tables."""
        route = self._route
        if route is None:
            return {}
        return None if route.spans or route.num_stacked else route.tables

    def route(self, runs: Sequence[Run], *, by_stacks: bool = False) -> Route | None:
        """The route of these runs; kept for the next step, which is the same as long as the same rows decode.

        `by_stacks`: a single adapter too takes columns of the stacks. A route is right until the next one is made.
        """
        key = (by_stacks, *((num_tokens, key_of(shares)) for num_tokens, shares in runs))
        if self._last is None or self._last[0] != key:
            self._last = None  # stays so if this fails: its columns may have gone
            self._last = (key, self._made_route(runs, by_stacks))
        return self._last[1]

    def _made_route(self, runs: Sequence[Run], by_stacks: bool) -> Route | None:
        num_tokens = sum(length for length, _ in runs)
        different = {key_of(shares) for _, shares in runs}
        if different == {()}:
            return None
        if self._kernel is not None:
            return self._tabulated(runs, num_tokens)
        if len(different) == 1 and not by_stacks and not (num_tokens == len(runs) and self._is_in_few(runs[0][1])):
            return Route(num_tokens, spans=(Span(slice(0, num_tokens), self._packed(runs[0][1])),))
        on_gpu = self._device.type != "cpu"
        short, short_columns = (GPU_SHORT, GPU_SHORT_COLUMNS) if on_gpu else (SHORT, SHORT_COLUMNS)
        stacked = list(takewhile(lambda run: run[0] <= short, runs))
        wanted = {share.version_id: self._attached[share.version_id].rank for _, shares in stacked for share in shares}
        seated = self._seat(wanted)
        most = short_columns // max(1, self._columns.capacity)
        stacked = list(takewhile(lambda run: run[0] == 1 or run[0] <= most, stacked)) if seated else []
        is_plain = True
        weights_SR = torch.zeros(len(stacked), self._columns.capacity)
        alone: dict[object, list[tuple[int, int, Shares]]] = {}
        start = 0
        for number, (length, shares) in enumerate(runs):
            if number < len(stacked) and all(share.version_id in seated for share in shares):
                for share in shares:
                    weights_SR[number, self._columns.of[share.version_id]] = share.weight
                    is_plain = is_plain and share.weight == 1.0
            elif shares:
                alone.setdefault(key_of(shares), []).append((start, start + length, shares))
            start += length
        lengths_S = torch.tensor([length for length, _ in stacked], dtype=torch.long).to(self._device)
        weights_T1R = weights_SR.to(self._device).repeat_interleave(
            lengths_S, 0, output_size=sum(length for length, _ in stacked)
        )[:, None]
        weights = None if is_plain else weights_T1R.to(self._dtype)
        return Route(num_tokens, len(weights_T1R), weights_T1R == 0, weights, self._spans(alone))

    def _tabulated(self, runs: Sequence[Run], num_tokens: int) -> Route:
        """All runs by the kernel, but for those whose two products are large enough to be faster."""
        short: dict[int, list[tuple[int, int, Own]]] = {}
        long: dict[object, list[tuple[int, int, Shares]]] = {}
        own_parts: dict[object, dict[int, Own]] = {}
        start = 0
        for length, shares in runs:
            if shares:
                key = key_of(shares)
                if key not in own_parts:
                    own_parts[key] = self._parts(shares)
                rank = sum(self._attached[share.version_id].rank for share in shares)
                if (length == 1 or length * rank <= TABULATED) and self._can_tabulate(own_parts[key]):
                    for number, own in own_parts[key].items():
                        short.setdefault(number, []).append((start, length, own))
                else:
                    long.setdefault(key, []).append((start, start + length, shares))
            start += length
        return Route(
            num_tokens,
            spans=self._spans(long),
            tables={number: UpdateTable.of(own, self._kinds[number].member_sizes) for number, own in short.items()},
        )

    def _parts(self, shares: Shares) -> dict[int, Own]:
        """What adapters do at each kind of site where they do anything."""
        found: dict[int, Own] = {}
        for share in shares:
            for number, part in self._attached[share.version_id].parts.items():
                found[number] = (*found.get(number, ()), (part, share.weight))
        return found

    def _can_tabulate(self, parts: Mapping[int, Own]) -> bool:
        return all(can_tabulate(part) for own in parts.values() for part, _ in own)

    def _spans(self, runs: Mapping[object, list[tuple[int, int, Shares]]]) -> tuple[Span, ...]:
        """Runs that go through the same adapters together."""
        return tuple(Span(span_places(own, self._device), self._packed(own[0][2])) for own in runs.values())

    def _is_in_few(self, shares: Shares) -> bool:
        """True if the stacks are small, and stay so with these adapters."""
        rank = sum(self._attached[share.version_id].rank for share in shares)
        return max(rank, self._columns.capacity) <= FEW_COLUMNS

    def _packed(self, shares: Shares) -> tuple[tuple[PackedAdapter, float], ...]:
        return tuple((self._attached[share.version_id], share.weight) for share in shares)

    def _seat(self, wanted: Mapping[str, int]) -> set[str]:
        """Give the wanted adapters columns of the stacks, at the cost of others; the names of those that got some."""
        taken = self._columns.of
        if wanted.keys() <= taken.keys():
            return set(wanted)
        for name, rank in wanted.items():
            if name in taken:
                continue
            start = self._columns.gap(rank)
            if start is None:
                for idle in [other for other in taken if other not in wanted]:
                    del taken[idle]
                start = self._columns.gap(rank)
            if start is None:
                return self._seat_anew(wanted)
            self._place(name, slice(start, start + rank))
        return set(wanted)

    def _seat_anew(self, wanted: Mapping[str, int]) -> set[str]:
        """Lay the stacks out again for as many of the wanted adapters as they may hold."""
        seated: dict[str, int] = {}
        most, before = MOST_COLUMNS if self._device.type == "cpu" else GPU_COLUMNS, self._columns.capacity
        for name, rank in sorted(wanted.items(), key=lambda one: (one[0] not in self._columns.of, one[1])):
            if sum(seated.values()) + rank <= most:
                seated[name] = rank
        if seated.keys() <= self._columns.of.keys():
            return set(seated)  # there is no room for more
        needed = -(-sum(seated.values()) // 16) * 16
        if self._device.type != "cpu":  # seldom another size, since captured graphs read the stacks where they lie
            needed = max(before, 1 << (max(64, needed) - 1).bit_length())
        if min(most, needed) == before and self._device.type != "cpu":
            self._columns.of.clear()
        else:
            self._drop_stacks()
            self._columns.capacity = min(most, needed)
        ends = accumulate(seated.values(), initial=0)
        for name, (start, end) in zip(seated, pairwise(ends), strict=True):
            self._place(name, slice(start, end))
        return set(seated)

    def _place(self, name: str, columns: slice) -> None:
        for number, kind in enumerate(self._kinds):
            part = self._attached[name].parts.get(number)
            if part is not None and (kind.stack is None or not set(part.members) <= set(kind.stack.members)):
                kind.stack = self._grown(number, kind, part)
            if kind.stack is not None:
                kind.stack.put(columns, part)
        self._columns.of[name] = columns  # not before all of it is there: memory may run out in between

    def _grown(self, number: int, kind: Kind, part: Part) -> Stack:
        """A stack for the members of a kind that `part` brings too, with what the old one held."""
        self.num_layouts += 1
        members = sorted({*part.members, *(kind.stack.members if kind.stack is not None else ())})
        stack = Stack(
            members, kind.member_sizes, num_layers=len(kind.sites),
            in_features=kind.sites[0].in_features, num_columns=self._columns.capacity, dtype=self._dtype,
            device=self._device, product=self._product,
        )  # fmt: skip
        for name, columns in self._columns.of.items():
            stack.put(columns, self._attached[name].parts.get(number))
        return stack

    def _drop_stacks(self) -> None:
        self.num_layouts += 1
        self._columns = Columns()
        self._last = None
        for kind in self._kinds:
            kind.stack = None

    def _add_updates(self, kind: Kind, number: int, layer: int, x_TI: Tensor, y_TO: Tensor) -> None:
        """What this step's adapters do at one site. Called for every layer of every step: every line counts."""
        route = self._route
        if route is None:
            return
        num_tokens, num_stacked = x_TI.shape[0], route.num_stacked
        if num_tokens != route.num_tokens:
            paths = " and ".join(kind.sites[layer].paths)
            raise ValueError(f"routed {route.num_tokens} tokens, but the input of {paths} has {num_tokens}")
        table = route.tables.get(number)
        if table is not None:
            assert self._kernel is not None
            self._kernel(table, layer, x_TI, y_TO)
        if num_stacked and kind.stack is not None:
            assert route.hidden_B1R is not None
            if num_stacked == num_tokens:
                kind.stack.add(layer, x_TI, y_TO, route.hidden_B1R, route.weights_B1R)
            else:
                kind.stack.add(layer, x_TI[:num_stacked], y_TO[:num_stacked], route.hidden_B1R, route.weights_B1R)
        for span in route.spans:
            for packed, weight in span.adapters:
                part = packed.parts.get(number)
                if part is not None:
                    part.add(layer, x_TI, y_TO, kind.member_sizes, places=span.places, weight=weight)


def _leaf(path: str) -> str:
    """The part of a path below the innermost numbered block: 'self_attn.q_proj' of 'layers.0.self_attn.q_proj'."""
    parts = path.split(".")
    numbered = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbered[-1] + 1 :]) if numbered else path
