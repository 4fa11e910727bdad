"""Whether an adapter fits a base model, and a shape that it is to be trained on in."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from shared.errors import IncompatibleAdapter, UnknownTarget
from shared.specs import LoraSpec
from worker.lora.spec import AdapterSpec, LoadedAdapter
from worker.lora.targets import bare, head_paths, linear_modules, matches
from worker.lora.update import weight_OI

_SHOWN = 8


@dataclass(frozen=True)
class Places:
    """Where adapters may go in one model: its linear layers by path, with their (O, I), and the paths of its heads.

    Found by walking over all modules, which takes longer than all other checks of an adapter.
    """

    shapes: Mapping[str, tuple[int, int]]
    heads: frozenset[str]
    model_name: str

    @classmethod
    def of(cls, model: nn.Module) -> "Places":
        shapes = {}
        for path, layer in linear_modules(model).items():
            out_features, in_features = weight_OI(bare(layer)).shape
            shapes[path] = out_features, in_features
        return cls(shapes, frozenset(head_paths(model)), _called(model))


def check_fits(model: nn.Module | Places, adapter: LoadedAdapter, *, name: str) -> None:
    """Every tensor belongs to a linear layer of `model` and has its size, and every targeted layer has its tensors.

    Raises one IncompatibleAdapter for all that does not fit. Changes nothing.
    """
    places = model if isinstance(model, Places) else Places.of(model)
    problems = _problems(places, adapter)
    if problems:
        raise IncompatibleAdapter(f"adapter {name} does not fit {places.model_name!r}: {_told(problems)}",
                                  param="adapter_model")  # fmt: skip


def check_continues(model: nn.Module, adapter: LoadedAdapter, spec: AdapterSpec, *, name: str) -> None:
    """`spec` on `model` has just the modules, ranks and scales of `adapter`, so that training can go on from there.

    Raises one IncompatibleAdapter for all that differs. Changes nothing.
    """
    places = Places.of(model)
    problems = _problems(places, replace(adapter, spec=spec)) + [
        f"{path} is scaled by {adapter.spec.scaling(path):g}, the new shape says {spec.scaling(path):g}"
        for path in sorted(adapter.tensors)
        if not math.isclose(adapter.spec.scaling(path), spec.scaling(path))
    ]
    if problems:
        raise IncompatibleAdapter(
            f"adapter {name} cannot start from these weights on {places.model_name!r}: {_told(problems)}",
            param="training.init_from",
        )


def check_patterns(paths: Iterable[str], spec: LoraSpec) -> None:
    """Every key of the patterns matches one of `paths`, the modules that are adapted; raises UnknownTarget."""
    adapted = list(paths)
    unknown = {
        field: [key for key in pattern if not any(matches(path, key) for path in adapted)]
        for field, pattern in (("rank_pattern", spec.rank_pattern), ("alpha_pattern", spec.alpha_pattern))
    }
    told = [f"{field}: {', '.join(map(repr, keys))} match" for field, keys in unknown.items() if keys]
    if told:
        leaves = ", ".join(dict.fromkeys(path.rpartition(".")[2] for path in adapted))
        first = next(field for field, keys in unknown.items() if keys)
        raise UnknownTarget(f"{'; '.join(told)} no adapted module; adapted are {leaves}", param=f"lora.{first}")


def _called(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__


def _told(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    noun = "module" if len(problems) == 1 else "modules"
    return f"{len(problems)} {noun} -- {'; '.join(problems[:_SHOWN])}{more}"


def _problems(places: Places, adapter: LoadedAdapter) -> list[str]:
    layers, heads = places.shapes, places.heads
    targets = adapter.spec.target_modules
    if isinstance(targets, str):
        targeted = set(layers)
    else:
        targeted = {path for path in (*layers, *heads) if any(matches(path, target) for target in targets)}
    problems = []
    for path in sorted(targeted | adapter.tensors.keys()):
        if path in heads:
            problems.append(f"{path} is the output head, which cannot be adapted")
        elif path not in layers:
            problems.append(f"{path}: no such linear module")
        elif path not in adapter.tensors:
            problems.append(f"{path}: lora_A and lora_B are missing")
        elif path not in targeted:
            problems.append(f"{path} is not among the target_modules")
        else:
            out_features, in_features = layers[path]
            a_RI, b_OR = adapter.tensors[path]
            rank = adapter.spec.rank(path)
            for half, given, needed in (("A", a_RI, (rank, in_features)), ("B", b_OR, (out_features, rank))):
                if tuple(given.shape) != needed:
                    problems.append(f"{path}.lora_{half} is {tuple(given.shape)}, the model needs {needed}")
    return problems
