"""One adapter as values: its shape module by module, and its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from shared.specs import LoraSpec
from worker.lora.targets import matches


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """The update of a module is s B A, with s = alpha / r, or alpha / sqrt(r) with `use_rslora`.

    The patterns give single modules another r or alpha: keys are module names, matched as targets are (exactly or as
    dotted suffix), and the first that matches counts, as in PEFT. `fan_in_fan_out` says that a wrapped layer stores
    its weight as (I, O); A and B are (R, I) and (O, R) all the same.
    """

    r: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...] | Literal["all-linear"]
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False

    @classmethod
    def of(cls, spec: LoraSpec, target_modules: tuple[str, ...], *, fan_in_fan_out: bool) -> "AdapterSpec":
        """`spec` with its targets resolved to names that select just the modules of one base model."""
        return cls(r=spec.r, alpha=spec.alpha, dropout=spec.dropout, use_rslora=spec.use_rslora,
                   target_modules=target_modules, rank_pattern=dict(spec.rank_pattern),
                   alpha_pattern=dict(spec.alpha_pattern), fan_in_fan_out=fan_in_fan_out)  # fmt: skip

    def rank(self, path: str) -> int:
        return next((r for name, r in self.rank_pattern.items() if matches(path, name)), self.r)

    def scaling(self, path: str) -> float:
        alpha = next((a for name, a in self.alpha_pattern.items() if matches(path, name)), self.alpha)
        rank = self.rank(path)
        return alpha / (rank**0.5 if self.use_rslora else rank)


@dataclass(frozen=True, kw_only=True)
class LoadedAdapter:
    """An adapter in memory, attached to nothing. `tensors`: module path -> (A (R, I), B (O, R)), fp32 on the CPU."""

    spec: AdapterSpec
    tensors: Mapping[str, tuple[Tensor, Tensor]]
    base_model_name: str | None = None
    """What the files say it was trained on; nobody checks it."""
