"""Which weights a generation asks for: the bare base model, one adapter, or a mix of several."""

from dataclasses import dataclass

from api.problems import Problems
from api.schemas.completions import MixPart, Sampling
from shared.db import Tx
from shared.errors import LoradError
from shared.specs import AdapterShare
from shared.store.models import ResolvedModel, resolve_model
from shared.tables import BaseModelRow


@dataclass(frozen=True)
class Speaker:
    """Who answers. `model_id` is what the answer calls itself: 'tiny', 'math@3' or 'tiny+math@3*0.7+poetry@1*0.3'."""

    model_id: str
    base: BaseModelRow
    shares: list[AdapterShare]


def speaker(tx: Tx, tenant: str, asked: Sampling) -> Speaker:
    """Who is asked for by `model` and `lora_mix`; raises ModelNotFound, AdapterCorrupt, InvalidRequest."""
    model = resolve_model(tx, tenant, asked.model)
    if asked.lora_mix is None:
        shares = [AdapterShare(version_id=model.version.id)] if model.version else []
        return Speaker(model.model_id, model.base, shares)
    parts = [_resolved(tx, tenant, part, f"lora_mix.{place}.model") for place, part in enumerate(asked.lora_mix)]
    _check(model, parts)
    weights = [part.weight for part in asked.lora_mix]
    terms = [f"{part.model_id}*{_short(weight)}" for part, weight in zip(parts, weights, strict=True)]
    return Speaker(
        "+".join([model.base.name, *terms]),
        model.base,
        [
            AdapterShare(version_id=part.version.id, weight=weight)
            for part, weight in zip(parts, weights, strict=True)
            if part.version
        ],
    )


def _resolved(tx: Tx, tenant: str, part: MixPart, param: str) -> ResolvedModel:
    try:
        return resolve_model(tx, tenant, part.model)
    except LoradError as error:
        error.param = param
        raise


def _check(model: ResolvedModel, parts: list[ResolvedModel]) -> None:
    """All parts are different adapter versions of one base model, and `model` is that base or the first part."""
    problems = Problems()
    seen: dict[str, int] = {}
    for place, part in enumerate(parts):
        param = f"lora_mix.{place}.model"
        first = seen.setdefault(part.model_id, place)
        if part.version is None:
            problems.add(param, f"'{param}' names the base model {part.model_id!r}: a mix is of adapters.")
        elif part.base.id != model.base.id:
            problems.add(
                param,
                f"'{param}': {part.model_id} belongs to the base model {part.base.name!r}, not {model.base.name!r}.",
            )
        elif first != place:
            problems.add(param, f"'{param}': {part.model_id} is in the mix already, as 'lora_mix.{first}'.")
    if model.version is not None and model.model_id != parts[0].model_id:
        problems.add(
            "model",
            f"'model' of a mix is the base model {model.base.name!r} or the first of the mix, {parts[0].model_id}"
            f" (given: {model.model_id}).",
        )
    problems.raise_if_any()


def _short(weight: float) -> str:
    return repr(weight).removesuffix(".0")
