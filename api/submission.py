"""What a job's body names, looked up: base model, data sets, adapter name. What is wrong with a field is 400."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from api.job_spec import plan
from api.lora_shape import Start
from api.schemas.jobs import JobRequest
from shared import ids, limits
from shared.db import Tx
from shared.errors import AdapterCorrupt, IncompatibleAdapter, InvalidRequest, InvalidTrainingFile, NotFound
from shared.jobs import NewJob
from shared.specs import LoraSpec, TrainSpec
from shared.store import adapters, base_models, files
from shared.tables import BaseModelRow


def new_job(tx: Tx, tenant: str, body: JobRequest) -> NewJob:
    """The job to submit; raises InvalidRequest with `param`."""
    with _missing_is_invalid("model"):
        base = base_models.by_name(tx, body.model)
    report = _data_set(tx, tenant, body.training_file, "training_file")
    if body.validation_file is not None:
        _data_set(tx, tenant, body.validation_file, "validation_file")
    start = _start(tx, tenant, body.training.init_from, base)
    planned = plan(body, base, int(report["num_samples"]), start=start)
    return NewJob(
        tenant=tenant,
        base_model_id=base.id,
        training_file_id=body.training_file,
        validation_file_id=body.validation_file,
        adapter_name=_adapter_name(tx, body.suffix),
        suffix=body.suffix,
        spec=planned.spec,
        tags=dict(body.metadata or {}),
        priority=body.priority,
        total_steps=planned.total_steps,
    )


def _data_set(tx: Tx, tenant: str, file_id: str, param: str) -> dict[str, Any]:
    """The report of a data set that can be trained on."""
    with _missing_is_invalid(param):
        file = files.get(tx, tenant, file_id)
    if file.status == "error":
        raise InvalidTrainingFile(f"'{param}': {file.id} cannot be used: {file.status_details}.", param=param)
    if file.purpose != "fine-tune" or file.report is None:
        raise InvalidTrainingFile(
            f"'{param}': {file.id} is not a data set; its purpose is {file.purpose}.", param=param
        )
    return file.report


def _start(tx: Tx, tenant: str, reference: str | None, base: BaseModelRow) -> Start | None:
    """The adapter version to start from: one of this tenant's, trained on the very same base weights."""
    param = "training.init_from"
    if reference is None:
        return None
    with _missing_is_invalid(param):
        adapter, version = adapters.resolve(tx, tenant, reference)
    exact = f"{adapter.name}@{version.version}"
    digest = version.manifest["base_model"]["digest"]
    if digest != base.digest:
        raise IncompatibleAdapter(
            f"'{param}': {exact} was made for the base model with digest {digest[:12]}...; {base.name!r} has"
            f" {base.digest[:12]}....",
            param=param,
        )
    shape = _recorded_shape(version.manifest["spec"])
    if shape is None:
        raise IncompatibleAdapter(f"'{param}': the shape of {exact} is not on record.", param=param)
    return Start(version.id, exact, shape)


def _recorded_shape(spec: Any) -> LoraSpec | None:
    """The shape in a manifest: of a training, or bare, as of an import."""
    try:
        return TrainSpec.model_validate(spec).lora if "lora" in spec else LoraSpec.model_validate(spec)
    except ValidationError:
        return None


def _adapter_name(tx: Tx, suffix: str | None) -> str:
    if suffix is None:
        return f"lora-{ids.new_id('')[-12:]}"
    if not limits.is_name(suffix):
        raise InvalidRequest(
            f"'suffix' names the adapter and must match {limits.NAME_PATTERN} without '..' (given: {suffix!r}).",
            param="suffix",
        )
    if any(base.name == suffix for base in base_models.list_all(tx)):
        raise InvalidRequest(f"'suffix': {suffix!r} is the name of a base model.", param="suffix")
    return suffix


@contextmanager
def _missing_is_invalid(param: str) -> Iterator[None]:
    """404 is for what the URL names; what a body names in vain is a bad parameter."""
    try:
        yield
    except NotFound as error:
        raise InvalidRequest(f"'{param}': {error.message}", param=param, code=error.error_code) from None
    except AdapterCorrupt as error:
        raise InvalidRequest(f"'{param}': {error.message}", param=param, code=error.error_code) from None
