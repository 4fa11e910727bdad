"""PEFT's adapter_config.json, read and written field by field; it is never handed to a library.

Source: PEFT 0.21.2, `LoraConfig`; that is also the version which we write as `peft_version`.
"""

import json
import re
from collections.abc import Callable
from typing import Any, Final

from shared import limits
from worker.lora.spec import AdapterSpec
from worker.lora.tensor_file import refuse, strict_json

CONFIG_NAME: Final = "adapter_config.json"
_NAME: Final = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")

# These say nothing about what the adapter computes.
_DESCRIPTIVE: Final = frozenset({"base_model_name_or_path", "fan_in_fan_out", "inference_mode", "peft_version",
                                 "revision", "task_type"})  # fmt: skip
# Values at which an option that we do not offer is off. Anything else that is not listed must be empty.
_OFF: Final[dict[str, Callable[[Any], bool]]] = {
    "bias": lambda value: value == "none",
    # Inert without megatron_config, which must be empty; PEFT writes this name into every file.
    "megatron_core": lambda value: value in (None, "megatron.core"),
    # The size that use_qalora would use.
    "qalora_group_size": lambda value: value is None or type(value) is int,
    # These only chose A's first values. The others (pissa, olora, loftq, ...) also changed the base weights.
    "init_lora_weights": lambda value: value in (True, False, None, "gaussian", "eva", "orthogonal"),
    # Written when no task_type was given: the class that was adapted. Not imported, only looked at.
    "auto_mapping": lambda value: not value or _names_transformers(value),
}


def parse_config(text: bytes | bytearray) -> tuple[AdapterSpec, str | None]:
    """The adapter's shape, and the base model that the file names.

    Raises IncompatibleAdapter that names every field which is not valid or which asks for something else than LoRA
    on linear layers (DoRA, bias, modules_to_save, regular expressions as targets, ...).
    """
    try:
        config = strict_json(text)
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
    except ValueError as error:
        raise refuse([f"not valid: {error}"], file=CONFIG_NAME) from None
    fields = _Fields(config)
    if config.get("peft_type") != "LORA":
        fields.problems.append(f"peft_type is {config.get('peft_type')!r:.80}, must be 'LORA'")
    spec = AdapterSpec(
        r=fields.integer("r", default=8),
        alpha=fields.number("lora_alpha", default=8.0, above=0.0, upto=limits.MAX_ALPHA),
        dropout=fields.number("lora_dropout", default=0.0, above=-1e-9, upto=limits.MAX_DROPOUT),
        use_rslora=fields.flag("use_rslora"),
        target_modules=fields.targets("target_modules"),
        rank_pattern=fields.pattern("rank_pattern", _is_rank),
        alpha_pattern=fields.pattern("alpha_pattern", lambda value: _is_number(value, 0.0, limits.MAX_ALPHA)),
        fan_in_fan_out=fields.flag("fan_in_fan_out"),
    )
    base_model_name = config.get("base_model_name_or_path")
    if base_model_name is not None and not isinstance(base_model_name, str):
        fields.problems.append("base_model_name_or_path must be text")
    fields.refuse_what_is_left()
    if fields.problems:
        raise refuse(fields.problems, file=CONFIG_NAME)
    return spec, base_model_name


def render_config(spec: AdapterSpec, *, base_model_name: str, task_type: str) -> bytes:
    """adapter_config.json of `spec`, with the fields that PEFT and the serving engines read."""
    targets = spec.target_modules
    fields = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name,
        "revision": None,
        "r": spec.r,
        "lora_alpha": _plain(spec.alpha),
        "lora_dropout": spec.dropout,
        "target_modules": targets if isinstance(targets, str) else list(targets),
        "fan_in_fan_out": spec.fan_in_fan_out,
        "bias": "none",
        "use_rslora": spec.use_rslora,
        "use_dora": False,
        "modules_to_save": None,
        "rank_pattern": dict(spec.rank_pattern),
        "alpha_pattern": {name: _plain(alpha) for name, alpha in spec.alpha_pattern.items()},
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
        "inference_mode": True,
        "peft_version": "0.21.2",
    }
    # The fields are sorted as PEFT's are, but not the patterns in them: of two keys that match, the first counts.
    return json.dumps(dict(sorted(fields.items())), indent=2).encode() + b"\n"


class _Fields:
    """Reads fields with their checks, collects the problems, and knows which fields nobody read."""

    def __init__(self, config: dict[str, Any]) -> None:
        self._config = config
        self._read = {"peft_type"} | _DESCRIPTIVE
        self.problems: list[str] = []

    def _take(self, name: str, default: Any) -> Any:
        self._read.add(name)
        value = self._config.get(name)
        return default if value is None else value

    def _wrong(self, name: str, value: Any, needed: str) -> None:
        self.problems.append(f"{name} is {value!r:.80}, must be {needed}")

    def integer(self, name: str, *, default: int) -> int:
        value = self._take(name, default)
        if _is_rank(value):
            return int(value)
        self._wrong(name, value, f"a whole number from 1 to {limits.MAX_RANK}")
        return default

    def number(self, name: str, *, default: float, above: float, upto: float) -> float:
        value = self._take(name, default)
        if _is_number(value, above, upto):
            return max(float(value), 0.0)
        self._wrong(name, value, f"a number from {max(above, 0.0):g} to {upto:g}")
        return default

    def flag(self, name: str) -> bool:
        value = self._take(name, False)
        if isinstance(value, bool):
            return value
        self._wrong(name, value, "true or false")
        return False

    def targets(self, name: str) -> tuple[str, ...] | Any:
        value = self._take(name, None)
        if value == "all-linear":
            return "all-linear"
        if isinstance(value, list) and value and all(_is_name(item) for item in value):
            return tuple(value)
        self._wrong(name, value, "a list of module names or 'all-linear' (regular expressions are not supported)")
        return ()

    def pattern(self, name: str, is_valid: Callable[[Any], bool]) -> dict[str, Any]:
        value = self._take(name, {})
        if isinstance(value, dict) and all(_is_name(key) and is_valid(item) for key, item in value.items()):
            return value
        self._wrong(name, value, "an object from plain module names to values within the limits")
        return {}

    def refuse_what_is_left(self) -> None:
        """Every field that was not read must be off, known or not: it could change what the adapter computes."""
        for name in sorted(self._config.keys() - self._read):
            value = self._config[name]
            is_off = _OFF[name](value) if name in _OFF else value in (None, False, [], {}, "")
            if not is_off:
                self.problems.append(f"{name!r:.80} = {value!r:.80} is not supported")


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= limits.MAX_RANK


def _is_number(value: Any, above: float, upto: float) -> bool:
    return type(value) in (int, float) and above < value <= upto


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 200 and _NAME.fullmatch(value) is not None


def _names_transformers(value: Any) -> bool:
    library = value.get("parent_library") if isinstance(value, dict) else None
    return isinstance(library, str) and re.fullmatch(r"transformers(\.[A-Za-z0-9_]+)*", library) is not None


def _plain(number: float) -> int | float:
    """16 rather than 16.0: PEFT declares lora_alpha as an integer."""
    return int(number) if float(number).is_integer() else number
