"""Prometheus figures about requests: how many, how answered, how long; by route template, never by path."""

import time

from flask import Flask, Response, g, request
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_BUCKETS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0)


class Metrics:
    """One application's figures."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._answers = Counter(
            "lorad_http_requests", "Answered requests.", ("method", "route", "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "lorad_http_request_seconds", "Seconds until the answer began.", ("method", "route"),
            buckets=_BUCKETS, registry=self._registry,
        )  # fmt: skip

    def watch(self, app: Flask) -> None:
        app.before_request(self._begin)
        app.after_request(self._end)

    def exposition(self) -> bytes:
        return generate_latest(self._registry)

    def _begin(self) -> None:
        g.began_at = time.monotonic()

    def _end(self, response: Response) -> Response:
        route = request.url_rule.rule if request.url_rule else "(no route)"
        method = request.method if request.url_rule else "(any)"
        self._answers.labels(method, route, str(response.status_code)).inc()
        self._seconds.labels(method, route).observe(time.monotonic() - g.began_at)
        return response
