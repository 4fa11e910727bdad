"""What a job may ask of its training: automatic values, rules between fields, and starting from another adapter."""

from typing import Any

import pytest

from api.job_spec import plan
from api.learning_rate import auto_learning_rate
from api.lora_shape import Start
from api.schemas.job_views import ResolvedTraining
from api.schemas.jobs import JobRequest, Training
from shared.db import write
from shared.errors import InvalidRequest, UnknownTarget
from shared.specs import LoraSpec, Spec, StepReport, TrainSpec
from shared.store import adapters, durable
from shared.tables import BaseModelRow
from tests.api.conftest import CONFIG, WEIGHTS, Api

JOBS = "/v1/fine_tuning/jobs"
VALID = {"validation_file": "file-2"}


def planned(num_samples: int = 20, *, start: Start | None = None, **fields: Any) -> TrainSpec:
    request = JobRequest.model_validate({"model": "tiny", "training_file": "file-1"} | fields)
    return plan(request, BaseModelRow(name="tiny", config=CONFIG), num_samples, start=start).spec


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as raised:
        planned(**fields)
    return raised.value


# -- the learning rate


@pytest.mark.parametrize(("num_parameters", "hidden_size"), [(1.24e9, 2048), (3.2e9, 3072), (8e9, 4096), (70e9, 8192)])
def test_the_automatic_rate_follows_the_published_fit(num_parameters: float, hidden_size: int) -> None:
    """Llama's sizes get what 5e-5 * 10 * (2000 / H)^0.781 gives them, within a tenth."""
    fit = 5e-5 * 10 * (2000 / hidden_size) ** 0.781

    assert auto_learning_rate(int(num_parameters), 1000) == pytest.approx(fit, rel=0.1)


def test_the_automatic_rate_is_higher_in_short_runs_and_small_models() -> None:
    """Half as much again under 100 steps; more for fewer parameters, down to a hundred million and no further."""
    assert auto_learning_rate(10**9, 99) == pytest.approx(1.5 * auto_learning_rate(10**9, 100))
    assert auto_learning_rate(10**8, 100) > auto_learning_rate(10**9, 100) > auto_learning_rate(10**10, 100)
    assert auto_learning_rate(1, 100) == auto_learning_rate(10**8, 100)


@pytest.mark.parametrize("fields", [{}, {"training": {"learning_rate": "auto"}},
                                    {"hyperparameters": {"learning_rate_multiplier": "auto"}}])  # fmt: skip
def test_every_way_to_leave_the_rate_to_us_is_the_same(fields: dict[str, Any]) -> None:
    """Nothing said, `auto` here and `auto` there."""
    assert planned(**fields).learning_rate == auto_learning_rate(CONFIG["num_parameters"], 100)


@pytest.mark.parametrize(("rate", "multiplier"), [("auto", 3), (6e-4, "auto")])
def test_a_multiplier_is_of_two_ten_thousandths(api: Api, rate: object, multiplier: object) -> None:
    """3 means 6e-4, and 6e-4 reads as 3, whatever the model: the number is the same in question and answer."""
    job = api.job(training={"learning_rate": rate}, hyperparameters={"learning_rate_multiplier": multiplier})

    assert job["training"]["learning_rate"] == pytest.approx(6e-4)
    assert job["hyperparameters"]["learning_rate_multiplier"] == 3


@pytest.mark.parametrize("multiplier", [5001, 1e300, 1e-323])
def test_a_multiplier_that_leaves_no_rate_is_refused(multiplier: float) -> None:
    """Beyond a rate of 1, and so small that nothing is left of it."""
    error = refused(hyperparameters={"learning_rate_multiplier": multiplier})

    assert error.param == "hyperparameters.learning_rate_multiplier"
    assert f"at most 5000 (given: {multiplier:g})" in error.message


# -- every knob


def test_every_knob_reaches_the_spec_and_the_answer(api: Api) -> None:
    """What is asked for comes back, is stored, and is what a trainer reads."""
    training = {
        "learning_rate": 0.01, "lr_schedule": "cosine", "lora_plus_ratio": 16.0, "warmup_steps": 3, "weight_decay": 0.1,
        "max_grad_norm": 0.5, "max_steps": 9, "max_seconds": 60, "max_seq_len": 64, "train_on": "all",
        "checkpoint_every": 2, "validation_split": 0.25, "eval_every": 4, "early_stopping_patience": 2,
        "publish": "last",
    }  # fmt: skip
    lora = {"r": 4, "alpha": 8.0, "dropout": 0.1, "target_modules": "all-linear", "use_rslora": True,
            "rank_pattern": {"fc1": 2}, "alpha_pattern": {"0.self_attn.q_proj": 1.0}}  # fmt: skip
    job = api.job(training=training, lora=lora)

    assert job["training"] == training | {"init_from": None}
    assert job["lora"] == lora
    stored = TrainSpec.model_validate(api.row(job["id"]).spec)
    assert stored.model_dump(include=set(training)) == training
    assert stored.lora == LoraSpec.model_validate(lora)


