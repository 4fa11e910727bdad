"""The application: wiring only."""

import logging
import re

from flask import Flask, Response, g, request

from api import adapters, audit, completions, errors, files, generators, jobs, models, ops
from api.auth import STANDING, Gate
from api.call import Services
from api.endpoint import Endpoint, install
from api.metrics import Metrics
from api.refusals import Refusals
from api.seats import Seats
from shared import db, ids, logs
from shared.config import Settings
from shared.queue import Queue
from shared.store.layout import Layout

RESOURCES = (files, jobs, models, adapters, completions, generators, audit, ops)
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
    gate = Gate(
        engine,
        requests_per_minute=settings.requests_per_minute,
        failed_logins_per_minute=settings.failed_logins_per_minute,
    )
    install(app, ENDPOINTS, gate, services, Refusals(engine))
    app.extensions[ops.ENDPOINTS_KEY], app.extensions[ops.METRICS_KEY] = ENDPOINTS, metrics
    return app


def create_app_from_env() -> Flask:
    """The application with the settings of the environment, for a WSGI server."""
    settings = Settings.from_env()
    logs.set_up(level=logging.WARNING, secrets=settings.secrets)
    return create_app(settings)


def _name_request() -> None:
    given = request.headers.get("x-request-id", "")
    g.request_id = given if _REQUEST_ID.fullmatch(given) else ids.new_id(ids.REQUEST)


def _sign_response(response: Response) -> Response:
    response.headers["x-request-id"] = g.request_id
    if standing := g.get(STANDING):
        response.headers.update(standing.headers())
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers.setdefault("Cache-Control", "no-store")
    return response
