"""What is run: the sizes of one benchmark, which adapters its scenarios use, and its rows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

Program = Literal["ours", "peft", "merged", "vllm", "vllm-open"]
Dtype = Literal["auto", "float32", "bfloat16"]
Load = Literal["cold", "zipf", "open"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sizes of a run. Each prompt of `num_prompts` gets exactly `new_tokens` tokens, greedily."""

    threads: int = 2
    device: Literal["cpu", "cuda"] = "cpu"
    rounds: int = 5
    """At most; as many as the time allows."""
    num_prompts: int = 16
    new_tokens: int = 64
    repeats: int = 3
    """Timed runs of a scenario in one process, of which the median counts; fewer once they took `enough_s` together."""
    enough_s: float = 6.0
    store_size: int = 1000
    """Adapters of the default kind in the store."""
    zipf_exponent: float = 1.0
    zipf_requests: int = 96
    cold_requests: int = 24
    rates: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0, 8.0])
    """Requests per second that arrive as a Poisson process, whatever is still unanswered."""
    open_s: float = 10.0
    """Seconds of arrivals at each rate."""
    seed: int = 7
    update_shares: dict[str, float] = field(default_factory=lambda: {"qv": 0.12, "mixed": 0.12, "linear": 0.06})
    """The norm of an adapter's update of a module, as a share of the norm of the module's weight, by family.

    Half of it leaves most answers as they are; twice of it makes many of them nonsense.
    """
    min_agreement: float = 0.93
    """The least share of a row's tokens that the merged fp32 model would choose after the same ones before."""
    max_gap: float = 1e-3
    """In fp32, nats by which a chosen token may be less likely than the reference's choice: what rounding can do."""
    max_crossed: float = 0.9
    """`min_agreement`'s opposite: the largest share of tokens that the model of another adapter may agree with."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


QUICK: Final[dict[str, Any]] = {
    "rounds": 1, "new_tokens": 16, "repeats": 1, "store_size": 40, "zipf_requests": 32, "cold_requests": 6,
    "rates": [1.0, 4.0], "open_s": 3.0,
}  # fmt: skip
"""Enough to see that every row works; too little to quote."""


@dataclass(frozen=True)
class Family:
    """Adapters of one kind: their target modules, and their ranks, which go round."""

    targets: tuple[str, ...] | Literal["all-linear"]
    ranks: tuple[int, ...]

    def rank(self, number: int) -> int:
        return self.ranks[number % len(self.ranks)]


FAMILIES: Final = {
    "qv": Family(("q_proj", "v_proj"), (8,)),
    "mixed": Family(("q_proj", "v_proj"), (4, 8, 16, 32, 64)),
    "linear": Family("all-linear", (8,)),
}
"""The first is the default: as many of them as the store is to hold; of the others as many as scenarios use."""


@dataclass(frozen=True)
class Scenario:
    """All prompts at once, each with one of `count` adapters of a family in turn; 0 is the base alone."""

    name: str
    title: str
    family: str = "qv"
    count: int = 0

    def adapter(self, prompt: int, *, shift: int = 0) -> str | None:
        """The name of prompt number `prompt`'s adapter; with `shift`, that of another one."""
        return f"{self.family}-{(prompt + shift) % self.count}" if self.count else None

    @property
    def max_rank(self) -> int:
        return max(FAMILIES[self.family].ranks)


SCENARIOS: Final = {
    scenario.name: scenario
    for scenario in (
        Scenario("base", "no adapter"),
        Scenario("one", "1 adapter", count=1),
        Scenario("eight", "8 adapters", count=8),
        Scenario("sixteen", "16 adapters, ranks 4 to 64", "mixed", 16),
        Scenario("linear", "8 adapters, all-linear", "linear", 8),
    )
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One program with one configuration: a process that answers its scenarios in turn, then meets its loads."""

    name: str
    title: str
    program: Program
    dtype: Dtype
    scenarios: tuple[str, ...] = ()
    loads: tuple[Load, ...] = ()

    @property
    def needs_vllm(self) -> bool:
        return self.program in ("vllm", "vllm-open")

    @property
    def must_be_exact(self) -> bool:
        """The row that shows that the mathematics is right; other rows may differ from it by rounding."""
        return self.program == "ours" and self.dtype == "float32"

    @property
    def timed(self) -> tuple[str, ...]:
        """The scenarios that are timed: of the exact row, which is there to be exact, two say how fast it is."""
        return tuple(name for name in self.scenarios if not self.must_be_exact or name in ("base", "eight"))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Row":
        return cls(**{**fields, "scenarios": tuple(fields["scenarios"]), "loads": tuple(fields["loads"])})


ROWS: Final = (
    Row(
        name="ours",
        title="lorad",
        program="ours",
        dtype="auto",
        scenarios=("base", "one", "eight", "sixteen"),
        loads=("cold", "zipf", "open"),
    ),
    # Apart, so that modules with adapters in one scenario are not those of another.
    Row(name="ours-linear", title="lorad", program="ours", dtype="auto", scenarios=("linear",)),
    Row(
        name="ours-fp32",
        title="lorad, fp32",
        program="ours",
        dtype="float32",
        scenarios=("base", "one", "eight", "sixteen"),
    ),
    Row(name="ours-fp32-linear", title="lorad, fp32", program="ours", dtype="float32", scenarios=("linear",)),
    # vLLM compiles its model only where it is to take no adapters.
    Row(name="vllm-base", title="vLLM without LoRA", program="vllm", dtype="bfloat16", scenarios=("base",)),
    Row(
        name="vllm",
        title="vLLM with LoRA",
        program="vllm",
        dtype="bfloat16",
        scenarios=("base", "one", "eight"),
    ),
    Row(name="vllm-sixteen", title="vLLM with LoRA", program="vllm", dtype="bfloat16", scenarios=("sixteen",)),
    Row(name="vllm-linear", title="vLLM with LoRA", program="vllm", dtype="bfloat16", scenarios=("linear",)),
    Row(name="vllm-open", title="vLLM with LoRA", program="vllm-open", dtype="bfloat16", loads=("open",)),
    Row(
        name="peft-bf16",
        title="PEFT mixed batch, bf16",
        program="peft",
        dtype="bfloat16",
        scenarios=("one", "eight", "sixteen"),
    ),
    Row(
        name="peft-bf16-linear",
        title="PEFT mixed batch, bf16",
        program="peft",
        dtype="bfloat16",
        scenarios=("linear",),
    ),
    Row(name="peft-fp32", title="PEFT mixed batch, fp32", program="peft", dtype="float32", scenarios=("eight",)),
    Row(
        name="merged-bf16", title="Transformers, merged, bf16", program="merged", dtype="bfloat16", scenarios=("one",)
    ),
    Row(name="merged-fp32", title="Transformers, merged, fp32", program="merged", dtype="float32", scenarios=("one",)),
)  # fmt: skip


def adapter_names(store_size: int) -> list[str]:
    """Every adapter of the store: `store_size` of the default kind, and what the scenarios use of the others."""
    counts = dict.fromkeys(FAMILIES, 0)
    for scenario in SCENARIOS.values():
        counts[scenario.family] = max(counts[scenario.family], scenario.count)
    counts[next(iter(FAMILIES))] = store_size
    return [f"{family}-{number}" for family, count in counts.items() for number in range(count)]


def pairs(scenario: Scenario, prompts: Sequence[list[int]]) -> list[tuple[list[int], str | None]]:
    """(Token ids, adapter or None) of each request of a scenario."""
    return [(ids, scenario.adapter(number)) for number, ids in enumerate(prompts)]
