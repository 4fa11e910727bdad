"""Where a serving model's linear layers compute: those that read the same input as one product, then the updates."""

# Shapes: T tokens of a step, I in features, O out features of all members together, o of one member.

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn

from worker.lora.product import MakeProduct
from worker.lora.targets import linear_modules
from worker.lora.update import Linear, weight_OI

AddUpdates = Callable[[Tensor, Tensor], None]
"""(x (T, I), y (T, O)): adds to y, in place, what this step's adapters do at a site."""


class Site:
    """Linear layers of one model that are given the same input: q, k and v of a layer, or one layer by itself.

    While installed, the first of them that is called computes them all, as one product over their weights laid under
    each other, and adds the updates; the others hand out their part. The layers stay the objects that they are, and
    their weights views of the joint one. An input that the others do not share is computed anew, so that a model that
    calls them in another way is slower, not wrong.
    """

    def __init__(self, paths: Sequence[str], layers: Sequence[Linear], product: MakeProduct) -> None:
        self.paths = tuple(paths)
        self.layers = tuple(layers)
        self.sizes = tuple(weight_OI(layer).shape[0] for layer in layers)
        self.in_features = weight_OI(layers[0]).shape[1]
        self.add_updates: AddUpdates | None = None
        self.kind, self.place = 0, 0
        """Of which kind it is in a bank, and which among those."""
        self._seen: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()
        self.product = product(*_joint(self.layers, self.sizes))

    def install(self) -> None:
        for i, layer in enumerate(self.layers):
            # Of this instance alone: the module stays the object that it is.
            vars(layer)["forward"] = partial(self._member, i) if len(self.layers) > 1 else self._whole

    def undo(self) -> None:
        """The layers compute by themselves again."""
        for layer in self.layers:
            layer.__dict__.pop("forward", None)
        self._seen, self._parts = None, ()

    def compute(self, x_TI: Tensor) -> Tensor:
        """What all its layers give together, (T, O), with the updates."""
        y_TO = self.product(x_TI)
        if self.add_updates is not None:
            self.add_updates(x_TI, y_TO)
        return y_TO

    def onto(self, x_TI: Tensor, y_TO: Tensor) -> Tensor:
        """`compute` added to y, a new tensor."""
        sum_TO = self.product.onto(x_TI, y_TO)
        if self.add_updates is not None:
            self.add_updates(x_TI, sum_TO)
        return sum_TO

    def _member(self, i: int, x: Tensor) -> Tensor:
        if x is not self._seen:
            self._parts = torch.split(self._whole(x), list(self.sizes), dim=-1)
            self._seen = x
        part = self._parts[i]
        if i == len(self.layers) - 1:
            self._seen, self._parts = None, ()
        return part

    def _whole(self, x: Tensor) -> Tensor:
        return self.compute(x.reshape(-1, self.in_features)).view(*x.shape[:-1], -1)


def find_sites(model: nn.Module, probe: Callable[[], object], product: MakeProduct) -> list[Site]:
    """The sites of all linear layers but the output head, in the order in which `probe`, one forward, calls them.

    Layers form one site if they lie in the same module and are called one after the other with the very same input.
    """
    layers = linear_modules(model)
    calls: list[tuple[str, Tensor]] = []

    def see(path: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append((path, args[0]))

    hooks = [layer.register_forward_pre_hook(partial(see, path)) for path, layer in layers.items()]
    try:
        probe()
    finally:
        for hook in hooks:
            hook.remove()
    groups: list[list[str]] = []
    before: Tensor | None = None
    for path, x in calls:
        if any(path in group for group in groups):
            continue  # called again: the site it has will do
        joins = (
            before is x and _can_join(layers[groups[-1][-1]], layers[path]) and _parent(groups[-1][-1]) == _parent(path)
        )
        groups.append([path]) if not joins else groups[-1].append(path)
        before = x
    groups += [[path] for path in layers if not any(path in group for group in groups)]
    return [Site(group, [layers[path] for path in group], product) for group in groups]


_FUSED: Final = nn.Linear
"""What can be laid under each other; GPT-2's Conv1D stores its weight the other way round and comes fused already."""


def _can_join(one: Linear, other: Linear) -> bool:
    return type(one) is type(other) is _FUSED and one.weight.dtype == other.weight.dtype


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _joint(layers: Sequence[Linear], sizes: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Weights (O, I) and biases (O,) of all layers under each other; those of the layers become views of them."""
    if len(layers) == 1:
        return weight_OI(layers[0]).detach(), None if layers[0].bias is None else layers[0].bias.detach()
    weight_OI_ = torch.cat([layer.weight.detach() for layer in layers])
    for layer, part in zip(layers, torch.split(weight_OI_, list(sizes)), strict=True):
        layer.weight.data = part
    if all(layer.bias is None for layer in layers):
        return weight_OI_, None
    bias_O = torch.cat([
        weight_OI_.new_zeros(size) if layer.bias is None else layer.bias.detach()
        for layer, size in zip(layers, sizes, strict=True)
    ])  # fmt: skip
    return weight_OI_, bias_O
