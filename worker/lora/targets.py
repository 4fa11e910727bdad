"""Which linear layers of a model an adapter may update, and what they are called."""

from collections.abc import Iterable, Sequence
from typing import Final

from torch import nn
from transformers.pytorch_utils import Conv1D

from shared.errors import UnknownTarget
from worker.lora.layer import Linear, LoRALinear

PRESETS: Final = ("attention", "mlp", "all-linear")


def matches(path: str, target: str) -> bool:
    """True if `target` is the path or a dotted suffix of it: 'q_proj' is in 'h.0.q_proj' but not in 'h.0.xq_proj'."""
    return path == target or path.endswith("." + target)


def linear_modules(model: nn.Module) -> dict[str, Linear | LoRALinear]:
    """Path -> layer, in the model's order, for each linear layer but the output head; wrapped ones as LoRALinear."""
    heads = head_paths(model)
    return {path: module for path, module in _linears(model) if path not in heads}


def head_paths(model: nn.Module) -> list[str]:
    """Paths of the output head and of any linear layer tied to an embedding.

    An update of a tied head would change only one of its two uses, and serving engines expect the head unchanged.
    """
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [path for path, module in _linears(model) if module is head or id(module.weight) in embeddings]


def bare(layer: Linear | LoRALinear) -> Linear:
    """The base model's own layer."""
    return layer.wrapped if isinstance(layer, LoRALinear) else layer


def _linears(model: nn.Module) -> list[tuple[str, Linear | LoRALinear]]:
    inner = {id(module.wrapped) for module in model.modules() if isinstance(module, LoRALinear)}
    return [
        (path, module)
        for path, module in model.named_modules()
        if path and isinstance(module, nn.Linear | Conv1D | LoRALinear) and id(module) not in inner
    ]


def resolve_targets(model: nn.Module, target_modules: str | Sequence[str]) -> list[str]:
    """Paths that a preset, or names and dotted suffixes, select, in the model's order.

    Raises UnknownTarget that names every target which selects nothing or the output head, and lists what there is.
    """
    paths = list(linear_modules(model))
    if isinstance(target_modules, str):
        chosen = preset_paths(model).get(target_modules, [])
        unknown = [] if chosen else [target_modules]
        heads: list[str] = []
    else:
        unknown = [t for t in target_modules if not any(matches(p, t) for p, _ in _linears(model))]
        heads = [t for t in target_modules if any(matches(p, t) for p in head_paths(model))]
        chosen = [p for p in paths if any(matches(p, t) for t in target_modules)]
    if unknown or heads or not chosen:
        raise UnknownTarget(_explain(model, unknown, heads), param="target_modules")
    return chosen


def preset_paths(model: nn.Module) -> dict[str, list[str]]:
    """Preset -> paths. Inside a numbered block, what lies under an attention module is attention, the rest is mlp;
    'all-linear' is every linear layer but the output head, also those outside the blocks (OPT's project_in)."""
    paths = list(linear_modules(model))
    inside = {path: _within_block(path) for path in paths}
    is_attention = {path: any("attn" in part or "attention" in part for part in inside[path] or ()) for path in paths}
    return {
        "attention": [path for path in paths if is_attention[path]],
        "mlp": [path for path in paths if inside[path] is not None and not is_attention[path]],
        "all-linear": paths,
    }


def _within_block(path: str) -> list[str] | None:
    """The parents below the innermost numbered block: ['mlp'] of 'h.0.mlp.c_fc'; None outside of any block."""
    parents = path.split(".")[:-1]
    numbered = [i for i, part in enumerate(parents) if part.isdigit()]
    return parents[numbered[-1] + 1 :] if numbered else None


def linear_leaf_names(model: nn.Module) -> list[str]:
    """Last parts of the paths of all linear layers but the output head, each once, in the model's order."""
    return list(dict.fromkeys(path.rpartition(".")[2] for path in linear_modules(model)))


def preset_leaf_names(model: nn.Module) -> dict[str, list[str]]:
    """Preset -> the names that select it; a dotted suffix where the leaf alone says too much (GPT-2's attn.c_proj)."""
    return {preset: shortest_names(model, paths) for preset, paths in preset_paths(model).items()}


def shortest_names(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """The shortest dotted suffixes that together select exactly `paths` among all modules of the model."""
    wanted = list(paths)
    inner = tuple(f"{path}." for path, module in _linears(model) if isinstance(module, LoRALinear))
    others = {path for path, _ in model.named_modules() if not (inner and path.startswith(inner))} - set(wanted)
    names: dict[str, None] = {}
    says_too_much: dict[str, bool] = {}
    for path in wanted:
        parts = path.split(".")
        for i in range(len(parts) - 1, -1, -1):
            name = ".".join(parts[i:])
            if name not in says_too_much:
                says_too_much[name] = any(matches(other, name) for other in others)
            if not says_too_much[name]:
                names[name] = None
                break
    return list(names)


def _explain(model: nn.Module, unknown: Sequence[str], heads: Sequence[str]) -> str:
    problems = []
    if unknown:
        problems.append(f"no linear module matches {', '.join(map(repr, unknown))}")
    if heads:
        problems.append(f"{', '.join(map(repr, heads))} is the output head, which cannot be adapted")
    there_is = ", ".join(linear_leaf_names(model)) or "none"
    presets = ", ".join(preset for preset, paths in preset_paths(model).items() if paths) or "none"
    return f"{'; '.join(problems) or 'no target was given'}. Linear modules: {there_is}. Presets: {presets}"
