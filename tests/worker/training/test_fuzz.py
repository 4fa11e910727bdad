"""A hundred damaged data files and a hundred odd specs: each trains, or is refused with the line or field named."""

import copy
import gzip
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from shared.data_format import check_file
from shared.errors import InvalidTrainingFile, TrainingFailed, UnknownTarget
from shared.specs import LoraSpec, TrainSpec
from tests.worker.training.conftest import Recorder
from worker.base_model import BaseModel
from worker.training.engine import TrainingEngine, TrainingResult

NUM_FILES = NUM_SPECS = 100
FORMATS: dict[str, Callable[[str, str], dict[str, Any]]] = {
    "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a, "system": "Be brief."},
    "prompt_completion": lambda q, a: {"prompt": q, "completion": a},
    "text": lambda q, a: {"text": q + a},
}
ODD_VALUES: list[Any] = [
    None, True, 0, -1, 1.5, 10**400, [], {}, "", " ", "\0", "\ud800", "é" * 50, "<|im_end|>", [[]], {"a": {}}, ["x"],
    "<s><|im_start|>assistant\nx<|im_end|>", "x" * 3000, "\ufeff", "\u2028", "﷽", "user", "assistant", "gpt",
]  # fmt: skip
ODD_LINES = [
    b"[" * 5000, b'{"text":' * 3000 + b"1" + b"}" * 3000, b'{"text": ' + b"9" * 5000 + b"}", b'{"text": 1e999}',
    b'{"text": -Infinity}', b"null", b"{}", b"{", b"[]", b'"x"', b"\0", b"  \t ", b"\r\r", b"\x1f\x8b", b"\xff\xfe",
    b"\xef\xbb\xbf", b"\xed\xa0\x80", b'{"question": "q", "answer": "a"}', b'{"text": "a", "text": "b"}',
    b"x" * (1 << 20), b'{"text": "' + b"a" * (1 << 20) + b'"}',
]  # fmt: skip
ODD_KEYS = ["id", "role", "content", "weight", "from", "value", "text", "prompt", "", "\0", "\ud800", "x" * 500]


def lines(name: str) -> list[bytes]:
    """Five good lines of a format."""
    return [json.dumps(FORMATS[name](f"What is {i} + {i}? ", f"{i + i} nya~")).encode() for i in range(5)]


# -- damage to a file's bytes


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *_places(value[key])]]


def _odd_value(draw: random.Random, good: list[bytes]) -> bytes:
    at = draw.randrange(len(good))
    value = json.loads(good[at])
    container, key = draw.choice(_places(value))
    container[key] = draw.choice(ODD_VALUES)
    good[at] = json.dumps(value).encode()
    return b"\n".join(good)


def _odd_key(draw: random.Random, good: list[bytes]) -> bytes:
    at = draw.randrange(len(good))
    value = json.loads(good[at])
    objects = [value, *(c[k] for c, k in _places(value) if isinstance(c[k], dict))]
    chosen = draw.choice(objects)
    if draw.random() < 0.5:
        del chosen[draw.choice(list(chosen))]
    chosen[draw.choice(ODD_KEYS)] = draw.choice(ODD_VALUES)
    good[at] = json.dumps(value, ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass")
    return b"\n".join(good)


def _odd_line(draw: random.Random, good: list[bytes]) -> bytes:
    another = draw.choice(lines(draw.choice(list(FORMATS))))
    good.insert(draw.randrange(len(good) + 1), draw.choice([*ODD_LINES, another]))
    return draw.choice([b"\n", b"\r\n"]).join(good)


def _flipped(draw: random.Random, good: list[bytes]) -> bytes:
    content = bytearray(b"\n".join(good))
    for _ in range(draw.randint(1, 6)):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def _cut(draw: random.Random, good: list[bytes]) -> bytes:
    content = b"\n".join(good)
    begin = draw.randrange(len(content))
    return content[begin:] if draw.random() < 0.3 else content[:begin]


def _spliced(draw: random.Random, good: list[bytes]) -> bytes:
    content = b"\n".join(good)
    begin, end = sorted(draw.randrange(len(content)) for _ in range(2))
    return (
        content[:begin] + draw.choice([b"", b"\n", b"\0" * 9, draw.randbytes(20), content[begin:end]]) + content[end:]
    )


def _zipped(draw: random.Random, good: list[bytes]) -> bytes:
    content = gzip.compress(b"\n".join(good) * draw.choice([1, 1, 200]), mtime=0)
    damage = draw.choice(["none", "cut", "flip", "twice", "tail", "nested"])
    if damage == "cut":
        return content[: draw.randrange(2, len(content))]
    if damage == "flip":
        at = draw.randrange(2, len(content))
        return content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :]
    more = {"none": b"", "twice": gzip.compress(b"\n" + good[0]), "tail": draw.randbytes(9), "nested": b""}[damage]
    return gzip.compress(content) if damage == "nested" else content + more


