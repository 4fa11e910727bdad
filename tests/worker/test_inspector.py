"""The inspector against what the engine then does: same tokens, same steps, same parameters; and whom it answers."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from shared import db, ids
from shared.answers import AnswerReader
from shared.config import Settings
from shared.errors import InvalidTrainingFile, NotFound, UnknownTarget
from shared.queue import Queue
from shared.specs import Inspection, InspectionRequest, LoraSpec, Order, TrainSpec
from shared.store import base_models, durable, files
from shared.store.layout import Layout
from tests.servers import Broker
from worker import inspector as inspector_module
from worker.base_model import BaseModel, digest_directory
from worker.inspector import Inspector
from worker.lora.manager import AdapterManager
from worker.training.dataset import Tokeniser
from worker.training.engine import TrainingEngine
from worker.training.job import TrainingJob

PAIRS = [{"prompt": f"{n} and {n}? ", "completion": f"{'nya ' * (n % 4 + 1)}{n}"} for n in range(11)]


@dataclass
class Place:
    """A store with the tiny base and an inspector over it."""

    engine: Engine
    layout: Layout
    settings: Settings
    queue: Queue
    inspector: Inspector
    base_id: str

    def add(self, *objects: dict[str, Any], tenant: str = "acme") -> str:
        content = "".join(json.dumps(o) + "\n" for o in objects).encode()
        with db.write(self.engine) as tx:
            return files.add_bytes(
                tx, self.layout, content, tenant=tenant, purpose="fine-tune", filename="data.jsonl"
            ).id  # fmt: skip

    def request(
        self, file_id: str, *, valid: str | None = None, seconds: float = 30.0, **spec: Any
    ) -> InspectionRequest:
        return InspectionRequest(
            request_id=ids.new_id(ids.REQUEST), tenant="acme", base_model_id=self.base_id, training_file_id=file_id,
            validation_file_id=valid, spec=TrainSpec(**spec), deadline_unix_s=time.time() + seconds,
        )  # fmt: skip

    def answers(self, request: InspectionRequest) -> list[Inspection]:
        """All pieces that an inspector has written so far."""
        pieces = []
        with AnswerReader(self.queue._client, request.request_id, Inspection) as answer:
            while (piece := answer.next(until_unix_s=time.time() + 0.3)) is not None:
                pieces.append(piece)
        return pieces


@pytest.fixture
def place(tmp_path: Path, fresh_sqlite_url: str, broker: Broker, tiny_base_directory: Path) -> Iterator[Place]:
    layout = Layout(tmp_path / "data")
    layout.prepare()
    engine = db.open_engine(fresh_sqlite_url)
    with db.write(engine) as tx, durable.staging(layout) as staged:
        for path in tiny_base_directory.iterdir():
            (staged / path.name).write_bytes(path.read_bytes())
        digest = digest_directory(tiny_base_directory)
        base = base_models.register(tx, layout, staged, name="tiny", digest=digest, config={})
    settings = Settings(
        data_dir=tmp_path / "data", database_url=fresh_sqlite_url, broker_url=broker.url, device="cpu", dtype="float32"
    )
    queue = Queue(broker.url)
    yield Place(engine, layout, settings, queue, Inspector(settings, engine, layout), base.id)
    queue.close()
    engine.dispose()


def trained(base: BaseModel, path: Path, spec: TrainSpec) -> tuple[int, int, int]:
    """(steps, tokens, label tokens) of a real training."""
    labels: list[int] = []
    engine = TrainingEngine(base, max_tokens=64)

    job = TrainingJob(
        job_id="ftjob-1", spec=spec, train_path=path, checkpoint_due=lambda: False,
        save_checkpoint=lambda *_: None, on_event=lambda *_: None,
        on_step=lambda report: labels.append(report.num_label_tokens),
        order=lambda: Order.GO_ON,
    )  # fmt: skip
    try:
        result = engine.submit(job).result(timeout=60)
    finally:
        engine.close()
    return result.steps, result.trained_tokens, sum(labels)


@pytest.mark.parametrize(
    "changes",
    [
        {"n_epochs": 2, "batch_size": 4},
        {"batch_size": 4, "max_steps": 5},
        {"batch_size": 3, "max_steps": 2},
        {"n_epochs": 1, "batch_size": 2, "train_on": "all", "max_seq_len": 16},
        {"n_epochs": 2, "batch_size": 3, "validation_split": 0.3},
    ],
)
def test_what_is_foreseen_is_what_happens(place: Place, tiny_base: BaseModel, changes: dict[str, Any]) -> None:
    """Steps, tokens and label tokens are those that the engine then makes and sees, to the last one."""
    file_id = place.add(*PAIRS)
    request = place.request(file_id, **changes)
    found = place.inspector.foresee(request)

    steps, num_tokens, num_labels = trained(tiny_base, place.layout.files(file_id), request.spec)

    assert (found.total_steps, found.num_tokens, found.num_label_tokens) == (steps, num_tokens, num_labels)


def test_the_report_is_that_of_training(place: Place, tiny_base: BaseModel) -> None:
    """The tokenizer alone reads a file as the loaded base model's does, and its report survives JSON."""
    file_id = place.add(*PAIRS)
    request = place.request(file_id, max_seq_len=24)
    tokeniser = Tokeniser(tiny_base.tokenizer, tiny_base.eos_token_ids, request.spec, longest=tiny_base.context_length)
    expected = tokeniser.read(place.layout.files(file_id)).report

    found = place.inspector.foresee(request)

    assert found.training == json.loads(json.dumps(expected.to_json()))
    assert found.num_tokens_per_epoch == expected.num_tokens
    assert Inspection.model_validate_json(Inspection(found=found).model_dump_json()).found == found


