"""The engine as its caller sees it: what it learns, what it reports, and which orders it obeys."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from shared.errors import InvalidTrainingFile, UnknownTarget
from shared.specs import Order
from tests.worker.training.conftest import PAIRS, Recorder, base_around, weights_digest
from worker.base_model import BaseModel
from worker.encoding import encode_prompt
from worker.lora.format import read_adapter
from worker.lora.manager import AdapterManager
from worker.training.engine import TrainingEngine

Engines = Callable[..., TrainingEngine]
Recorders = Callable[..., Recorder]
Lines = Callable[..., Path]


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str, *, max_tokens: int) -> str:
    """The likeliest next token, again and again, up to the end token: plain forwards without any cache."""
    ids = encode_prompt(tokenizer, prompt)
    start = len(ids)
    while len(ids) < start + max_tokens and ids[-1] != tokenizer.eos_token_id:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[start:]))


@pytest.mark.parametrize("architecture", ["tiny_opt", "tiny_gpt2", "tiny_llama"])
def test_overfits_eight_lines(
    architecture: str,
    request: pytest.FixtureRequest,
    tiny_tokenizer: PreTrainedTokenizerFast,
    recorder: Recorders,
    train_file: Path,
    engine_for: Engines,
    tmp_path: Path,
) -> None:
    """Each architecture learns eight lines by heart through the same code, and stops where they stop."""
    model: PreTrainedModel = request.getfixturevalue(architecture)
    with torch.no_grad():
        # The head is tied, frozen and 32 wide: at the fixtures' scale no hidden state makes it surer than about 0.5.
        model.get_input_embeddings().weight.mul_(3)
    seen = recorder(
        max_steps=80, batch_size=8, learning_rate=1e-2, lora={"r": 16, "alpha": 32.0, "target_modules": "all-linear"}
    )
    prompt, ending = PAIRS[3]["prompt"], PAIRS[3]["completion"]
    untrained = greedy(model, tiny_tokenizer, prompt, max_tokens=12)
    result = engine_for(base_around(model, tiny_tokenizer), max_tokens=512).submit(seen.job(train_file)).result()
    result.write_adapter(tmp_path / "adapter")
    manager = AdapterManager(model)
    manager.load("learnt", tmp_path / "adapter")
    manager.activate("learnt")

    assert seen.reports[0].train_loss > 3.0
    assert seen.reports[-1].train_loss < 0.1
    assert greedy(model, tiny_tokenizer, prompt, max_tokens=12) == ending + tiny_tokenizer.eos_token
    assert not untrained.startswith(ending)


def test_leaves_the_base_as_it_was(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """After a job every weight, module object and mode of the base is what it was."""
    digest, modules = weights_digest(llama_base.model), dict(llama_base.model.named_modules())
    result = engine_for(llama_base).submit(recorder().job(train_file)).result()

    assert result.steps == 6
    assert weights_digest(llama_base.model) == digest
    assert dict(llama_base.model.named_modules()) == modules
    assert not any(module.training for module in modules.values())
    assert not any(p.requires_grad or p.grad is not None for p in llama_base.model.parameters())


def test_failure_leaves_the_base_as_it_was(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """A job that ends in an exception of its own callable leaves the base bare, and the engine trains the next job."""
    seen = recorder()
    modules = dict(llama_base.model.named_modules())

    def fail(step: int) -> None:
        raise ConnectionError("the ledger is away")

    seen.after_step = fail
    engine = engine_for(llama_base)
    with pytest.raises(ConnectionError, match="the ledger is away"):
        engine.submit(seen.job(train_file)).result()
    next_result = engine.submit(recorder().job(train_file)).result()

    assert next_result.outcome == "finished"
    assert dict(llama_base.model.named_modules()) == modules


def adapter_bytes(engine: TrainingEngine, seen: Recorder, path: Path, into: Path) -> bytes:
    engine.submit(seen.job(path)).result().write_adapter(into)
    return (into / "adapter_model.safetensors").read_bytes()


def test_same_seed_same_adapter(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, tmp_path: Path
) -> None:
    """A seed decides initialisation, dropout and order: the same adapter again, whatever torch's global state is."""
    engine = engine_for(llama_base)
    dropout = {"dropout": 0.3}
    first = adapter_bytes(engine, recorder(lora=dropout), train_file, tmp_path / "first")
    with torch.random.fork_rng():
        torch.manual_seed(99)
        again = adapter_bytes(engine, recorder(lora=dropout), train_file, tmp_path / "again")

    assert again == first


def test_other_seed_other_adapter(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, tmp_path: Path
) -> None:
    """Another seed gives another adapter."""
    engine = engine_for(llama_base)
    first = adapter_bytes(engine, recorder(seed=1), train_file, tmp_path / "first")
    other = adapter_bytes(engine, recorder(seed=2), train_file, tmp_path / "other")

    assert other != first


