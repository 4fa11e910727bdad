"""What is run: the sizes of one benchmark, its sections and its rows."""

from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from shared.config import Settings

Program = Literal["peft", "trl", "ours"]
Role = Literal["as written", "tuned", "ours"]
Dtype = Literal["float32", "bfloat16"]
Device = Literal["cpu", "cuda"]
Targets = str | list[str]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The sizes of a run. One optimizer step sees `batch_size` samples; steps before `warmup_steps` are not timed."""

    threads: int = 2
    device: Device = "cpu"
    """Where everybody trains and the judge judges."""
    max_tokens: int = Settings.train_tokens
    """LORAD_TRAIN_TOKENS: what lorad puts into one forward pass at most; peers take the whole batch."""
    rounds: int = 5
    """At most; as many as the time allows."""
    warmup_steps: int = 2
    timed_steps: int = 3
    batch_size: int = 8
    learning_rate: float = 1e-3
    r: int = 8
    alpha: int = 16
    seed: int = 7
    num_valid: int = 32
    """Validation samples that the common evaluator scores."""
    tolerance: float = 0.02
    """Nats per label token by which a row's final validation loss may differ from the median of its section."""
    jobs: int = 8
    job_samples: int = 16
    job_batch_size: int = 2
    job_valid: int = 16
    job_tolerance: float = 0.04
    """As `tolerance`, between the adapters that two programs made of one small job."""

    @property
    def num_steps(self) -> int:
        return self.warmup_steps + self.timed_steps

    @property
    def num_samples(self) -> int:
        return self.num_steps * self.batch_size

    @property
    def job_counts(self) -> tuple[int, ...]:
        """How many jobs run at once: 2, 4, 8, ... up to `jobs`."""
        return tuple(n for n in (2, 4, 8, 16, 32) if n <= self.jobs)

    def job_rank(self, job: int) -> int:
        """Ranks differ between jobs, as users' do."""
        return (8, 16, 4, 8)[job % 4]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


QUICK: Final[dict[str, int]] = {
    "rounds": 1, "warmup_steps": 1, "timed_steps": 2, "num_valid": 16, "jobs": 4, "job_samples": 8,
}  # fmt: skip
"""Enough to see that every row works; too little to quote."""

GPU: Final[dict[str, Any]] = {
    "device": "cuda", "threads": 8, "max_tokens": 8192, "warmup_steps": 40, "timed_steps": 60, "job_samples": 32,
}  # fmt: skip
"""A step takes milliseconds there, so that many more are needed to time them."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train. `dtype` is that of the base's weights; A, B and the optimizer's state are fp32 in all rows.

    `micro_batch` is the samples of one forward pass of a peer, None the whole batch. `options` go to the peer's
    configuration class as they are; one that the installed version does not have is left out and reported.
    """

    name: str
    title: str
    program: Program
    role: Role
    dtype: Dtype
    micro_batch: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def takes_whole_batch(self) -> bool:
        return self.role != "ours" and self.micro_batch is None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


_FUSED: Final = {"optim": "adamw_torch_fused"}
_LEAN: Final = {**_FUSED, "gradient_checkpointing": False, "bf16": False}
"""bf16 False: no autocast, since the weights are bf16 already."""

ROWS: Final = (
    Row(name="peft-fp32", title="PEFT + Trainer as written, fp32", program="peft", role="as written", dtype="float32"),
    Row(
        name="peft-autocast",
        title="PEFT + Trainer as written, bf16=True (autocast)",
        program="peft",
        role="as written",
        dtype="float32",
        options={"bf16": True},
    ),
    Row(
        name="peft-bf16",
        title="PEFT + Trainer as written, bf16 weights",
        program="peft",
        role="as written",
        dtype="bfloat16",
    ),
    Row(
        name="peft-grouped",
        title="PEFT + Trainer tuned: bf16 weights, grouped by length",
        program="peft",
        role="tuned",
        dtype="bfloat16",
        options={**_FUSED, "train_sampling_strategy": "group_by_length"},
    ),
    Row(
        name="peft-single",
        title="PEFT + Trainer tuned: bf16 weights, 1 sample x 8",
        program="peft",
        role="tuned",
        dtype="bfloat16",
        micro_batch=1,
        options=_FUSED,
    ),
    Row(
        name="peft-single-fp32",
        title="PEFT + Trainer tuned: fp32, 1 sample x 8",
        program="peft",
        role="tuned",
        dtype="float32",
        micro_batch=1,
        options=_FUSED,
    ),
    Row(name="trl", title="TRL SFTTrainer, its defaults", program="trl", role="as written", dtype="float32"),
    Row(
        name="trl-packed",
        title="TRL tuned: bf16 weights, no checkpointing, packed",
        program="trl",
        role="tuned",
        dtype="bfloat16",
        options={**_LEAN, "packing": True},
    ),
    Row(
        name="trl-single",
        title="TRL tuned: bf16 weights, no checkpointing, 1 sample x 8",
        program="trl",
        role="tuned",
        dtype="bfloat16",
        micro_batch=1,
        options=_LEAN,
    ),
    Row(name="ours-fp32", title="lorad, fp32", program="ours", role="ours", dtype="float32"),
    Row(name="ours-bf16", title="lorad, bf16 weights", program="ours", role="ours", dtype="bfloat16"),
)


@dataclass(frozen=True)
class Section:
    """A choice of target modules, and the rows that are run on it."""

    name: str
    targets: Targets
    rows: tuple[Row, ...]


NOT_ON_GPU: Final = ("peft-fp32", "peft-single", "peft-single-fp32", "trl-single", "ours-fp32")
"""One sample at a time avoids padding, which is dear on a CPU; a GPU would stand idle. For the rest it has bfloat16."""


def sections(*, quick: bool = False, device: Device = "cpu") -> tuple[Section, ...]:
    """q_proj and v_proj with every row; all linear layers with the rows that matter there."""
    some = ("peft-bf16", "peft-single", "trl-single", "ours-fp32", "ours-bf16")
    if device == "cuda":
        some = ("peft-bf16", "peft-grouped", "ours-bf16")
    elif quick:
        some = ("peft-single", "ours-bf16")
    rows = tuple(row for row in ROWS if device == "cpu" or row.name not in NOT_ON_GPU)
    return (
        Section("q_proj, v_proj", ["q_proj", "v_proj"], rows),
        Section("all-linear", "all-linear", tuple(row for row in ROWS if row.name in some)),
    )
