"""Whether an adapter fits a base model."""

from torch import nn

from shared.errors import IncompatibleAdapter
from worker.lora.spec import LoadedAdapter
from worker.lora.targets import bare, head_paths, linear_modules, matches
from worker.lora.update import weight_OI

_SHOWN = 8


def check_fits(model: nn.Module, adapter: LoadedAdapter, *, name: str) -> None:
    """Every tensor belongs to a linear layer of `model` and has its size, and every targeted layer has its tensors.

    Raises one IncompatibleAdapter for all that does not fit. Changes nothing.
    """
    problems = _problems(model, adapter)
    if problems:
        base = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise IncompatibleAdapter(
            f"adapter {name} does not fit {base!r}: {len(problems)} "
            f"{'module' if len(problems) == 1 else 'modules'} -- {'; '.join(problems[:_SHOWN])}{more}",
            param="adapter_model",
        )


def _problems(model: nn.Module, adapter: LoadedAdapter) -> list[str]:
    layers, heads = linear_modules(model), head_paths(model)
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
            out_features, in_features = weight_OI(bare(layers[path])).shape
            a_RI, b_OR = adapter.tensors[path]
            rank = adapter.spec.rank(path)
            for half, given, needed in (("A", a_RI, (rank, in_features)), ("B", b_OR, (out_features, rank))):
                if tuple(given.shape) != needed:
                    problems.append(f"{path}.lora_{half} is {tuple(given.shape)}, the model needs {needed}")
    return problems
