"""Operations: /healthz, /readyz, /metrics, /openapi.json, /docs."""

from typing import Literal

from flask import Response, current_app

from api import docs, generator_metrics, openapi
from api.call import Call
from api.endpoint import Endpoint, endpoint
from api.metrics import CONTENT_TYPE
from api.schemas.wire import Out
from shared import db
from shared.errors import Unavailable
from shared.store import base_models

ENDPOINTS_KEY = "lorad_endpoints"
METRICS_KEY = "lorad_metrics"


class Health(Out):
    status: Literal["ok"] = "ok"


class Readiness(Out):
    """`broker` false: jobs are accepted and wait, generation answers 503."""

    status: Literal["ready"] = "ready"
    database: Literal[True] = True
    broker: bool


@endpoint("GET /healthz", scope="public")
def healthz(call: Call) -> Health:
    """This process answers."""
    return Health()


@endpoint("GET /readyz", scope="public")
def readyz(call: Call) -> Readiness:
    """The database answers and has the schema that this code expects; 503 if not."""
    try:
        db.check_schema(call.services.engine)
    except Exception as error:
        raise Unavailable("The database is not ready.") from error
    return Readiness(broker=call.queue.ping())


@endpoint("GET /metrics", scope="admin", media={CONTENT_TYPE: "Prometheus text format"})
def metrics(call: Call) -> Response:
    """Figures for Prometheus: about requests to this process, and about generation as all generators tell it."""
    figures = current_app.extensions[METRICS_KEY].exposition() + _of_generators(call)
    return Response(figures, content_type=CONTENT_TYPE)


def _of_generators(call: Call) -> bytes:
    with call.read() as tx:
        bases = {row.id: row.name for row in base_models.list_all(tx)}
    try:
        reports = call.queue.generators.alive()
        queues = generator_metrics.Queues(
            doorbells=call.queue.num_doorbells(),
            inspections=call.queue.num_inspections(),
            requests={name: call.queue.num_waiting(base_id) for base_id, name in bases.items()},
        )
    except Unavailable:
        return generator_metrics.exposition([], None, bases)
    return generator_metrics.exposition(reports, queues, bases)


@endpoint("GET /openapi.json", scope="any", media={"application/json": "an OpenAPI 3.1 document"})
def openapi_json(call: Call) -> Response:
    """This API, for programs."""
    return Response(openapi.document(_endpoints()), mimetype="application/json")


@endpoint("GET /docs", scope="any", media={"text/html": "a page"})
def docs_page(call: Call) -> Response:
    """This API, for people."""
    page = Response(docs.html(_endpoints()), mimetype="text/html")
    page.headers["Content-Security-Policy"] = "default-src 'none'; style-src 'unsafe-inline'"
    return page


def _endpoints() -> list[Endpoint]:
    found: list[Endpoint] = current_app.extensions[ENDPOINTS_KEY]
    return found
