"""What goes wrong within one job: losses that are not finite, memory that runs out, a forward that never ends."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shared.errors import TrainingFailed
from tests.worker.training.conftest import Recorder
from worker.base_model import BaseModel
from worker.training.engine import TrainingEngine
from worker.training.pulse import Pulse

Engines = Callable[..., TrainingEngine]
Recorders = Callable[..., Recorder]


def spoil_forwards(base: BaseModel, which: Callable[[int], bool]) -> None:
    """Make forward number n (from 1) give NaN if `which(n)`."""
    count = 0

    def hook(_: nn.Module, arguments: object, output: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return output * float("nan") if which(count) else output

    base.model.get_input_embeddings().register_forward_hook(hook)  # type: ignore[operator]  # a module's own


def limit_tokens(base: BaseModel, most: int) -> None:
    """Let a forward over more than `most` tokens run out of memory."""

    def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if arguments[0].numel() > most:
            raise torch.OutOfMemoryError(f"{arguments[0].numel()} tokens are too many")

    base.model.get_input_embeddings().register_forward_pre_hook(hook)  # type: ignore[operator]  # a module's own


def warnings_of(seen: Recorder) -> list[str]:
    return [message for level, _, message, _ in seen.events if level == "warn"]


def test_a_step_that_is_not_finite_is_skipped(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """Two bad steps in a row move nothing and are told as warnings; the job goes on at its rate and finishes."""
    seen = recorder(max_steps=6, batch_size=4, lr_schedule="constant")
    spoil_forwards(llama_base, lambda n: n in (2, 3))
    result = engine_for(llama_base, max_tokens=4096).submit(seen.job(train_file)).result()

    assert (result.outcome, result.steps) == ("finished", 6)
    assert [r.step for r in seen.reports] == [1, 4, 5, 6]
    assert {r.learning_rate for r in seen.reports} == {1e-2}
    assert [message.partition(" was skipped")[0] for message in warnings_of(seen)] == ["Step 2", "Step 3"]


def test_three_in_a_row_roll_back_to_half_the_rate(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """The adapter goes back to the last checkpoint, the rate is halved from then on, and the job finishes."""
    seen = recorder(max_steps=8, batch_size=4, lr_schedule="constant", checkpoint_every=2)
    spoil_forwards(llama_base, lambda n: n in (4, 5, 6))
    result = engine_for(llama_base, max_tokens=4096).submit(seen.job(train_file)).result()

    assert result.outcome == "finished"
    assert [(r.step, r.learning_rate) for r in seen.reports] == [
        (1, 1e-2), (2, 1e-2), (3, 1e-2), (7, 5e-3), (8, 5e-3)
    ]  # fmt: skip
    # The checkpoint of step 4 was saved among the bad steps, so what it holds may be what diverged.
    assert "put back to step 2 and goes on at half the learning rate" in warnings_of(seen)[-1]


def test_rollback_restores_the_checkpoint(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """After the rollback the loss is that of the adapter at the start, not of the one that diverged."""
    seen = recorder(max_steps=12, batch_size=8, learning_rate=0.05, lr_schedule="constant")
    spoil_forwards(llama_base, lambda n: n in (9, 10, 11))
    engine_for(llama_base, max_tokens=4096).submit(seen.job(train_file)).result()
    before, after = seen.reports[7], seen.reports[8]

    assert (before.step, after.step) == (8, 12)
    assert after.train_loss == pytest.approx(seen.reports[0].train_loss, rel=1e-5)
    assert before.train_loss < 0.95 * after.train_loss


def test_diverged_after_the_rollback_fails(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """Losses that stay NaN fail the job, naming step and learning rate, and nothing was reported as a step."""
    seen = recorder(learning_rate=0.25, lr_schedule="constant")
    spoil_forwards(llama_base, lambda n: True)
    future = engine_for(llama_base, max_tokens=4096).submit(seen.job(train_file))

    with pytest.raises(TrainingFailed, match=r"diverged at step 6: loss nan.* learning rate 0\.125, again") as failure:
        future.result()
    assert failure.value.error_code == "diverged"
    assert seen.reports == []


def test_out_of_memory_keeps_the_optimizer_step(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """The micro-batch is halved until it fits; losses, norms and counts are those of a job with all the memory."""
    roomy, tight = recorder(batch_size=8, lora={"dropout": 0.2}), recorder(batch_size=8, lora={"dropout": 0.2})
    engine = engine_for(llama_base, max_tokens=4096)
    engine.submit(roomy.job(train_file)).result()
    limit_tokens(llama_base, 60)
    result = engine.submit(tight.job(train_file)).result()

    assert result.outcome == "finished"
    assert "Out of memory with" in warnings_of(tight)[0]
    # fp32 sums in another order, fed back through two AdamW steps.
    for ours, theirs in zip(tight.reports, roomy.reports, strict=True):
        assert (ours.step, ours.num_tokens, ours.num_label_tokens) == (
            theirs.step, theirs.num_tokens, theirs.num_label_tokens
        )  # fmt: skip
        assert (ours.train_loss, ours.grad_norm) == pytest.approx((theirs.train_loss, theirs.grad_norm), rel=1e-3)


def test_out_of_memory_in_an_evaluation(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """Evaluation makes smaller parts too and gives the same loss."""
    roomy, tight = recorder(max_steps=1, batch_size=1), recorder(max_steps=1, batch_size=1)
    engine = engine_for(llama_base, max_tokens=4096)
    engine.submit(roomy.job(train_file, valid_path=train_file)).result()
    limit_tokens(llama_base, 60)
    engine.submit(tight.job(train_file, valid_path=train_file)).result()

    assert tight.metrics()[-1]["valid_loss"] == pytest.approx(roomy.metrics()[-1]["valid_loss"], rel=1e-5)
    assert warnings_of(tight)


def test_a_sample_that_does_not_fit_fails_with_advice(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """When one sample is too much the error says how large it is and what would help."""
    limit_tokens(llama_base, 5)
    future = engine_for(llama_base).submit(recorder().job(train_file))

    with pytest.raises(TrainingFailed, match=r"one sample of \d+ tokens does not fit.*smaller max_seq_len") as failure:
        future.result()
    assert failure.value.error_code == "out_of_memory"


def test_a_cpu_allocation_that_fails_is_out_of_memory(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """torch says it with a RuntimeError on the CPU; a real one is taken for what it is."""

    def ask_for_too_much(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if arguments[0].numel() > 60:
            torch.empty(1 << 60, dtype=torch.uint8)

    llama_base.model.get_input_embeddings().register_forward_pre_hook(ask_for_too_much)  # type: ignore[operator]  # own
    seen = recorder(batch_size=8)

    assert engine_for(llama_base, max_tokens=4096).submit(seen.job(train_file)).result().outcome == "finished"
    assert "Out of memory" in warnings_of(seen)[0]


def test_any_other_error_is_not_taken_for_memory(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """A bug in the forward ends the job with that bug."""

    def fail(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        raise RuntimeError("a bug")

    llama_base.model.get_input_embeddings().register_forward_pre_hook(fail)  # type: ignore[operator]  # a module's own

    with pytest.raises(RuntimeError, match="a bug"):
        engine_for(llama_base).submit(recorder().job(train_file)).result()


HANGING = """
import os, sys, time
from pathlib import Path
from shared.specs import Order, TrainSpec
from worker.base_model import load_base_model
from worker import watchdog
from worker.training.engine import TrainingEngine
from worker.training.job import TrainingJob