def _intact(draw: random.Random, good: list[bytes]) -> bytes:
    return draw.choice([b"", b"\xef\xbb\xbf", b"\n\n"]) + draw.choice([b"\n", b"\r\n", b"\n\n \n"]).join(good)


DAMAGES = [_odd_value, _odd_value, _odd_key, _odd_line, _odd_line, _flipped, _cut, _spliced, _zipped, _intact]


def file_content(seed: int) -> bytes:
    """The same bytes for a seed, always; one in ten is intact."""
    draw = random.Random(seed)
    return DAMAGES[seed % len(DAMAGES)](draw, lines(draw.choice(list(FORMATS))))


# -- odd specs


SPEC_VALUES: dict[str, list[Any]] = {
    "seed": [0, 2**31 - 1, 2**31, -1, "5"],
    "n_epochs": [1, 50, 0, 51, 1.0, None],
    "batch_size": [1, 7, 256, 0, 257, True],
    "learning_rate": [1e-12, 1e-3, 1.0, 0.0, 1.1, float("nan"), float("inf"), "auto"],
    "lr_schedule": ["linear", "cosine", "constant", "Linear", "", 1],
    "lora_plus_ratio": [1.0, 16.0, 64.0, 0.5, 65.0],
    "warmup_steps": [0, 1, 2, 100_000, -1, 100_001],
    "weight_decay": [0.0, 0.1, 1.0, -0.1, 1.1],
    "max_grad_norm": [1e-9, 1.0, 1000.0, 0.0, 1001.0],
    "max_seq_len": [8, 30, 8192, 7, 8193],
    "train_on": ["completion", "all", "none"],
    "checkpoint_every": [1, 100_000, None, 0],
    "max_seconds": [1, None, 0, 10**9],
    "validation_split": [1e-9, 0.25, 0.5, None, 0.0, 0.51, -1.0],
    "eval_every": [1, 2, None, 0],
    "early_stopping_patience": [1, None, 0],
    "publish": ["last", "best", "worst"],
    "unknown": [1],
}
LORA_VALUES: dict[str, list[Any]] = {
    "r": [1, 3, 64, 256, 0, 257, 8.0],
    "alpha": [1e-6, 1.0, 1024.0, 0.0, 1025.0],
    "dropout": [0.0, 0.5, 0.9, 1.0, -0.1],
    "target_modules": [
        "attention", "mlp", "all-linear", ["q_proj"], ["layers.0.mlp.up_proj", "v_proj"], ["no_such_module"], [], "all",
        ["q_proj", "q_proj"], ["q-proj"], [".*"], ["embed_tokens"],
    ],
    "use_rslora": [True, False, 1],
    "rank_pattern": [{"q_proj": 2}, {"layers.1.self_attn.v_proj": 9}, {"q_proj": 0}, {"a b": 1}, {"no_such_module": 2}],
    "alpha_pattern": [{"v_proj": 2.0}, {"q_proj": 0.0}, {"up_proj": 1.0}],
}  # fmt: skip


def odd_spec(seed: int) -> dict[str, Any]:
    """A few odd values in a good spec of two steps, the same for a seed; one in three lies within all limits."""
    draw = random.Random(seed)
    lora = {key: draw.choice(LORA_VALUES[key]) for key in draw.sample(list(LORA_VALUES), draw.randint(0, 2))}
    spec = {key: draw.choice(SPEC_VALUES[key]) for key in draw.sample(list(SPEC_VALUES), draw.randint(0, 3))}
    return {**spec, "max_steps": 2, "lora": lora}


def fields_of(error: ValidationError) -> set[str]:
    """The fields that a validation error names, those of the adapter as `lora.<field>`."""
    places = [found["loc"] for found in error.errors()]
    return {".".join(map(str, place[: 1 + (place[0] == "lora")])) for place in places}


