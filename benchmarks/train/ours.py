"""lorad's TrainingEngine, driven as the trainer process drives it: files in, adapter directories out."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.train.data import count, read_tokens
from benchmarks.train.meter import StepClock, peak_bytes
from benchmarks.train.plan import Plan, Row
from shared.specs import LoraSpec, Order, StepReport, TrainSpec
from worker.base_model import load_base_model
from worker.kernels.memory import keep_freed_memory
from worker.training.engine import TrainingEngine
from worker.training.job import TrainingJob, TrainingResult


def train_row(request: dict[str, Any]) -> dict[str, Any]:
    """Train a row of a section, write its adapter; the figures of the steps after warm-up."""
    plan = Plan(**request["plan"])
    clock = StepClock.of(plan)
    engine = _engine(request)

    def on_step(report: StepReport) -> None:
        clock.tick()
        clock.saw(report.num_tokens, report.num_label_tokens)

    spec = _spec(plan, request, steps=plan.num_steps, batch_size=plan.batch_size, r=plan.r, seed=plan.seed)
    result = engine.submit(_job(request, "train", spec, on_step)).result()
    figures = {**clock.result(plan), "peak_bytes": peak_bytes(plan.device), "left_out": []}
    engine.close()
    _write(result, Path(request["adapter"]))
    samples = read_tokens(Path(request["work"]), "train")[plan.warmup_steps * plan.batch_size :]
    assert (figures["num_tokens"], figures["num_labels"]) == count(samples), "peers were given other tokens"
    return figures


def train_jobs(request: dict[str, Any]) -> dict[str, Any]:
    """Train small jobs, all at once or one after the other, on one loaded base model.

    `seconds` holds, job by job, the time from the first submission to its written adapter.
    """
    plan, jobs = Plan(**request["plan"]), range(request["jobs"])
    engine = _engine(request)
    work = []
    for job in jobs:
        steps = plan.job_samples // plan.job_batch_size
        spec = _spec(
            plan,
            request,
            steps=steps,
            batch_size=plan.job_batch_size,
            r=plan.job_rank(job),
            seed=plan.seed + job,
        )
        work.append(_job(request, f"job-{job}", spec, lambda report: None))
    started_s = time.perf_counter()

    def train(job: TrainingJob) -> float:
        _write(engine.submit(job).result(), Path(request["adapter"]) / job.job_id)
        return time.perf_counter() - started_s

    # The trainer process submits and waits on a thread per job that it trains at once.
    with ThreadPoolExecutor(len(work) if request["at_once"] else 1) as slots:
        seconds = list(slots.map(train, work))
    engine.close()
    return {"seconds": seconds, "peak_bytes": peak_bytes(plan.device)}


def _engine(request: dict[str, Any]) -> TrainingEngine:
    keep_freed_memory()  # as the trainer process does
    plan, row = Plan(**request["plan"]), Row(**request["row"])
    path = Path(request["work"]) / "base"
    base = load_base_model(path, name="base", digest="0" * 64, device=plan.device, dtype=row.dtype)
    return TrainingEngine(base, max_tokens=plan.max_tokens)


def _spec(plan: Plan, request: dict[str, Any], *, steps: int, batch_size: int, r: int, seed: int) -> TrainSpec:
    lora = LoraSpec(r=r, alpha=plan.alpha, dropout=0.0, target_modules=request["targets"])
    return TrainSpec(lora=lora, seed=seed, batch_size=batch_size, max_steps=steps, learning_rate=plan.learning_rate)


def _job(request: dict[str, Any], name: str, spec: TrainSpec, on_step: Callable[[StepReport], None]) -> TrainingJob:
    return TrainingJob(
        job_id=name,
        spec=spec,
        train_path=Path(request["work"]) / f"{name}.jsonl",
        checkpoint_due=lambda: False,
        save_checkpoint=lambda step, metrics, write: None,
        on_event=lambda level, type, message, data: None,
        on_step=on_step,
        order=lambda: Order.GO_ON,
    )


def _write(result: TrainingResult, directory: Path) -> None:
    assert result.outcome == "finished", result
    directory.mkdir(parents=True)
    result.write_adapter(directory)