@pytest.mark.parametrize(
    "lora",
    [
        LoraSpec(r=4),
        LoraSpec(r=3, target_modules="all-linear"),
        LoraSpec(r=4, target_modules="mlp", rank_pattern={"down_proj": 7}),
    ],
)
def test_parameters_are_counted_without_weights(place: Place, tiny_base: BaseModel, lora: LoraSpec) -> None:
    """The number of trained parameters is that of the adapter that would be attached."""
    found = place.inspector.foresee(place.request(place.add(*PAIRS), lora=lora))
    manager = AdapterManager(tiny_base.model)
    manager.add("a", lora, seed=0)

    assert found.trainable_parameters == sum(p.numel() for p in manager.parameters("a").values())


def test_memory_grows_with_what_costs_memory(place: Place) -> None:
    """A longer sample, a larger batch and a higher rank each raise the estimate; the weights alone fit into it."""
    file_id = place.add(*PAIRS)

    def estimate(**changes: Any) -> int:
        return place.inspector.foresee(place.request(file_id, **({"batch_size": 2} | changes))).memory_bytes

    plain = estimate()
    assert estimate(batch_size=4) > plain > estimate(max_seq_len=16)
    assert estimate(lora=LoraSpec(r=64)) > plain


def test_a_validation_file_has_its_own_report(place: Place) -> None:
    """Both files are read, and only the training file makes steps."""
    found = place.inspector.foresee(place.request(place.add(*PAIRS), valid=place.add(*PAIRS[:3]), batch_size=1))

    assert found.validation is not None
    assert (found.training["num_used"], found.validation["num_used"], found.steps_per_epoch) == (11, 3, 11)


def test_nothing_to_learn_is_an_error(place: Place) -> None:
    """Samples whose labels all lie beyond the longest sequence are refused, naming the file at fault."""
    useless = place.add({"prompt": "x" * 40, "completion": "y"})

    with pytest.raises(InvalidTrainingFile, match="nothing to learn") as training:
        place.inspector.foresee(place.request(useless, max_seq_len=8))
    with pytest.raises(InvalidTrainingFile, match="validation file") as validation:
        place.inspector.foresee(place.request(place.add({"text": "hi"}), valid=useless, max_seq_len=8))
    assert (training.value.param, validation.value.param) == ("training_file", "validation_file")


def test_a_target_that_is_not_there_is_an_error(place: Place) -> None:
    """The real module tree decides, not only the names that the API knows."""
    with pytest.raises(UnknownTarget):
        place.inspector.foresee(place.request(place.add(*PAIRS), lora=LoraSpec(target_modules=["mlp.q_proj"])))


def test_a_foreign_file_is_not_there(place: Place) -> None:
    """A request may name any file; only its tenant's are read."""
    with pytest.raises(NotFound):
        place.inspector.foresee(place.request(place.add(*PAIRS, tenant="rival")))


