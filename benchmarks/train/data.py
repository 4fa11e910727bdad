"""The samples: GSM8K where it lies, else generated arithmetic; as files for lorad and as the same tokens for peers."""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import publish
from benchmarks.base import unpack_base
from benchmarks.train.plan import Plan

FILES: Final = ("train-2000.jsonl", "valid-200.jsonl")
DEFAULT: Final = Path("..") / "shared" / "data" / "gsm8k"
"""Beside the repository; it is not part of it."""

Line = dict[str, str]
Tokens = dict[str, list[int]]
"""`input_ids`, and `labels` of the same length with -100 where a token is not to be predicted."""


@dataclass(frozen=True)
class Problems:
    """Question-and-answer lines, and what to call them in the results."""

    name: str
    train: list[Line]
    valid: list[Line]


def find(directory: Path | None, root: Path) -> Problems:
    """GSM8K from `directory`, or from the default place, or without that generated arithmetic.

    Exits with one clear line if a directory was given that does not hold it.
    """
    place = directory or root / DEFAULT
    missing = [name for name in FILES if not (place / name).is_file()]
    if not missing:
        train, valid = (_read(place / name) for name in FILES)
        return Problems("GSM8K (questions and worked answers)", train, valid)
    wanted = f"{' and '.join(missing)} (JSON Lines with `question` and `answer`)"
    if directory is not None:
        sys.exit(f"DATA={directory} lacks {wanted}")
    print(f"GSM8K is not at {DEFAULT}: it lacks {wanted}. DATA=dir names another place.", file=sys.stderr)
    print("Going on with generated arithmetic, whose figures do not compare with GSM8K's.", file=sys.stderr)
    return Problems("generated arithmetic, NOT GSM8K", _arithmetic(2000, seed=1), _arithmetic(200, seed=2))


def write_samples(path: Path, lines: list[Line]) -> Path:
    """A file of prompt/completion pairs as a user would upload it."""
    pairs = ({"prompt": f"{line['question']}\n\n", "completion": line["answer"]} for line in lines)
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return path


def prepare(request: dict[str, Any]) -> dict[str, Any]:
    """The base model unpacked, files of samples for lorad, and their tokens and order for everyone else.

    Tokens, label marks and order are lorad's own, so that every program sees the same.
    """
    import torch

    from shared.specs import LoraSpec, TrainSpec
    from worker.base_model import load_base_model
    from worker.training.dataset import Tokeniser, epoch_order

    plan, work = Plan(**request["plan"]), Path(request["work"])
    base_path = unpack_base(work)
    base = load_base_model(base_path, name="base", digest="", device="cpu", dtype="bfloat16")
    tokeniser = Tokeniser(base.tokenizer, base.eos_token_ids, TrainSpec(lora=LoraSpec()), longest=base.context_length)

    def tokens_of(path: Path, *, seed: int | None) -> list[Tokens]:
        data = tokeniser.read(path)
        order = range(len(data)) if seed is None else epoch_order(len(data), seed=seed, epoch=0)
        samples = (data[i] for i in order)
        return [{"input_ids": ids.tolist(), "labels": ids.where(is_label, -100).tolist()} for ids, is_label in samples]

    def write(name: str, lines: list[Line], *, seed: int | None) -> None:
        path = write_samples(work / f"{name}.jsonl", lines)
        (work / f"{name}.tokens.json").write_text(json.dumps(tokens_of(path, seed=seed)))

    train, valid = request["train"], request["valid"]
    write("train", train[: plan.num_samples], seed=plan.seed)
    write("valid", valid[: plan.num_valid], seed=None)
    for job in range(plan.jobs):
        start = plan.num_samples + job * plan.job_samples
        shard = [train[i % len(train)] for i in range(start, start + plan.job_samples)]
        write(f"job-{job}", shard, seed=plan.seed + job)
    processor = torch.cuda.get_device_name() if plan.device == "cuda" else publish.processor()
    return {"config": json.loads((base_path / "config.json").read_text()), "processor": processor}


def read_tokens(work: Path, name: str) -> list[Tokens]:
    """Samples in the order in which an epoch sees them."""
    return json.loads((work / f"{name}.tokens.json").read_text())


def count(samples: list[Tokens]) -> tuple[int, int]:
    """(tokens, label tokens) of some samples."""
    return (
        sum(len(sample["input_ids"]) for sample in samples),
        sum(label != -100 for sample in samples for label in sample["labels"]),
    )


def _read(path: Path) -> list[Line]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _arithmetic(count: int, *, seed: int) -> list[Line]:
    """Word problems of 2 to 9 steps, so that lengths vary about as they do in GSM8K."""
    dice = random.Random(seed)
    lines = []
    for _ in range(count):
        who, what = dice.choice(("Ana", "Ben", "Chidi", "Dora")), dice.choice(("apples", "coins", "stamps", "shells"))
        total = dice.randint(5, 99)
        question, answer = [f"{who} has {total} {what}."], []
        for day in range(1, dice.randint(3, 10)):
            change = dice.randint(2, 60)
            question.append(f"On day {day}, {who} gets {change} more {what} from a friend.")
            answer.append(f"After day {day} there are {total} + {change} = {total + change} {what}.")
            total += change
        question.append(f"How many {what} does {who} have in the end?")
        lines.append({"question": " ".join(question), "answer": "\n".join([*answer, f"#### {total}"])})
    return lines
