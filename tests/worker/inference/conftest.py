"""A tiny base model whose tokens can be told apart in text, adapters with an effect, engines that get closed."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import decoders

from shared.specs import AdapterShare, Chunk, ChunkError, GenerationRequest, LoraSpec, Usage
from tests.worker.compiled_kernels import kernels_or_skip
from worker.base_model import BaseModel
from worker.inference.engine import InferenceEngine
from worker.inference.stream import ChunkStream
from worker.lora.manager import AdapterManager

WAIT_S = 60


@pytest.fixture
def base(tiny_base: BaseModel) -> BaseModel:
    """The tiny Llama with a tokenizer that shows every token but the special ones as one character of its own."""
    tiny_base.tokenizer.backend_tokenizer.decoder = decoders.Fuse()
    return tiny_base


@pytest.fixture(params=["compiled", "torch"])
def computed_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A step that compiled kernels compute, and one that torch computes alone."""
    if request.param == "torch":
        monkeypatch.setattr("worker.inference.forward.step_kernels", lambda _: None)
    else:
        kernels_or_skip()
    return str(request.param)


@dataclass
class AdapterShelf:
    """Adapters on disk that change the model's output, and how often the engine asked for each."""

    directory: Path
    model: Any
    located: list[str] = field(default_factory=list)

    def make(self, name: str, *, r: int, size: float = 0.3, target_modules: Any = "all-linear") -> str:
        """Write an adapter of rank r whose A and B are drawn around 0 with deviation `size`."""
        manager = AdapterManager(self.model)
        manager.add(name, LoraSpec(r=r, alpha=float(r), target_modules=target_modules), seed=0)
        draws = torch.Generator().manual_seed(sum(name.encode()))
        with torch.no_grad():
            for parameter in manager.parameters(name).values():
                parameter.copy_(torch.randn(parameter.shape, generator=draws) * size)
        manager.save(name, self.directory / name, base_model_name="tiny")
        manager.remove(name)
        return name

    def locate(self, name: str) -> Path:
        """What an engine is given as `locate`."""
        self.located.append(name)
        return self.directory / name


@pytest.fixture
def shelf(tmp_path: Path, base: BaseModel) -> AdapterShelf:
    return AdapterShelf(tmp_path, base.model)


StartEngine = Callable[..., InferenceEngine]


@pytest.fixture
def start(base: BaseModel, shelf: AdapterShelf) -> Iterator[StartEngine]:
    """Starts engines over `base` and `shelf`; closes them at the end. The reference must be computed before."""
    started: list[InferenceEngine] = []

    def start_engine(on: BaseModel = base, **changed: Any) -> InferenceEngine:
        options = {"locate": shelf.locate, "adapter_cache_bytes": 1 << 30, "max_rows": 8} | changed
        started.append(InferenceEngine(on, **options))
        return started[-1]

    yield start_engine
    for engine in started:
        engine.close()


def ask(prompt: str, adapter: str | None = None, **changed: Any) -> GenerationRequest:
    """A greedy request for 12 tokens, unless `changed`."""
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "deadline_unix_s": time.time() + WAIT_S}
    shares = [AdapterShare(version_id=adapter)] if adapter else []
    return GenerationRequest(
        request_id="req", base_model_id="base", adapters=shares, prompt=prompt, **options | changed
    )


@dataclass(frozen=True)
class Answered:
    chunks: list[Chunk]

    @property
    def text(self) -> str:
        return "".join(chunk.text for chunk in self.chunks)

    @property
    def last(self) -> Chunk:
        return self.chunks[-1]

    @property
    def finish_reason(self) -> str | None:
        return self.last.finish_reason

    @property
    def usage(self) -> Usage | None:
        return self.last.usage

    @property
    def error(self) -> ChunkError | None:
        return self.last.error


def read(stream: ChunkStream) -> Answered:
    """All chunks of an answer."""
    return Answered(list(stream))


def answer(engine: InferenceEngine, request: GenerationRequest) -> Answered:
    return read(engine.submit(request))


def generated_by_transformers(base: BaseModel, prompt: str, num_tokens: int = 12) -> str:
    """The text that Transformers' own greedy `generate` gives to one prompt alone, ended by EOS or `num_tokens`."""
    ids = base.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        output = base.model.generate(
            **ids, do_sample=False, max_new_tokens=num_tokens, eos_token_id=sorted(base.eos_token_ids), pad_token_id=0
        )
    return str(base.tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def reference(base: BaseModel, shelf: AdapterShelf, prompt: str, adapter: str | None, num_tokens: int = 12) -> str:
    """The same with one adapter, active for the whole model; leaves the model bare."""
    if adapter is None:
        return generated_by_transformers(base, prompt, num_tokens)
    manager = AdapterManager(base.model)
    manager.load(adapter, shelf.directory / adapter)
    manager.activate(adapter)
    try:
        return generated_by_transformers(base, prompt, num_tokens)
    finally:
        manager.remove(adapter)


class Gate:
    """Lets the forwards of a model pass only as they are allowed, and remembers what each was about.

    `steps`: (number of rows whose next token was wanted, number of tokens) of each forward. `fails`, given a forward's
    token ids, says which raise.
    """

    def __init__(self, model: Any) -> None:
        self.steps: list[tuple[int, int]] = []
        self.fails: Callable[[list[int]], bool] = lambda ids: False
        self._allowed = threading.Semaphore(0)
        self._open = threading.Event()
        self._arrived = threading.Semaphore(0)
        self._hook = model.register_forward_pre_hook(self._pass, with_kwargs=True)

    def _pass(self, model: Any, args: Any, kwargs: Any) -> None:
        ids = kwargs["input_ids"][0].tolist()
        self.steps.append((len(kwargs["logits_to_keep"]), len(ids)))
        self._arrived.release()
        if not self._open.is_set():
            assert self._allowed.acquire(timeout=WAIT_S)
        if self.fails(ids):
            raise RuntimeError("out of memory")

    def wait_for_forward(self) -> None:
        """Until one more forward has come to the gate."""
        assert self._arrived.acquire(timeout=WAIT_S)

    def let_pass(self) -> None:
        """One forward."""
        self._allowed.release()

    def open(self) -> None:
        """All from now on, and the one that waits."""
        self._open.set()
        self._allowed.release()


CloseGate = Callable[[], Gate]


@pytest.fixture
def close_gate(base: BaseModel, start: StartEngine) -> Iterator[CloseGate]:
    """Puts a closed gate before the model's forwards. It opens before the engines are closed."""
    gates: list[Gate] = []

    def close() -> Gate:
        gates.append(Gate(base.model))
        return gates[-1]

    yield close
    for gate in gates:
        gate.open()
