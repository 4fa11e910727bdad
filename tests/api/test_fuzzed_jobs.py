"""A hundred seeded random job bodies against the served API: an answer for each, and never a wrong one."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import func, select

from shared import limits
from shared.db import read
from shared.specs import TrainSpec
from shared.tables import Job
from tests.api.conftest import SAMPLES, Api

JOBS = "/v1/fine_tuning/jobs"
NUM_BODIES = 100
Draw = random.Random
Value = Callable[[Draw], Any]

# No field of a job may be any of these.
ODD = [True, -1, 1.5, 1e300, 10**17, "", "auto ", "\0", "ünï", [], [[]], {}, {"": 1}, {"a\0b": {}}, ["q_proj", 1]]


def one_of(*values: Any) -> Value:
    return lambda draw: draw.choice(values)


def whole(least: int, most: int) -> Value:
    """A number that may be asked for, an end of the range, or one just beyond."""
    return lambda draw: draw.choice(
        [draw.randint(least, most), draw.randint(least, most), least, most, least - 1, most + 1]
    )


def real(most: float) -> Value:
    """The same for (0, most]; also so small that a product with it is 0."""
    return lambda draw: draw.choice([draw.random() * most, draw.random() * most, most, most * 1.01, 0, -0.5, 5e-324])


STEPS = whole(1, limits.MAX_STEPS)
PATTERN_KEYS = one_of("q_proj", "v_proj", "fc1", "0.self_attn.q_proj", "xq_proj", "a..b", "")
HYPERPARAMETERS: dict[str, Value] = {
    "n_epochs": lambda draw: draw.choice(["auto", whole(1, limits.MAX_EPOCHS)(draw)]),
    "batch_size": lambda draw: draw.choice(["auto", whole(1, limits.MAX_BATCH_SIZE)(draw)]),
    "learning_rate_multiplier": lambda draw: draw.choice(["auto", real(5000)(draw)]),
}
LORA: dict[str, Value] = {
    "r": whole(1, limits.MAX_RANK),
    "alpha": real(limits.MAX_ALPHA),
    "dropout": real(limits.MAX_DROPOUT),
    "target_modules": one_of("attention", "mlp", "all-linear", ["q_proj"], ["fc1", "fc2"], ["c_attn"], "embedding"),
    "use_rslora": one_of(True, False),
    "rank_pattern": lambda draw: {PATTERN_KEYS(draw): whole(1, limits.MAX_RANK)(draw)},
    "alpha_pattern": lambda draw: {PATTERN_KEYS(draw): real(limits.MAX_ALPHA)(draw)},
}
TRAINING: dict[str, Value] = {
    "learning_rate": lambda draw: draw.choice(["auto", real(limits.MAX_LEARNING_RATE)(draw)]),
    "lr_schedule": one_of("linear", "cosine", "constant", "step"),
    "lora_plus_ratio": whole(1, int(limits.MAX_LORA_PLUS_RATIO)),
    "warmup_steps": one_of(0, 1, 5, 99, 100, 101, limits.MAX_STEPS),
    "weight_decay": real(1.0),
    "max_grad_norm": real(1000.0),
    "max_steps": STEPS,
    "max_seconds": whole(1, limits.MAX_SECONDS),
    "max_seq_len": whole(8, 128),
    "train_on": one_of("completion", "all"),
    "checkpoint_every": STEPS,
    "validation_split": real(0.5),
    "eval_every": STEPS,
    "early_stopping_patience": STEPS,
    "publish": one_of("auto", "last", "best"),
    "init_from": one_of("math@1", "math@latest", "math", "math@9", "absent@1", "math@" + "9" * 30, "../x"),
}


def some_of(fields: dict[str, Value], draw: Draw, *, share: float) -> dict[str, Any]:
    return {name: value(draw) for name, value in fields.items() if draw.random() < share}


def body(draw: Draw, files: list[str]) -> dict[str, Any]:
    """Few fields or many; in half of the bodies one value, somewhere, is of no sense at all."""
    share = draw.choice([0.0, 0.1, 0.2, 0.4])
    parts: dict[str, Value] = {
        "validation_file": one_of(*files, "file-" + "0" * 32),
        "suffix": one_of("a", "x.y", "Math", "..", "tiny", "a" * 65),
        "seed": whole(0, limits.MAX_SEED),
        "metadata": one_of({}, {"k": "v"}, {"k": 1}),
        "priority": whole(-limits.MAX_PRIORITY, limits.MAX_PRIORITY),
        "integrations": one_of([], [{}]),
        "hyperparameters": lambda d: some_of(HYPERPARAMETERS, d, share=share),
        "method": lambda d: {
            "type": "supervised", "supervised": {"hyperparameters": some_of(HYPERPARAMETERS, d, share=share)}
        },
        "lora": lambda d: some_of(LORA, d, share=share),
        "training": lambda d: some_of(TRAINING, d, share=share),
        "nonsense": one_of(1),
    }  # fmt: skip
    whole_body = {"model": "tiny", "training_file": files[0]}
    for name, value in parts.items():
        if draw.random() < {"lora": 0.8, "training": 0.9, "nonsense": 0.02}.get(name, share):
            whole_body[name] = value(draw)
    if draw.random() < 0.5:
        holder = draw.choice([part for part in (whole_body, *whole_body.values()) if isinstance(part, dict) and part])
        holder[draw.choice(sorted(holder))] = draw.choice(ODD)
    return whole_body


@pytest.mark.timeout(120)
def test_every_body_gets_a_job_or_the_name_of_a_field(api: Api) -> None:
    """200 with a spec that a trainer can read, or 400, 404 or 413 whose `param` is a field of the request; no 500.

    What is refused leaves no job. Both happen often enough that neither claim is empty.
    """
    api.publish("math")
    files = [api.upload()["id"], api.upload(SAMPLES[:200])["id"], api.upload(b'{"text": "one"}\n')["id"]]
    made: list[str] = []
    refused: list[str] = []
    for seed in range(NUM_BODIES):
        asked = body(random.Random(seed), files)
        answer = api.http.post(JOBS, json=asked)
        told = f"seed {seed}: {asked} -> {answer.status_code} {answer.text}"
        if answer.status_code == 200:
            made.append(answer.json()["id"])
            spec = TrainSpec.model_validate(api.row(made[-1]).spec)
            assert spec.lora.model_dump() == answer.json()["lora"], told
            continue
        assert answer.status_code in (400, 404, 413), told
        param = answer.json()["error"]["param"]
        assert param, told
        assert is_inside(asked, param), told
        refused.append(param)

    assert len(made) > NUM_BODIES // 10
    assert len(refused) > NUM_BODIES // 3
    assert len(set(refused)) > 20
    with read(api.engine) as tx:
        assert tx.scalar(select(func.count()).select_from(Job)) == len(made) + 1


def is_inside(value: Any, path: str) -> bool:
    """True if the dotted path leads somewhere in the value; keys may hold dots themselves."""
    if isinstance(value, list):
        value = {str(i): item for i, item in enumerate(value)}
    if not isinstance(value, dict):
        return False
    return any(
        path == key or (path.startswith(f"{key}.") and is_inside(value[key], path[len(key) + 1 :])) for key in value
    )