def test_dropout_changes_training(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, tmp_path: Path
) -> None:
    """LoRA dropout is live in training, although the base stays in eval mode."""
    engine = engine_for(llama_base)
    without = adapter_bytes(engine, recorder(), train_file, tmp_path / "without")
    with_dropout = adapter_bytes(engine, recorder(lora={"dropout": 0.5}), train_file, tmp_path / "with")

    assert with_dropout != without


def test_trained_adapter_has_an_effect(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, tmp_path: Path
) -> None:
    """Every B moved away from zero."""
    adapter_bytes(engine_for(llama_base), recorder(), train_file, tmp_path / "adapter")
    tensors = read_adapter(tmp_path / "adapter").tensors

    assert all(b_OR.abs().max() > 0 for _, b_OR in tensors.values())


def test_packing_does_not_change_what_a_step_sees(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """One sample at a time and all samples at once report the same losses and norms, up to rounding."""
    alone, packed = recorder(), recorder()
    engine_for(llama_base, max_tokens=1).submit(alone.job(train_file)).result()
    engine_for(llama_base, max_tokens=4096).submit(packed.job(train_file)).result()

    # fp32 sums of some dozen terms in another order, fed back through six AdamW steps.
    for field in ("train_loss", "grad_norm"):
        expected = torch.tensor([getattr(r, field) for r in alone.reports])
        torch.testing.assert_close(
            torch.tensor([getattr(r, field) for r in packed.reports]), expected, rtol=1e-4, atol=1e-5
        )


def test_steps_and_epochs(llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines) -> None:
    """Eight samples three at a time make three steps an epoch, the last with two samples."""
    seen = recorder(n_epochs=2, batch_size=3)
    engine_for(llama_base).submit(seen.job(train_file)).result()

    assert [r.step for r in seen.reports] == [1, 2, 3, 4, 5, 6]
    assert [r.epoch for r in seen.reports] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])
    assert {r.total_steps for r in seen.reports} == {6}
    epoch_tokens = [sum(r.num_tokens for r in seen.reports[at : at + 3]) for at in (0, 3)]
    assert epoch_tokens[0] == epoch_tokens[1] == sum(len(p["prompt"] + p["completion"]) + 1 for p in PAIRS)


def test_max_steps_wins(llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines) -> None:
    """`max_steps` ends the training in the middle of an epoch, or runs on past `n_epochs`."""
    short, long = recorder(max_steps=2), recorder(n_epochs=1, max_steps=7)
    engine = engine_for(llama_base)

    assert engine.submit(short.job(train_file)).result().steps == 2
    assert engine.submit(long.job(train_file)).result().steps == 7


def test_trained_tokens(llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines) -> None:
    """The result counts each token as often as it was seen."""
    seen = recorder()
    result = engine_for(llama_base).submit(seen.job(train_file)).result()

    assert result.trained_tokens == sum(r.num_tokens for r in seen.reports) > 0


def test_metrics_events(llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines) -> None:
    """Each step has one metrics event with the fields that the API promises, and no other."""
    seen = recorder()
    result = engine_for(llama_base).submit(seen.job(train_file)).result()
    promised = {
        "step", "total_steps", "train_loss", "learning_rate", "grad_norm", "epoch", "tokens_per_second", "num_tokens",
        "num_label_tokens", "eta_seconds",
    }  # fmt: skip

    assert [set(data) for data in seen.metrics()] == [promised] * 6
    assert seen.metrics()[-1] == result.metrics


def test_start_event(llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines) -> None:
    """The start is told with the steps to come and how much is trained: r (in + out) numbers per module."""
    seen = recorder(lora={"r": 3, "target_modules": ["q_proj", "v_proj"]})
    base_parameters = sum(p.numel() for p in llama_base.model.parameters())
    engine_for(llama_base).submit(seen.job(train_file)).result()
    _, _, message, data = seen.events[1]

    assert message.startswith("Training starts: 6 steps")
    # Two layers; q_proj is 32 to 32, v_proj 32 to 16 wide.
    assert data["trainable_parameters"] == 2 * 3 * (32 + 32 + 32 + 16)
    assert data["parameters"] == base_parameters + data["trainable_parameters"]


def test_validation(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, write_lines: Lines
) -> None:
    """With a validation file the last step of each epoch, and only that, has a validation loss and accuracy."""
    seen = recorder(n_epochs=30, learning_rate=2e-2, batch_size=4, lora={"target_modules": "all-linear"})
    valid = write_lines(PAIRS[:2], "valid.jsonl")
    engine_for(llama_base).submit(seen.job(train_file, valid_path=valid)).result()
    evaluated = [data for data in seen.metrics() if "valid_loss" in data]

    assert [data["step"] for data in evaluated] == list(range(2, 61, 2))
    assert evaluated[-1]["valid_loss"] < evaluated[0]["valid_loss"]
    assert evaluated[-1]["valid_mean_token_accuracy"] > evaluated[0]["valid_mean_token_accuracy"]


