"""PEFT with Transformers' Trainer, and TRL's SFTTrainer: one training each, on tokens that are given."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.processes import Unavailable
from benchmarks.train.data import Tokens, count, read_tokens
from benchmarks.train.meter import StepClock, peak_bytes
from benchmarks.train.plan import Plan, Row


def train_row(request: dict[str, Any]) -> dict[str, Any]:
    """Train a row of a section, save its adapter; the figures of the steps after warm-up."""
    plan, row = Plan(**request["plan"]), Row(**request["row"])
    clock = StepClock.of(plan)
    samples = read_tokens(Path(request["work"]), "train")
    settings = {"batch_size": plan.batch_size, "steps": plan.num_steps, "r": plan.r, "seed": plan.seed}
    left_out, _ = _train(request, plan, row, samples, clock, **settings)
    return {**clock.result(plan), "peak_bytes": peak_bytes(plan.device), "left_out": left_out}


def train_job(request: dict[str, Any]) -> dict[str, Any]:
    """Train one small job as people run it, by itself; how long it took once its base model was loaded."""
    plan, row, job = Plan(**request["plan"]), Row(**request["row"]), request["job"]
    samples = read_tokens(Path(request["work"]), f"job-{job}")
    settings = {
        "batch_size": plan.job_batch_size,
        "steps": len(samples) // plan.job_batch_size,
        "r": plan.job_rank(job),
        "seed": plan.seed + job,
    }
    _, seconds = _train(request, plan, row, samples, StepClock(), **settings)
    return {"seconds": seconds, "peak_bytes": peak_bytes(plan.device)}


def _train(
    request: dict[str, Any],
    plan: Plan,
    row: Row,
    samples: list[Tokens],
    clock: StepClock,
    *,
    batch_size: int,
    steps: int,
    r: int,
    seed: int,
) -> tuple[list[str], float]:
    """(Options that this version does not have, seconds from the loaded base model to the saved adapter)."""
    import torch
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

    class Tick(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.tick()

    base, adapter = Path(request["work"]) / "base", Path(request["adapter"])
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, row.dtype))
    started_s = time.perf_counter()
    # Before A is drawn: TRL wraps the model before the Trainer sets the seed.
    set_seed(seed)
    micro_batch = row.micro_batch or batch_size
    arguments = {
        "output_dir": str(adapter.parent / "trainer"),
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": batch_size // micro_batch,
        "max_steps": steps,
        "learning_rate": plan.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "seed": seed,
        "use_cpu": plan.device == "cpu",
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        # The same order as ours; the samples come in it.
        "train_sampling_strategy": "sequential",
    }
    lora = LoraConfig(
        r=r, lora_alpha=plan.alpha, lora_dropout=0.0, target_modules=request["targets"], task_type="CAUSAL_LM"
    )
    make = _trl if row.program == "trl" else _peft
    trainer, left_out = make(model, tokenizer, lora, samples, arguments, row.options, batch_size)
    trainer.add_callback(Tick())
    trainer.data_collator = _Counting(trainer.data_collator, clock)
    trainer.train()
    trainer.model.save_pretrained(adapter)
    return left_out, time.perf_counter() - started_s


def _peft(
    model: Any, tokenizer: Any, lora: Any, samples: list[Tokens], arguments: dict[str, Any], options: Any, _: int
) -> tuple[Any, list[str]]:
    """Trainer over a PEFT model; batches are padded to their longest sample."""
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    known, left_out = _known(TrainingArguments, {**arguments, **options})
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    trainer = Trainer(
        get_peft_model(model, lora), TrainingArguments(**known), train_dataset=samples, data_collator=collator
    )
    return trainer, left_out


def _trl(
    model: Any,
    tokenizer: Any,
    lora: Any,
    samples: list[Tokens],
    arguments: dict[str, Any],
    options: dict[str, Any],
    batch_size: int,
) -> tuple[Any, list[str]]:
    """SFTTrainer on samples that are tokenised and labelled already, which it takes as they are.

    Packed, one row of as many tokens as a batch has on average is one optimizer step: then it makes as many steps as
    the others, up to rounding, and sees about as many samples in each.
    """
    try:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise Unavailable(f"TRL cannot be imported: {error}") from error
    if options.get("packing"):
        if "packing" not in {f.name for f in dataclasses.fields(SFTConfig)}:
            raise Unavailable("this TRL has no packing")
        num_rows = arguments["max_steps"]
        longest = max(len(sample["input_ids"]) for sample in samples)
        # Best-fit packing leaves a little room in each row.
        room = max(longest, round(1.02 * count(samples)[0] / num_rows))
        options = {**options, "max_length": room}
        arguments = {**arguments, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
    known, left_out = _known(SFTConfig, {**arguments, **options})
    trainer = SFTTrainer(
        model,
        SFTConfig(**known),
        train_dataset=Dataset.from_list(samples),
        processing_class=tokenizer,
        peft_config=lora,
    )
    return trainer, left_out


class _Counting:
    """A collator that reports the real tokens of each micro-batch; what it makes is unchanged."""

    def __init__(self, collate: Callable[[list[Any]], Any], clock: StepClock) -> None:
        self._collate = collate
        self._clock = clock

    def __call__(self, samples: list[Any]) -> Any:
        self._clock.saw(*count(samples))
        return self._collate(samples)


def _known(configuration: type, options: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(The options that the configuration class has, the names of the others)."""
    fields = {field.name for field in dataclasses.fields(configuration)}
    return {k: v for k, v in options.items() if k in fields}, sorted(options.keys() - fields)
