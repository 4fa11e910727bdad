"""The shape of the adapter that a job asks for, held against what the base model has and where the job starts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from api.problems import Problems
from shared.errors import UnknownTarget
from shared.specs import LoraSpec


@dataclass(frozen=True)
class Start:
    """The adapter version that a job starts from. `reference` is name@number."""

    version_id: str
    reference: str
    lora: LoraSpec


def resolve_shape(asked: LoraSpec, config: dict[str, Any], problems: Problems) -> LoraSpec:
    """`asked`, with targets that the base model of this `config` has.

    The default targets give way to 'attention' where the model lacks them. Names are judged as far as can be without
    the model: dotted ones by their last part. Adds to `problems` what the model has not.
    """
    there: set[str] = set(config["linear_modules"])
    presets: dict[str, list[str]] = config["presets"]
    if "target_modules" not in asked.model_fields_set and not there.issuperset(asked.target_modules):
        asked = asked.model_copy(update={"target_modules": "attention"})
    targets = _names(asked, presets)
    missing = [name for name in targets if _leaf(name) not in there]
    if isinstance(asked.target_modules, str) and not targets:
        missing = [asked.target_modules]
    if missing:
        problems.add(
            "lora.target_modules",
            f"'lora.target_modules': the model has no {_quoted(missing)};"
            f" it has {', '.join(sorted(there))}, and the presets {', '.join(sorted(presets))}.",
            UnknownTarget,
        )
        return asked
    for field, keys in (("rank_pattern", asked.rank_pattern), ("alpha_pattern", asked.alpha_pattern)):
        strangers = [key for key in keys if not any(_may_meet(key, target) for target in targets)]
        if strangers:
            problems.add(
                f"lora.{field}",
                f"'lora.{field}': {_quoted(strangers)} can match no adapted module;"
                f" adapted are {', '.join(sorted(targets))}.",
                UnknownTarget,
            )
    return asked


def continued_shape(asked: LoraSpec, start: Start, config: dict[str, Any], problems: Problems) -> LoraSpec:
    """The shape of the adapter that is trained on, with the dropout that is asked for if any is.

    Adds to `problems` each other field that is asked for and is not the start's.
    """
    for field in [name for name in LoraSpec.model_fields if name in asked.model_fields_set and name != "dropout"]:
        wanted, there = _comparable(asked, field, config["presets"]), _comparable(start.lora, field, config["presets"])
        if wanted != there:
            problems.add(
                f"lora.{field}",
                f"'lora.{field}' is {getattr(asked, field)!r}, but {start.reference}, from which 'training.init_from'"
                f" starts, has {getattr(start.lora, field)!r}; leave 'lora.{field}' out to keep that.",
            )
    return start.lora.model_copy(update={"dropout": asked.dropout} if "dropout" in asked.model_fields_set else {})


def _names(spec: LoraSpec, presets: dict[str, list[str]]) -> list[str]:
    """The names that the targets stand for."""
    targets = spec.target_modules
    return presets.get(targets, []) if isinstance(targets, str) else targets


def _comparable(spec: LoraSpec, field: str, presets: dict[str, list[str]]) -> object:
    """A value that is equal for two specs of one meaning: targets in any order, patterns in theirs."""
    if field == "target_modules":
        return set(_names(spec, presets))
    value = getattr(spec, field)
    return list(value.items()) if isinstance(value, dict) else value


def _may_meet(name: str, other: str) -> bool:
    """True if a path can end in both names: one of them then ends in the other."""
    return f".{name}".endswith(f".{other}") or f".{other}".endswith(f".{name}")


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names))