def test_question_answer_and_spec_have_the_same_knobs() -> None:
    """A field that is added to one and forgotten in another would be dropped in silence."""
    own = set(TrainSpec.model_fields) - {"lora", "seed", "n_epochs", "batch_size"}

    assert set(Training.model_fields) == set(ResolvedTraining.model_fields) == own


@pytest.mark.parametrize(
    ("fields", "publish"),
    [
        ({}, "last"),
        (VALID, "last"),
        ({"training": {"max_seconds": 9}}, "last"),
        (VALID | {"training": {"max_seconds": 9}}, "best"),
        (VALID | {"training": {"early_stopping_patience": 2}}, "best"),
        ({"training": {"validation_split": 0.2, "early_stopping_patience": 2}}, "best"),
        (VALID | {"training": {"early_stopping_patience": 2, "publish": "last"}}, "last"),
        (VALID | {"training": {"publish": "best"}}, "best"),
    ],
)
def test_what_is_published_by_itself(fields: dict[str, Any], publish: str) -> None:
    """The best where the run may end before its last step and there is a loss to judge by; a choice is kept."""
    assert planned(**fields).publish == publish


def test_held_out_samples_make_no_steps(api: Api) -> None:
    """A quarter of 20 samples leaves 15 to train on, in batches of 5: 3 steps an epoch."""
    hyperparameters = {"batch_size": 5, "n_epochs": 2}

    assert api.job(training={"validation_split": 0.25}, hyperparameters=hyperparameters)["total_steps"] == 6
    assert api.job(hyperparameters=hyperparameters)["total_steps"] == 8