def test_the_second_question_reads_nothing(place: Place) -> None:
    """Asked again with other hyperparameters, the file is not read again; with another length it is."""
    file_id = place.add(*PAIRS)
    first = place.inspector.foresee(place.request(file_id, max_seq_len=24))
    place.layout.files(file_id).unlink()

    again = place.inspector.foresee(place.request(file_id, max_seq_len=24, batch_size=2))

    assert again.training == first.training
    with pytest.raises(FileNotFoundError):
        place.inspector.foresee(place.request(file_id, max_seq_len=25))


def test_an_answer_says_first_that_it_is_coming(place: Place) -> None:
    """One empty piece when it begins, then what was found."""
    request = place.request(place.add(*PAIRS))
    place.inspector.answer(request.model_dump(mode="json"))

    begun, found = place.answers(request)
    assert begun == Inspection()
    assert found.found is not None


def test_an_error_is_answered_with_its_code(place: Place) -> None:
    """The API can tell a user's mistake by its code and field."""
    request = place.request(place.add({"prompt": "x" * 40, "completion": "y"}), max_seq_len=8)
    place.inspector.answer(request.model_dump(mode="json"))

    error = place.answers(request)[-1].error
    assert error is not None
    assert (error.code, error.param) == ("invalid_training_file", "training_file")


def test_a_surprise_tells_nothing_of_itself(place: Place) -> None:
    """What should not happen is answered, without paths or stack, and does not end the thread."""
    file_id = place.add(*PAIRS)
    place.layout.files(file_id).unlink()
    request = place.request(file_id)
    place.inspector.answer(request.model_dump(mode="json"))

    error = place.answers(request)[-1].error
    assert error is not None
    assert (error.code, str(place.layout.files(file_id)) in error.message) == ("internal_error", False)


def test_forged_and_late_requests_get_no_answer(place: Place) -> None:
    """Rubbish is thrown away; a request whose asker has gone is not worked on."""
    late = place.request(place.add(*PAIRS), seconds=-1.0)
    for payload in (None, {}, {"request_id": "x"}, late.model_dump(mode="json")):
        place.inspector.answer(payload)

    assert place.answers(late) == []


def endless(place: Place) -> InspectionRequest:
    """A request over a file that takes long to read."""
    return place.request(place.add(*[{"text": "word " * 200}] * 4000))


def begin(place: Place, request: InspectionRequest) -> threading.Thread:
    """Answer in a thread; returns once it has begun."""
    thread = threading.Thread(target=place.inspector.answer, args=(request.model_dump(mode="json"),))
    thread.start()
    with AnswerReader(place.queue._client, request.request_id, Inspection) as answer:
        assert answer.next(until_unix_s=time.time() + 20) == Inspection()
        # Leaving here cancels the request, as an API whose client has gone does.
    return thread


def test_nobody_listening_ends_the_reading(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the asker is gone the reading stops, without an answer."""
    monkeypatch.setattr(inspector_module, "LISTENS_S", 0.0)
    request = endless(place)
    thread = begin(place, request)
    thread.join(20)

    assert not thread.is_alive()
    assert all(piece == Inspection() for piece in place.answers(request))


def test_a_trainer_that_stops_says_so(place: Place) -> None:
    """At shutdown what is asked is answered with 'unavailable', so that it is asked again elsewhere."""
    request = place.request(place.add(*PAIRS))
    place.inspector.stop()
    place.inspector.answer(request.model_dump(mode="json"))

    error = place.answers(request)[-1].error
    assert error is not None
    assert (error.code, "shutting down" in error.message) == ("unavailable", True)


def test_a_second_inspection_waits_its_turn_and_no_longer(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one runs, another is refused after a while rather than holding a thread of the trainer."""
    monkeypatch.setattr(inspector_module, "PATIENCE_S", 0.2)
    entered, leave = threading.Event(), threading.Event()

    def hold(request: InspectionRequest, *, between_samples: Callable[[], None]) -> Any:
        entered.set()
        leave.wait(20)
        raise NotFound

    monkeypatch.setattr(place.inspector, "foresee", hold)
    file_id = place.add(*PAIRS)
    first, second = place.request(file_id), place.request(file_id)
    thread = threading.Thread(target=place.inspector.answer, args=(first.model_dump(mode="json"),))
    thread.start()
    assert entered.wait(20)
    place.inspector.answer(second.model_dump(mode="json"))
    leave.set()
    thread.join(20)

    error = place.answers(second)[-1].error
    assert error is not None
    assert error.code == "queue_full"
