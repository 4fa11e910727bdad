"""The files that deploy the service say what the code can do: compose, Dockerfile and the pinned packages."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from shared.cli import lorad
from shared.config import Settings

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = sorted(name for name, service in SERVICES.items() if "build" in service)
STAGES = {
    stage.split("\n", 1)[0].rsplit(" AS ", 1)[1]: stage
    for stage in re.split(r"^FROM ", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
}


def test_compose_has_every_program():
    """Five programs of ours, a database and a broker."""
    assert OURS == ["api", "generator", "migrate", "sweeper", "trainer"]
    assert sorted(SERVICES.keys() - set(OURS)) == ["postgres", "redis"]


@pytest.mark.parametrize("name", OURS)
def test_a_service_runs_a_command_that_there_is(name: str):
    """`lorad` is the image's entry point, and the command behind it parses."""
    service = SERVICES[name]
    command, *arguments = service["command"]

    found = lorad.get_command(click.Context(lorad), command)
    assert found is not None
    found.make_context(command, arguments)
    assert 'ENTRYPOINT ["lorad"]' in STAGES[service["build"]["target"]]


@pytest.mark.parametrize("name", OURS)
def test_a_service_has_settings_that_are_accepted(name: str):
    """Every LORAD_ variable is a setting with a possible value; all programs share database, broker and data."""
    values = {key: _filled_in(value) for key, value in SERVICES[name]["environment"].items()}

    settings = Settings.from_env(values)

    assert settings.database_url == "postgresql://lorad:filled@postgres:5432/lorad"
    assert settings.broker_url == "redis://:filled@redis:6379/0"
    assert f"data:{settings.data_dir}" in SERVICES[name]["volumes"]


def _filled_in(value: str) -> str:
    """As compose does it: ${NAME:-default} and, for a required one, what the user set."""
    return re.sub(r"\$\{\w+(?::-(\w*)|:\?[^}]*)\}", lambda match: "filled" if match[1] is None else match[1], value)


@pytest.mark.parametrize("name", sorted(SERVICES))
def test_a_service_is_watched_and_restarted(name: str):
    """All have a health check and a restart policy; the one that ends by itself has neither."""
    service = SERVICES[name]

    once = name == "migrate"
    assert service["restart"] == ("no" if once else "unless-stopped")
    assert ("test" in service["healthcheck"]) != once


@pytest.mark.parametrize("name", [name for name in OURS if name != "migrate"])
def test_a_service_waits_for_the_schema(name: str):
    """No program starts before the migration ended well."""
    assert SERVICES[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}


def test_passwords_come_from_outside():
    """Wherever a password stands, it is a variable without which compose refuses to start."""
    text = (ROOT / "docker-compose.yml").read_text()
    passwords = re.findall(r"(?:PASSWORD|AUTH): (.*)|://\w*:(.*?)@|--requirepass\n +- (.*)", text)

    assert len(passwords) == 5
    assert all(re.fullmatch(r"\$\{\w+:\?.+\}", "".join(groups)) for groups in passwords)


def test_only_the_api_is_reachable_and_from_this_host_only():
    """One published port, on loopback: a proxy with TLS belongs before it."""
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}

    assert list(published) == ["api"]
    assert all(port.startswith("127.0.0.1:") for port in published["api"])


def test_the_api_image_has_no_torch():
    """The extra 'worker' and torch stand in the worker's stage only."""
    torch = re.compile(r"\[worker\]|torch==")

    assert torch.search(STAGES["worker"])
    assert not any(torch.search(STAGES[stage]) for stage in ("base", "api"))


def test_every_installed_package_is_pinned_as_it_is():
    """What pyproject.toml asks for is pinned in constraints.txt, and installed at that version."""
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
    )
    pins = {_normal(name): pin for name, pin in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    names = [_normal(re.match(r"[\w.-]+", requirement)[0]) for requirement in wanted]  # type: ignore[index]

    assert {name: pins.get(name) for name in names} == {name: version(name).split("+")[0] for name in names}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
