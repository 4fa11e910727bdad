"""The training engine on a GPU: side by side, resumed, in too little memory, and after the device broke."""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shared.errors import TrainingFailed
from shared.specs import Order
from tests.gpu.conftest import CUDA, BaseIn
from tests.worker.training.conftest import PAIRS, Recorder
from worker.base_model import load_base_model
from worker.lora import routing
from worker.lora.format import read_adapter
from worker.lora.layer import LoRALinear, LowRank
from worker.lora.routing import Routing
from worker.training.engine import TrainingEngine
from worker.training.job import TrainingResult

Engines = Callable[..., TrainingEngine]
Recorders = Callable[..., Recorder]
Lines = Callable[..., Path]

LONG = [{"prompt": "word " * 40, "completion": "x" * (n % 5 + 30)} for n in range(64)]

BROKEN = """
import sys
from pathlib import Path
import torch
from shared.specs import LoraSpec, Order, TrainSpec
from worker.base_model import load_base_model
from worker.training.engine import TrainingEngine
from worker.training.job import TrainingJob

base = load_base_model(Path(sys.argv[1]), name="tiny", digest="d" * 64, device="cuda", dtype="float32")
base.model.get_input_embeddings().weight.data = base.model.get_input_embeddings().weight.data[:5]
job = TrainingJob(
    job_id="ftjob-1", spec=TrainSpec(lora=LoraSpec(), max_steps=2, batch_size=2), train_path=Path(sys.argv[2]),
    checkpoint_due=lambda: False, save_checkpoint=lambda *_: None, on_event=lambda *_: None,
    on_step=lambda report: None, order=lambda: Order.GO_ON,
)
tell = lambda what, error: print(what, type(error).__name__, flush=True)
engine = TrainingEngine(base, max_tokens=512, on_broken=lambda error: tell("broken:", error))
tell("failed:", engine.submit(job).exception())
"""
"""Trains with token ids that the embedding does not have: the GPU stops at an assertion, for good."""