def odd_fields(value: dict[str, Any]) -> set[str]:
    return {key for key in value if key != "lora"} | {f"lora.{key}" for key in value["lora"]}


# -- the tests


def ending(engine: TrainingEngine, spec: TrainSpec, path: Path, directory: Path) -> TrainingResult | BaseException:
    """How training a file ends, in bounded time."""
    recorder = Recorder(directory, spec, job_id=f"ftjob-{directory.name}")
    future: Future[TrainingResult] = engine.submit(recorder.job(path))
    return future.exception(timeout=30) or future.result()


LINE_OR_FILE = re.compile(r"(line [1-9][0-9]*|file): \S|there is nothing to learn: none of \d+ samples")


def test_damaged_files(llama_base: BaseModel, engine_for: Callable[..., TrainingEngine], tmp_path: Path) -> None:
    """Each file trains two steps or is refused with its line, the first that the check at the upload finds too."""
    engine = engine_for(llama_base, max_tokens=600)
    spec = TrainSpec(lora=LoraSpec(r=2), max_steps=2, batch_size=2)
    endings: Counter[str] = Counter()
    first, *rest = lines("text")
    contents = [file_content(seed) for seed in range(NUM_FILES)]
    contents += [b"\n".join([first, odd, *rest]) for odd in ODD_LINES]  # each of them at least once
    for seed, content in enumerate(contents):
        path = tmp_path / f"{seed}.jsonl"
        path.write_bytes(content)
        report = check_file(path)
        told = json.loads(json.dumps(report.to_json()))
        end = ending(engine, spec, path, tmp_path / f"file-{seed}")

        assert told == report.to_json(), seed
        if isinstance(end, TrainingResult):
            assert report.is_valid, (seed, report.problems)
            assert (end.outcome, end.steps) == ("finished", 2), seed
        else:
            assert isinstance(end, InvalidTrainingFile), (seed, end)
            assert LINE_OR_FILE.match(end.message), (seed, end)
            assert report.is_valid or end.message == str(report.problems[0]), (seed, end)
        endings[type(end).__name__] += 1

    assert endings["TrainingResult"] > NUM_FILES // 5
    assert endings["InvalidTrainingFile"] > NUM_FILES // 5


def test_odd_specs(
    llama_base: BaseModel, engine_for: Callable[..., TrainingEngine], train_file: Path, tmp_path: Path
) -> None:
    """Each spec trains, or is refused with the name of what is odd in it."""
    engine = engine_for(llama_base)
    endings: Counter[str] = Counter()
    for seed in range(NUM_SPECS):
        value = odd_spec(seed)
        end: TrainingResult | BaseException
        try:
            spec = TrainSpec.model_validate(copy.deepcopy(value))
            end = ending(engine, spec, train_file, tmp_path / f"spec-{seed}")
        except ValidationError as error:
            end = error

        match end:
            case TrainingResult():
                assert end.outcome == "finished", (seed, value)
                assert end.steps == 2 or spec.max_seconds == 1, (seed, value)
                directory = tmp_path / f"adapter-{seed}"
                directory.mkdir()
                end.write_adapter(directory)
            case ValidationError():
                assert fields_of(end) <= odd_fields(value), (seed, value, end)
            case UnknownTarget():
                assert re.search("no_such_module|embed_tokens|(rank|alpha)_pattern: '", end.message), (seed, value, end)
            case InvalidTrainingFile():
                assert re.search("first 8 tokens", end.message), (seed, value, end)
            case TrainingFailed():
                assert end.error_code == "diverged", (seed, value, end)
                assert spec.learning_rate * spec.lora.alpha > 0.1, (seed, value, end)
            case _:
                pytest.fail(f"{seed}: {value} ended in {end!r}")
        endings[type(end).__name__] += 1

    assert endings["TrainingResult"] > NUM_SPECS // 5
    assert endings["ValidationError"] > NUM_SPECS // 5


def test_all_odd_fields_are_named_together() -> None:
    """A spec that is wrong in many places is told of all of them at once."""
    value = {"seed": -1, "n_epochs": 0, "learning_rate": float("nan"), "lora": {"r": 0, "alpha": 0.0}, "unknown": 1}

    with pytest.raises(ValidationError) as failure:
        TrainSpec.model_validate(value)
    assert fields_of(failure.value) == odd_fields(value)