def test_validation_does_not_disturb_training(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, write_lines: Lines
) -> None:
    """Evaluating between epochs changes no later step, dropout included."""
    plain, watched = recorder(lora={"dropout": 0.3}), recorder(lora={"dropout": 0.3})
    engine = engine_for(llama_base)
    engine.submit(plain.job(train_file)).result()
    engine.submit(watched.job(train_file, valid_path=write_lines(PAIRS[:2], "valid.jsonl"))).result()

    assert [r.train_loss for r in watched.reports] == [r.train_loss for r in plain.reports]


def test_validation_loss_is_the_training_loss_of_the_same_samples(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """Measured without dropout on the training data, it lies where the next step's training loss starts."""
    seen = recorder(batch_size=8, n_epochs=2)
    engine_for(llama_base).submit(seen.job(train_file, valid_path=train_file)).result()

    assert seen.metrics()[0]["valid_loss"] == pytest.approx(seen.reports[1].train_loss, rel=1e-5)


@pytest.mark.parametrize("order", [Order.CANCEL, Order.LOST])
def test_cancelled_and_lost_jobs_save_nothing(
    order: Order, llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """The job ends after the step that was answered so, although a checkpoint was due with it."""
    seen = recorder(checkpoint_every=2)
    seen.orders = {2: order}
    result = engine_for(llama_base).submit(seen.job(train_file)).result()

    assert (result.outcome, result.order, result.steps) == ("stopped", order, 2)
    assert seen.checkpoints == {}


def test_paused_job_saves_a_checkpoint(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """The job ends after the step that was answered so, with a checkpoint of just that step."""
    seen = recorder()
    seen.orders = {2: Order.PAUSE}
    result = engine_for(llama_base).submit(seen.job(train_file)).result()

    assert (result.outcome, result.order, result.steps) == ("stopped", Order.PAUSE, 2)
    assert [*seen.checkpoints] == [2]


def test_pause_at_the_last_step_finishes(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """There is nothing left to pause."""
    seen = recorder()
    seen.orders = {6: Order.PAUSE}

    assert engine_for(llama_base).submit(seen.job(train_file)).result().outcome == "finished"


def test_checkpoints_when_due(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """A checkpoint is saved every `checkpoint_every` steps and whenever the caller says so."""
    seen = recorder(checkpoint_every=2)
    seen.due_after = {3}
    engine_for(llama_base).submit(seen.job(train_file)).result()

    assert [*seen.checkpoints] == [2, 3, 4]


def test_shutdown(llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines) -> None:
    """Stopping checkpoints the job under way after its step, and ends the waiting and later jobs without a step."""
    running, waiting = recorder(), recorder()
    engine = engine_for(llama_base)
    futures = []

    def stop(step: int) -> None:
        if step == 3:
            futures.append(engine.submit(waiting.job(train_file)))
            engine.stop_all()
            futures.append(engine.submit(waiting.job(train_file)))

    running.after_step = stop
    result = engine.submit(running.job(train_file)).result()
    never_run = [future.result() for future in futures]

    assert (result.outcome, result.order, result.steps) == ("stopped", None, 3)
    assert [*running.checkpoints] == [3]
    assert [(r.outcome, r.order, r.steps) for r in never_run] == [("stopped", None, 0)] * 2
    assert waiting.reports == []


def test_unknown_target_fails(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines
) -> None:
    """A target that the base does not have is the request's fault."""
    seen = recorder(lora={"target_modules": ["nowhere"]})

    with pytest.raises(UnknownTarget, match="nowhere"):
        engine_for(llama_base).submit(seen.job(train_file)).result()


def test_bad_line_is_named(llama_base: BaseModel, recorder: Recorders, engine_for: Engines, write_lines: Lines) -> None:
    """A line that is no sample fails the job with its number."""
    path = write_lines([*PAIRS, {"prompt": "p"}])

    with pytest.raises(InvalidTrainingFile, match="line 9: completion: must be given"):
        engine_for(llama_base).submit(recorder().job(path)).result()


def test_bad_validation_file_is_named(
    llama_base: BaseModel, recorder: Recorders, train_file: Path, engine_for: Engines, write_lines: Lines
) -> None:
    """A bad validation file is told apart from a bad training file."""
    seen = recorder()
    valid = write_lines([{"prompt": "p"}], "valid.jsonl")

    with pytest.raises(InvalidTrainingFile, match="validation file: line 1") as failure:
        engine_for(llama_base).submit(seen.job(train_file, valid_path=valid)).result()
    assert failure.value.param == "validation_file"


def test_truncated_and_dropped_samples_are_reported(
    llama_base: BaseModel, recorder: Recorders, engine_for: Engines, write_lines: Lines
) -> None:
    """A warning says how many samples were cut and how many taught nothing."""
    path = write_lines([*PAIRS, {"prompt": "x" * 100, "completion": "y"}])
    seen = recorder(max_seq_len=40)
    engine_for(llama_base).submit(seen.job(path)).result()
    level, _, message, data = seen.events[0]

    assert level == "warn"
    assert "1 without any label were dropped" in message
    assert (data["num_samples"], data["num_used"], data["num_dropped"], data["num_truncated"]) == (9, 8, 1, 1)