def tensors_of(result: TrainingResult, into: Path) -> dict[str, Tensor]:
    result.write_adapter(into)
    pairs = read_adapter(into).tensors
    return {f"{path}.{half}": tensor for path, pair in pairs.items() for half, tensor in zip("AB", pair, strict=True)}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Over a float64 base, equal but for the last bits of fp32 gradients, which AdamW carries on."""
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-6)


def test_dtype_auto_is_bfloat16(tiny_base_directory: Path) -> None:
    """Device and dtype "auto" take the GPU, in bfloat16 where it computes in it."""
    base = load_base_model(tiny_base_directory, name="tiny", digest="d" * 64)

    assert (base.device.type, base.dtype) == ("cuda", torch.bfloat16)
    assert next(base.model.parameters()).dtype == torch.bfloat16


def test_gradients_agree_with_numeric_ones() -> None:
    """dx, dA and dB of the hand-written backward pass, with dropout, against finite differences in float64."""
    draws = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64).to(CUDA).requires_grad_()

    x, a_RI, b_OR = random(4, 3, 6), random(2, 6), random(5, 2)
    layer = LoRALinear(nn.Linear(6, 5, device=CUDA, dtype=torch.float64), Routing())
    own_draws = torch.Generator(device=CUDA)
    layer.attach("one", LowRank(a_RI, b_OR, scaling=1.5, dropout=0.3, draws=own_draws))
    layer.routing.route = routing.whole("one")
    low = layer.update("one")

    def forward(x: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        own_draws.manual_seed(1)  # the same inputs are dropped each time
        low._parameters["lora_A"], low._parameters["lora_B"] = a_RI, b_OR  # type: ignore[assignment]  # for autograd
        return layer(x)  # type: ignore[no-any-return]  # a module's own

    assert torch.autograd.gradcheck(forward, (x, a_RI, b_OR))


def test_fused_equals_solo(
    base_in: BaseIn, recorder: Recorders, train_file: Path, engine_for: Engines, tmp_path: Path
) -> None:
    """Jobs of different rank, targets, batch size and dropout, side by side, train what each trains alone."""
    specs = [
        {"n_epochs": 3, "seed": 1},
        {"n_epochs": 2, "seed": 2, "batch_size": 2, "lora": {"r": 7, "target_modules": "all-linear", "dropout": 0.3}},
        {"max_steps": 7, "seed": 3, "batch_size": 8, "lora": {"r": 1, "dropout": 0.1}},
    ]
    base = base_in(torch.float64)
    expected = []
    for i, spec in enumerate(specs):
        engine = engine_for(base, max_tokens=4096)
        expected.append(tensors_of(engine.submit(recorder(**spec).job(train_file)).result(), tmp_path / f"alone-{i}"))
        engine.close()
    engine = engine_for(base, max_tokens=4096)
    futures = [engine.submit(recorder(**spec).job(train_file)) for spec in specs]
    found = [tensors_of(future.result(), tmp_path / f"fused-{i}") for i, future in enumerate(futures)]

    for ours, theirs in zip(found, expected, strict=True):
        assert_same(ours, theirs)


def test_resumed_equals_uninterrupted(
    base_in: BaseIn, recorder: Recorders, train_file: Path, engine_for: Engines, tmp_path: Path
) -> None:
    """Four steps, a checkpoint and five steps on another engine give what nine steps give."""
    schedule = {"warmup_steps": 2, "weight_decay": 0.1, "n_epochs": 3, "lora": {"dropout": 0.25}}
    whole, first, second = (recorder(**schedule) for _ in range(3))
    first.orders = {4: Order.PAUSE}
    base = base_in(torch.float64)
    engine = engine_for(base)
    expected = tensors_of(engine.submit(whole.job(train_file)).result(), tmp_path / "whole")
    engine.submit(first.job(train_file)).result()
    engine.close()
    resumed = engine_for(base).submit(second.job(train_file, resume_from=[first.checkpoints[4]])).result()

    assert_same(tensors_of(resumed, tmp_path / "resumed"), expected)
    assert [report.step for report in second.reports] == [5, 6, 7, 8, 9]


def test_graphs_train_what_kernels_train(
    base_in: BaseIn, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """In bfloat16, a job long enough for CUDA graphs has the losses of one without them, up to rounding."""
    losses = []
    for has_graphs in (True, False):
        engine = engine_for(base_in(torch.bfloat16), max_tokens=4096)
        if not has_graphs:
            engine._stream._graphs = None
        seen = recorder(n_epochs=12, batch_size=8, lora={"target_modules": "all-linear"})
        engine.submit(seen.job(train_file)).result()
        losses.append([report.train_loss for report in seen.reports])
        engine.close()

    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0][-1] < losses[0][0] - 0.1


@pytest.fixture
def limited() -> Iterator[Callable[[int], None]]:
    """limited(bytes) -> no more than that many bytes may be allocated on the GPU from now on, in all."""

    def limit(num_bytes: int) -> None:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(CUDA).total_memory
        torch.cuda.set_per_process_memory_fraction(num_bytes / total)

    yield limit
    torch.cuda.set_per_process_memory_fraction(1.0)


def train_long(base_in: BaseIn, recorder: Recorders, engine_for: Engines, path: Path) -> Recorder:
    """Three steps of 64 long samples, on an engine of their own."""
    seen = recorder(max_steps=3, batch_size=64, lora={"target_modules": "all-linear"})
    engine = engine_for(base_in(torch.float32), max_tokens=1 << 20)
    try:
        engine.submit(seen.job(path)).result()
    finally:
        engine.close()
    return seen


def test_out_of_memory_keeps_the_optimizer_step(
    base_in: BaseIn,
    recorder: Recorders,
    write_lines: Lines,
    engine_for: Engines,
    limited: Callable[[int], None],
) -> None:
    """With too little memory on the GPU the micro-batch is halved; losses and norms are those with enough of it."""
    path = write_lines(LONG)
    train_long(base_in, recorder, engine_for, path)  # whatever libraries keep is there from now on
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    roomy = train_long(base_in, recorder, engine_for, path)
    needed = torch.cuda.max_memory_reserved() - before
    limited(before + needed * 2 // 3)
    tight = train_long(base_in, recorder, engine_for, path)

    told = [message for level, _, message, _ in tight.events if level == "warn"]
    assert told
    assert "Out of memory with" in told[0]
    for ours, theirs in zip(tight.reports, roomy.reports, strict=True):
        assert (ours.step, ours.num_tokens) == (theirs.step, theirs.num_tokens)
        assert (ours.train_loss, ours.grad_norm) == pytest.approx((theirs.train_loss, theirs.grad_norm), rel=1e-3)


def test_a_sample_that_does_not_fit_fails_with_advice(
    base_in: BaseIn,
    recorder: Recorders,
    write_lines: Lines,
    engine_for: Engines,
    limited: Callable[[int], None],
) -> None:
    """Where not even one sample fits, the job fails as out of memory, and the next one with memory trains."""
    path = write_lines(LONG)
    train_long(base_in, recorder, engine_for, path)
    limited(1)
    with pytest.raises(TrainingFailed) as failure:
        train_long(base_in, recorder, engine_for, path)
    torch.cuda.set_per_process_memory_fraction(1.0)
    after = train_long(base_in, recorder, engine_for, path)

    assert failure.value.error_code == "out_of_memory"
    assert all(math.isfinite(report.train_loss) for report in after.reports)


def test_a_broken_device_is_told(tiny_base_directory: Path, write_lines: Lines) -> None:
    """After an error that every later call would meet again the engine says that the process is of no use any more."""
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, str(tiny_base_directory), str(write_lines(PAIRS))],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    assert done.stdout.split()[:4] == ["broken:", "AcceleratorError", "failed:", "AcceleratorError"], done.stderr