base, train, hang_at = sys.argv[1:]
loaded = load_base_model(Path(base), name="tiny", digest="d" * 64, device="cpu", dtype="float32")
forwards = 0

def hang(module, arguments):
    global forwards
    forwards += 1
    if forwards == int(hang_at):
        time.sleep(60)

loaded.model.get_input_embeddings().register_forward_pre_hook(hang)
engine = TrainingEngine(loaded, max_tokens=64)
watchdog.watch(lambda: engine.pulse.overdue_s(floor_s=1.0), floor_s=1.0, on_hung=lambda seconds: os._exit(70))
job = TrainingJob(
    job_id="ftjob-1", spec=TrainSpec(max_steps=5, batch_size=2), train_path=Path(train),
    checkpoint_due=lambda: False, save_checkpoint=lambda *_: None, on_event=lambda *_: None,
    on_step=lambda report: None, order=lambda: Order.GO_ON,
)
print(engine.submit(job).result().steps)
engine.close()
"""


@pytest.mark.parametrize(("hang_at", "ending"), [(3, (70, "")), (99, (0, "5\n"))])
def test_a_hung_process_ends_itself(
    hang_at: int, ending: tuple[int, str], tiny_base_directory: Path, train_file: Path
) -> None:
    """A forward that never returns ends the process soon; one that gets on does not."""
    began_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", HANGING, str(tiny_base_directory), str(train_file), str(hang_at)],
        capture_output=True, text=True, cwd=Path(__file__).parents[3], env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    assert (done.returncode, done.stdout) == ending
    assert time.monotonic() - began_s < 55


def test_a_slow_turn_is_not_hung() -> None:
    """A turn may take as long as the floor, and as long as twenty of the usual; beyond both it is overdue."""
    now_s = 0.0
    pulse = Pulse(lambda: now_s)
    for _ in range(3):
        with pulse.turn():
            now_s += 2
    with pulse.turn():
        now_s += 39
        within_median = pulse.overdue_s(floor_s=1)
        now_s += 2
        overdue_s, within_floor = pulse.overdue_s(floor_s=1), pulse.overdue_s(floor_s=60)

    assert (within_median, overdue_s, within_floor) == (None, 41, None)
    assert pulse.overdue_s(floor_s=1) is None
