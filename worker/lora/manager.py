"""AdapterManager: the named adapters of one model."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from shared.errors import NotFound, StateConflict
from shared.specs import LoraSpec
from worker.lora import routing
from worker.lora.fit import check_continues, check_fits, check_patterns
from worker.lora.format import read_adapter, write_adapter
from worker.lora.layer import LoRALinear, LowRank, initial_a
from worker.lora.routing import Route, Routing
from worker.lora.spec import AdapterSpec, LoadedAdapter
from worker.lora.targets import bare, linear_modules, resolve_targets, shortest_names
from worker.lora.update import weight_OI

Names = list[str]
Tensors = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class _Attached:
    spec: AdapterSpec
    paths: tuple[str, ...]


class AdapterManager:
    """Attaches LoRA adapters to a model, says which of them a forward uses, and takes them off again.

    The model itself is the base: until an adapter is activated or routed it computes what it always did. While any
    adapter is attached all of the model's own parameters are frozen; when the last one goes they require gradients
    as before, and every module is the very object that it was. Adding or removing an adapter touches no other.

    One manager per model, used by one thread at a time. An attached name may be any text that is not empty.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._routing = Routing()
        self._attached: dict[str, _Attached] = {}
        self._required_grad: list[tuple[nn.Parameter, bool]] = []
        self._open_routes = 0

    def add(self, name: str, spec: LoraSpec, *, seed: int | None = None) -> Names:
        """Attach a fresh, trainable adapter that changes nothing yet (B = 0); returns the paths of its modules.

        `seed` fixes A and the dropout; they are drawn from the adapter's own generators, torch's global one is left
        alone. Raises UnknownTarget, also for a pattern that matches nothing, and StateConflict if the name is taken.
        """
        self._must_be_free(name)
        paths, own_spec = self._resolved(spec)
        layers = linear_modules(self.model)
        own_draws = torch.Generator().manual_seed(_fresh_seed() if seed is None else seed)
        tensors: dict[str, tuple[Tensor, Tensor]] = {}
        for path in paths:
            out_features, in_features = weight_OI(bare(layers[path])).shape
            rank = own_spec.rank(path)
            tensors[path] = (initial_a(rank, in_features, own_draws), torch.zeros(out_features, rank))
        self._attach(name, own_spec, tensors, _drawn_seed(own_draws))
        return paths

    def add_from(self, name: str, adapter: LoadedAdapter, spec: LoraSpec, *, seed: int | None = None) -> Names:
        """Attach a trainable adapter that starts at a copy of `adapter`'s tensors; returns the paths of its modules.

        It has `spec`'s dropout, which `seed` fixes. All else in `spec` must be what `adapter` is, module by module:
        raises IncompatibleAdapter that lists every rank and scale that is not, and UnknownTarget and StateConflict as
        `add` does.
        """
        self._must_be_free(name)
        paths, own_spec = self._resolved(spec)
        check_continues(self.model, adapter, own_spec, name=name)
        own_draws = torch.Generator().manual_seed(_fresh_seed() if seed is None else seed)
        self._attach(name, own_spec, adapter.tensors, _drawn_seed(own_draws))
        return paths

    def load(self, name: str, directory: Path) -> None:
        """Attach the adapter that is stored in `directory`, not trainable. Raises IncompatibleAdapter."""
        self.load_tensors(name, read_adapter(directory))

    def load_tensors(self, name: str, adapter: LoadedAdapter, *, seed: int | None = None) -> None:
        """Attach an adapter that was read before, not trainable; a copy, so that `adapter` stays as it is.

        `seed` fixes its dropout, should it be trained on. Raises IncompatibleAdapter that lists every
        module and shape which does not fit this model.
        """
        self._must_be_free(name)
        check_fits(self.model, adapter, name=name)
        self._attach(name, adapter.spec, adapter.tensors, _fresh_seed() if seed is None else seed)
        self.set_trainable(name, False)

    def snapshot(self, name: str) -> LoadedAdapter:
        """A copy of the adapter on the CPU, which later training does not change."""
        attached = self._named(name)
        tensors = {
            path: (low.lora_A.detach().to("cpu", torch.float32, copy=True),
                   low.lora_B.detach().to("cpu", torch.float32, copy=True))
            for path, low in self._updates(name)
        }  # fmt: skip
        return LoadedAdapter(spec=attached.spec, tensors=tensors)

    def save(self, name: str, directory: Path, *, base_model_name: str, task_type: str = "CAUSAL_LM") -> None:
        """Write the adapter to `directory` in PEFT's format."""
        write_adapter(directory, self.snapshot(name), base_model_name=base_model_name, task_type=task_type)

    def activate(self, name: str) -> None:
        """From now on the whole input of every forward goes through this adapter."""
        self._named(name)
        self._routing.route = routing.whole(name)

    def deactivate(self) -> None:
        """From now on the model is the bare base."""
        self._routing.route = routing.BASE

    @contextmanager
    def routed_rows(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside, row i of a batch uses adapter names[i]; None is the base. Afterwards all is as before."""
        with self._routed(names, routing.rows(names)):
            yield

    @contextmanager
    def routed_segments(
        self, segments: Sequence[tuple[str | None, int]], *, seeds: Sequence[int] | None = None
    ) -> Iterator[None]:
        """Inside, a flat token stream is cut into (adapter or None, num_tokens). Afterwards all is as before.

        With `seeds`, one per segment, dropout depends on a segment's seed and on nothing else that was drawn.
        """
        with self._routed([name for name, _ in segments], routing.segments(segments, seeds=seeds)):
            yield

    def train(self, mode: bool = True) -> None:
        """Switch the adapters' dropout on or off. The base modules keep their mode, and so their own dropout."""
        for module in self.model.modules():
            if isinstance(module, LoRALinear):
                module.training = mode
                module.updates.train(mode)

    def set_trainable(self, name: str, trainable: bool) -> None:
        """Whether gradients are formed for this adapter's A and B."""
        for parameter in self.parameters(name).values():
            parameter.requires_grad_(trainable)
            parameter.grad = parameter.grad if trainable else None

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """'<module path>.lora_A' and '.lora_B' -> parameter (fp32), in the model's order."""
        return {
            f"{path}.lora_{which}": parameter
            for path, low in self._updates(name)
            for which, parameter in (("A", low.lora_A), ("B", low.lora_B))
        }

    def remove(self, name: str) -> None:
        """Take the adapter off; modules left with none are put back. An active adapter is deactivated first."""
        attached = self._named(name)
        if self._open_routes:
            raise StateConflict(f"adapter {name!r} cannot be removed while a forward is routed")
        if any(share.adapter == name for share in self._routing.route.shares):
            self.deactivate()
        for path in attached.paths:
            layer = self.model.get_submodule(path)
            assert isinstance(layer, LoRALinear)
            layer.detach(name)
            if not layer.updates:
                _replace(self.model, path, layer.unwrap())
        del self._attached[name]
        if not self._attached:
            for parameter, required_grad in self._required_grad:
                parameter.requires_grad_(required_grad)
            self._required_grad = []

    def spec(self, name: str) -> AdapterSpec:
        return self._named(name).spec

    def num_trainable(self) -> int:
        """How many numbers of the model training would change."""
        return sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)

    def list(self) -> Names:
        """The names of the attached adapters, in the order in which they came."""
        return [*self._attached]

    def __contains__(self, name: object) -> bool:
        return name in self._attached

    def _resolved(self, spec: LoraSpec) -> tuple[Names, AdapterSpec]:
        """The paths that `spec` selects, and `spec` with names that select just those, also after a round trip."""
        paths = resolve_targets(self.model, spec.target_modules)
        check_patterns(paths, spec)
        layers = linear_modules(self.model)
        is_transposed = any(isinstance(bare(layers[path]), Conv1D) for path in paths)
        return paths, AdapterSpec.of(spec, tuple(shortest_names(self.model, paths)), fan_in_fan_out=is_transposed)

    def _attach(self, name: str, spec: AdapterSpec, tensors: Tensors, dropout_seed: int) -> None:
        """Nothing here can fail half way: targets and shapes were checked before."""
        if not self._attached:
            self._required_grad = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
            self.model.requires_grad_(False)
        layers = linear_modules(self.model)
        paths = tuple(path for path in layers if path in tensors)
        draws = torch.Generator(device=layers[paths[0]].weight.device).manual_seed(dropout_seed)
        for salt, path in enumerate(paths):
            layer = layers[path]
            if not isinstance(layer, LoRALinear):
                layer = LoRALinear(layer, self._routing)
                _replace(self.model, path, layer)
            a_RI, b_OR = (half.to(layer.weight.device, torch.float32, copy=True) for half in tensors[path])
            low = LowRank(a_RI, b_OR, scaling=spec.scaling(path), dropout=spec.dropout, draws=draws, salt=salt)
            layer.attach(name, low)
        self._attached[name] = _Attached(spec, paths)

    def _updates(self, name: str) -> Iterator[tuple[str, LowRank]]:
        for path in self._named(name).paths:
            layer = self.model.get_submodule(path)
            assert isinstance(layer, LoRALinear)
            yield path, layer.update(name)

    @contextmanager
    def _routed(self, names: Sequence[str | None], route: Route) -> Iterator[None]:
        for name in names:
            if name is not None:
                self._named(name)
        self._open_routes += 1
        try:
            with self._routing.using(route):
                yield
        finally:
            self._open_routes -= 1

    def _named(self, name: str) -> _Attached:
        if name not in self._attached:
            raise NotFound(f"adapter {name!r} is not attached; there are {', '.join(self._attached) or 'none'}")
        return self._attached[name]

    def _must_be_free(self, name: str) -> None:
        if not name:
            raise ValueError("an adapter needs a name")
        if name in self._attached:
            raise StateConflict(f"adapter {name!r} is attached already")
        wrapped = (layer for layer in self.model.modules() if isinstance(layer, LoRALinear))
        if any(layer.routing is not self._routing for layer in wrapped):
            raise StateConflict("another AdapterManager has adapters on this model")


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _fresh_seed() -> int:
    return secrets.randbits(63)


def _drawn_seed(draws: torch.Generator) -> int:
    return int(torch.randint(2**62, (), generator=draws))
