"""The application: wiring only."""

import re

from flask import Flask, Response, g, request

from api import adapters, completions, errors, files, generators, jobs, models, ops
from api.auth import Gate
from api.call import Seats, Services
from api.endpoint import Endpoint, install
from api.metrics import Metrics
from shared import db, ids
from shared.config import Settings
from shared.queue import Queue
from shared.store.layout import Layout

RESOURCES = (files, jobs, models, adapters, completions, generators, ops)
ENDPOINTS = [one for resource in RESOURCES for one in vars(resource).values() if isinstance(one, Endpoint)]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


def create_app(settings: Settings) -> Flask:
    """The WSGI application. It connects to nothing yet; a database without the schema is answered with 503."""
    app = Flask("lorad", static_folder=None, template_folder=None)
    app.before_request(_name_request)
    app.after_request(_sign_response)
    metrics = Metrics()
    metrics.watch(app)
    errors.register(app)
    layout = Layout(settings.data_dir)
    layout.prepare()
    engine = db.open_engine(settings.database_url)
    services = Services(
        engine=engine,
        layout=layout,
        queue=Queue(settings.resolved_broker_url, max_waiting=settings.max_queued_requests),
        max_queued_jobs=settings.max_queued_jobs,
        waiters=Seats(settings.api_threads // 2),
    )
    install(app, ENDPOINTS, Gate(engine), services)
    app.extensions[ops.ENDPOINTS_KEY], app.extensions[ops.METRICS_KEY] = ENDPOINTS, metrics
    return app


def create_app_from_env() -> Flask:
    """The application with the settings of the environment, for a WSGI server."""
    return create_app(Settings.from_env())


def _name_request() -> None:
    given = request.headers.get("x-request-id", "")
    g.request_id = given if _REQUEST_ID.fullmatch(given) else ids.new_id(ids.REQUEST)


def _sign_response(response: Response) -> Response:
    response.headers["x-request-id"] = g.request_id
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")
    return response