# -- rules between fields


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        (VALID | {"training": {"validation_split": 0.1}}, "training.validation_split", "not both"),
        ({"training": {"eval_every": 5}}, "training.eval_every", "needs validation data"),
        ({"training": {"early_stopping_patience": 5}}, "training.early_stopping_patience", "needs validation data"),
        ({"training": {"publish": "best"}}, "training.publish", "needs validation data"),
        ({"num_samples": 1, "training": {"validation_split": 0.5}}, "training.validation_split", "at least 2 samples"),
        ({"training": {"max_steps": 5, "warmup_steps": 6}}, "training.warmup_steps", "at most 5, the steps of this"),
        ({"training": {"warmup_steps": 101}}, "training.warmup_steps", "at most 100, the steps of this job"),
        ({"training": {"max_seq_len": 129}}, "training.max_seq_len", "at most 128, the context of 'tiny'"),
        ({"lora": {"rank_pattern": {"fc1": 4}}}, "lora.rank_pattern", "'fc1' can match no adapted module"),
        ({"lora": {"alpha_pattern": {"xq_proj": 4}}}, "lora.alpha_pattern", "adapted are q_proj, v_proj"),
        ({"lora": {"target_modules": ["a.q_proj"], "rank_pattern": {"b.q_proj": 4}}}, "lora.rank_pattern", "'b.q_p"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(fields: dict[str, Any], param: str, says: str) -> None:
    """The field at fault is named, with what it may be."""
    error = refused(**fields)

    assert error.param == param
    assert f"'{param}'" in error.message
    assert says in error.message


@pytest.mark.parametrize(
    "fields",
    [
        {"training": {"max_steps": 5, "warmup_steps": 5}},
        {"training": {"max_seq_len": 128}},
        {"num_samples": 2, "training": {"validation_split": 0.1, "eval_every": 5, "publish": "best"}},
        VALID | {"training": {"eval_every": 5, "early_stopping_patience": 1}},
        {"lora": {"rank_pattern": {"q_proj": 4, "0.self_attn.v_proj": 2}}},
        {"lora": {"target_modules": "mlp", "alpha_pattern": {"fc1": 4}}},
        {
            "lora": {
                "target_modules": ["self_attn.q_proj"],
                "rank_pattern": {"q_proj": 4, "layers.0.self_attn.q_proj": 2},
            }
        },
    ],
)
def test_fields_at_the_edge_go_together(fields: dict[str, Any]) -> None:
    """What is just allowed is allowed."""
    assert planned(**fields)


def test_all_rules_that_are_broken_are_told_at_once(api: Api) -> None:
    """One answer names five fields; `param` is the first."""
    answer = api.submit(
        training={"eval_every": 5, "publish": "best", "warmup_steps": 101, "max_seq_len": 129},
        lora={"rank_pattern": {"fc1": 4}},
    )
    error = answer.json()["error"]

    assert (answer.status_code, error["param"]) == (400, "training.max_seq_len")
    for field in ("training.eval_every", "training.publish", "training.warmup_steps", "lora.rank_pattern"):
        assert f"'{field}'" in error["message"]


def test_a_strange_pattern_is_an_unknown_target() -> None:
    """The code tells programs what kind of mistake it is."""
    with pytest.raises(UnknownTarget):
        planned(lora={"rank_pattern": {"fc1": 4}})


# -- starting from another adapter


LORA = LoraSpec(r=4, alpha=8.0, target_modules="mlp", rank_pattern={"fc1": 2}, dropout=0.1)
LEARNT = TrainSpec(lora=LORA)


def published(api: Api, name: str = "math", *, spec: Spec = LEARNT, digest: str | None = None) -> str:
    """The id of a new version."""
    with durable.staging(api.layout) as staged:
        (staged / "adapter_model.safetensors").write_bytes(WEIGHTS)
        (staged / "adapter_config.json").write_text("{}")
        prepared = adapters.prepare(
            api.layout, staged, validate=lambda _: None, base_model_id=api.base.id,
            base_digest=digest or api.base.digest, spec=spec, job_id=None, name=name, training_sha256=None,
        )  # fmt: skip
    with write(api.engine) as tx:
        return adapters.insert_version(tx, "default", name, prepared, None).id


@pytest.mark.parametrize("reference", ["math@1", "math@prod"])
def test_a_job_starts_from_the_very_version(api: Api, reference: str) -> None:
    """The id is kept, so that an alias which moves later changes nothing; the shape is the version's."""
    version_id = published(api)
    api.alias("math", prod=1)
    job = api.job(training={"init_from": reference})
    published(api, spec=TrainSpec())
    api.alias("math", prod=2)

    again = api.http.get(f"{JOBS}/{job['id']}").json()
    assert again["training"]["init_from"] == version_id
    assert again["lora"] == LORA.model_dump()
    assert TrainSpec.model_validate(api.row(job["id"]).spec).init_from == version_id


@pytest.mark.parametrize(
    "lora", [{"r": 4}, {"target_modules": ["fc2", "fc1"]}, {"rank_pattern": {"fc1": 2}}, {"use_rslora": False}]
)
def test_the_same_shape_may_be_said_again(api: Api, lora: dict[str, Any]) -> None:
    """Targets count by what they mean: the preset or its names in any order."""
    published(api)

    assert api.job(training={"init_from": "math@1"}, lora=lora)["lora"] == LORA.model_dump()


def test_the_dropout_is_the_new_jobs_own(api: Api) -> None:
    """Dropout says how to train, not what the adapter is; all else is kept."""
    published(api)
    job = api.job(training={"init_from": "math@1"}, lora={"dropout": 0.5})

    assert job["lora"] == LORA.model_dump() | {"dropout": 0.5}


def test_another_shape_is_refused_with_both(api: Api) -> None:
    """Each field that differs is told, with what was asked for and what is there."""
    published(api)
    answer = api.submit(training={"init_from": "math@1"}, lora={"r": 8, "alpha": 8, "target_modules": "attention"})
    error = answer.json()["error"]

    assert (answer.status_code, error["param"]) == (400, "lora.r")
    assert "'lora.r' is 8, but math@1, from which 'training.init_from' starts, has 4" in error["message"]
    assert "'lora.target_modules' is 'attention'" in error["message"]
    assert "lora.alpha" not in error["message"]


def test_an_imported_version_is_a_start_if_its_shape_is_on_record(api: Api) -> None:
    """A bare shape stands in the manifest of what was not trained here; anything else cannot be trained on."""
    published(api, "bare", spec=LORA)
    published(api, "blank", spec=StepReport.model_construct(step=1))

    assert api.job(training={"init_from": "bare@1"})["lora"] == LORA.model_dump()
    answer = api.submit(training={"init_from": "blank@1"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "training.init_from")


@pytest.mark.parametrize("reference", ["absent@1", "math@2", "math@prod", "math@01", "../x@1", "tiny", "ma\u0000th"])
def test_a_start_that_is_not_there_is_named(api: Api, reference: str) -> None:
    """No such adapter, version or alias, or no name at all: 400 for the field."""
    published(api)
    error = api.submit(training={"init_from": reference})

    assert (error.status_code, error.json()["error"]["param"]) == (400, "training.init_from")


def test_weights_of_another_base_are_no_start(api: Api) -> None:
    """It is the digest that counts, not the name."""
    published(api, digest="e" * 64)
    error = api.submit(training={"init_from": "math@1"}).json()["error"]

    assert (error["param"], error["code"]) == ("training.init_from", "incompatible_adapter")
    assert "eeeeeeeeeeee" in error["message"]


def test_a_corrupt_version_is_no_start(api: Api) -> None:
    """What may not be served may not be trained on."""
    version_id = published(api)
    with write(api.engine) as tx:
        adapters.mark_corrupt(tx, version_id)
    answer = api.submit(training={"init_from": "math@1"})

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "training.init_from")


def test_a_foreign_adapter_is_no_start(api: Api) -> None:
    """Another tenant's adapter is as good as missing, and nothing is said of it."""
    red = {"Authorization": f"Bearer {api.key('red')}"}
    published(api)
    answer = api.http.post(
        JOBS,
        json={"model": "tiny", "training_file": api.upload(**red)["id"], "training": {"init_from": "math@1"}},
        headers=red,
    )

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "training.init_from")
    assert "there is no adapter 'math'" in answer.json()["error"]["message"]
