"""The OpenAPI document against the API that serves it: what it promises holds for data it allows and data it forbids.

Each operation gets the boundary cases of its parameters and bodies, valid and invalid, and some random ones; the
profile `campaign` (`pytest --hypothesis-profile=campaign`) draws many more, and other ones each time.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ensure_resource_availability,
    ignored_auth,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    use_after_free,
)

from api import errors, openapi
from api.app import ENDPOINTS
from shared.config import Settings
from tests.api.conftest import Api, serve
from tests.api.refused import JOBS
from tests.servers import Broker

IS_CAMPAIGN = settings.get_current_profile_name() == "campaign"
DRAWN = settings(
    max_examples=100 if IS_CAMPAIGN else 10,
    derandomize=not IS_CAMPAIGN,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
STATUSES = {answer.status for answer in errors.TABLE.values()} - {500} | {200, 206, 304, 405, 412, 416}
"""All that docs/api.md tells of, and what HTTP itself has for conditions, ranges and methods."""

DOCUMENT = json.loads(openapi.document(ENDPOINTS))
schema = schemathesis.openapi.from_dict(DOCUMENT)
schema.config.generation.update(with_security_parameters=False)  # the service has no keys
schema_with_keys = schemathesis.openapi.from_dict(DOCUMENT)


@pytest.fixture(scope="module")
def service(broker: Broker, sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A service that has one of everything: an adapter, a data set, a job that has ended."""
    place = tmp_path_factory.mktemp("contract")
    database_url = f"sqlite:///{shutil.copyfile(sqlite_template, place / 'lorad.db')}"
    settings = Settings(
        data_dir=place / "data", database_url=database_url, broker_url=broker.url, requests_per_minute=1_000_000
    )
    with serve(settings, broker) as running:
        running.publish("math")
        yield running


@pytest.fixture(scope="module")
def known(service: Api) -> dict[str, str]:
    """What valid data may name: parameters of paths and keys of bodies, each with something that is there."""
    job = service.http.get(JOBS).json()["data"][0]
    return {
        "job_id": job["id"], "file_id": job["training_file"], "training_file": job["training_file"], "name": "math",
        "model": "tiny", "version": "1", "filename": "adapter_config.json", "purpose": "fine-tune",
    }  # fmt: skip


@schema.parametrize()
@DRAWN
@pytest.mark.timeout(900 if IS_CAMPAIGN else 120)
def test_an_operation_keeps_its_contract(case: schemathesis.Case, service: Api, known: dict[str, str]) -> None:
    """No server error, no status, content type or shape that the document does not have, and nothing taken that it
    forbids."""
    aim(case, known)
    answer = case.call_and_validate(base_url=service.url, checks=CHECKS, timeout=30)

    assert answer.status_code in STATUSES


@pytest.mark.timeout(900 if IS_CAMPAIGN else 120)
def test_operations_after_one_another_keep_the_contract(service: Api, known: dict[str, str]) -> None:
    """What one operation answers is asked for by the next: what was made is there, what was deleted is not."""

    class Sequences(schema.as_state_machine()):  # type: ignore[misc]  # made at run time
        def before_call(self, case: schemathesis.Case) -> None:
            aim(case, {name: value for name, value in known.items() if name not in case.path_parameters})

        def get_call_kwargs(self, case: schemathesis.Case) -> dict[str, Any]:
            return {"base_url": service.url, "timeout": 30}

        def validate_response(self, response: Any, case: schemathesis.Case, **_: Any) -> None:
            case.validate_response(response, checks=[*CHECKS, use_after_free, ensure_resource_availability])
            assert response.status_code in STATUSES

    Sequences.run(settings=settings(DRAWN, max_examples=30 if IS_CAMPAIGN else 10, stateful_step_count=8))


@schema_with_keys.parametrize()
@settings(DRAWN, max_examples=2)
@pytest.mark.timeout(120)
def test_an_operation_asks_for_its_key(case: schemathesis.Case, guarded: tuple[Api, str]) -> None:
    """With a key in the database, no operation but the public ones answers without one or with a wrong one."""
    service, key = guarded
    case.call_and_validate(
        base_url=service.url, checks=[ignored_auth], headers={"Authorization": f"Bearer {key}"}, timeout=30
    )


@pytest.fixture(scope="module")
def guarded(
    broker: Broker, sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Api, str]]:
    """A service that asks for keys, and one that may do everything."""
    place = tmp_path_factory.mktemp("guarded")
    database_url = f"sqlite:///{shutil.copyfile(sqlite_template, place / 'lorad.db')}"
    settings = Settings(
        data_dir=place / "data", database_url=database_url, broker_url=broker.url,
        requests_per_minute=1_000_000, failed_logins_per_minute=1_000_000,
    )  # fmt: skip
    with serve(settings, broker) as running:
        yield running, running.key("default", "admin", "jobs:read", "jobs:write", "files:read", "files:write")


def aim(case: schemathesis.Case, known: dict[str, str]) -> None:
    """Let valid data name what is there, and ask for nothing that a lonely API would wait for."""
    for name in list(case.query):  # in metadata[k]=0.7 nobody can tell a number from text
        if name in ("wait", "stream", "model") or name.startswith("metadata"):
            del case.query[name]
    if case.headers.get("Accept") == "text/event-stream":
        case.headers.pop("Accept")
    if case.meta is None or not case.meta.generation.mode.is_positive or case.method == "DELETE":
        return
    case.path_parameters.update({name: known[name] for name in case.path_parameters if name in known})
    if isinstance(case.body, dict):
        case.body.update({name: known[name] for name in case.body if name in known})
        if "dry_run" in case.body:
            case.body["dry_run"] = False
