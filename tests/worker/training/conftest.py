"""Tiny bases around the tiny models, files of samples, and a job whose callables record what they are told."""

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from shared.specs import LoraSpec, Order, StepReport, TrainSpec
from worker.base_model import BaseModel
from worker.training.engine import TrainingEngine
from worker.training.job import TrainingJob, WriteDirectory

PAIRS = [
    {"prompt": f"What is {a} + {b}? ", "completion": f"{a + b} nya~"}
    for a, b in [(1, 2), (2, 2), (3, 1), (4, 5), (1, 7), (6, 2), (0, 3), (2, 5)]
]


def base_around(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> BaseModel:
    """A model as `load_base_model` would give it."""
    return BaseModel(
        model=model.requires_grad_(False).eval(),
        tokenizer=tokenizer,
        name="tiny",
        digest="d" * 64,
        context_length=256,
        architecture=model.config.model_type,
        eos_token_ids=frozenset({tokenizer.eos_token_id}),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Several threads only get in each other's way on models this small; it also fixes the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def llama_base(tiny_llama: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerFast) -> BaseModel:
    return base_around(tiny_llama, tiny_tokenizer)


def weights_digest(model: torch.nn.Module) -> str:
    """One hash over the names and bytes of all weights."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(name.encode() + tensor.numpy().tobytes())
    return total.hexdigest()


def spec_of(**changes: Any) -> TrainSpec:
    """A short training at a rate that moves tiny models: two epochs, three samples at a time, unless changed."""
    lora = changes.pop("lora", {})
    defaults: dict[str, Any] = {"n_epochs": 2, "batch_size": 3, "learning_rate": 1e-2, "seed": 5}
    return TrainSpec(lora=LoraSpec(**{"r": 4, **lora}), **{**defaults, **changes})


class Recorder:
    """Makes a job out of a spec, keeps all it reports, and gives after each step the order that is planned for it."""

    def __init__(self, directory: Path, spec: TrainSpec, *, job_id: str = "ftjob-1") -> None:
        self.job_id = job_id
        self.directory = directory
        self.spec = spec
        self.orders: dict[int, Order] = {}
        self.reports: list[StepReport] = []
        self.events: list[tuple[str, str, str, Mapping[str, Any]]] = []
        self.checkpoints: dict[int, Path] = {}
        self.after_step: Callable[[int], None] = lambda step: None
        self.due_after: set[int] = set()

    def job(
        self,
        train_path: Path,
        *,
        valid_path: Path | None = None,
        resume_from: Sequence[Path] = (),
        init_from: Path | None = None,
    ) -> TrainingJob:
        return TrainingJob(
            job_id=self.job_id,
            spec=self.spec,
            train_path=train_path,
            valid_path=valid_path,
            resume_from=resume_from,
            init_from=init_from,
            checkpoint_due=lambda: bool(self.reports) and self.reports[-1].step in self.due_after,
            save_checkpoint=self._save,
            on_event=lambda *event: self.events.append(event),
            on_step=self._step,
            order=lambda: self.orders.get(self.reports[-1].step if self.reports else 0, Order.GO_ON),
        )

    def metrics(self) -> list[Mapping[str, Any]]:
        return [data for _, type, _, data in self.events if type == "metrics"]

    def _save(self, step: int, metrics: Mapping[str, Any], write: WriteDirectory) -> None:
        assert metrics.get("step", step) == step
        self.checkpoints[step] = self.directory / f"step-{step}"
        self.checkpoints[step].mkdir(parents=True)
        write(self.checkpoints[step])

    def _step(self, report: StepReport) -> None:
        self.reports.append(report)
        self.after_step(report.step)


@pytest.fixture
def recorder(tmp_path: Path) -> Callable[..., Recorder]:
    """recorder(**changes of the spec) -> a new Recorder with its own directory."""
    made: list[Recorder] = []

    def make(**changes: Any) -> Recorder:
        job_id = f"ftjob-{len(made) + 1}"
        made.append(Recorder(tmp_path / job_id, spec_of(**changes), job_id=job_id))
        return made[-1]

    return make


@pytest.fixture
def write_lines(tmp_path: Path) -> Callable[..., Path]:
    """write_lines(objects, name) -> a JSON Lines file of them."""

    def write(objects: list[dict[str, Any]], name: str = "train.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(o) + "\n" for o in objects), encoding="utf-8")
        return path

    return write


@pytest.fixture
def train_file(write_lines: Callable[..., Path]) -> Path:
    return write_lines(PAIRS)


@pytest.fixture
def engine_for() -> Iterator[Callable[..., TrainingEngine]]:
    """engine_for(base, max_tokens=...) -> an engine that is closed when the test ends; it must leave no thread."""
    engines: list[TrainingEngine] = []

    def make(base: BaseModel, *, max_tokens: int = 64) -> TrainingEngine:
        engines.append(TrainingEngine(base, max_tokens=max_tokens))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("train-")]
