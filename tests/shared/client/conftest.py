"""A server that keeps the contract, and the client commands pointed at it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import click
import pytest
from click.testing import CliRunner

from shared.cli.client import COMMANDS
from tests.shared.client.server import ContractServer, Json


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Json]:
        return [json.loads(line) for line in self.out.splitlines()]


Lorad = Callable[..., Ran]


@pytest.fixture
def server() -> Iterator[ContractServer]:
    with ContractServer().running() as running:
        yield running


@pytest.fixture
def lorad(server: ContractServer, monkeypatch: pytest.MonkeyPatch) -> Lorad:
    """Runs `lorad ARGUMENTS` against the server."""
    monkeypatch.setenv("LORAD_BASE_URL", server.url)
    monkeypatch.setattr("shared.cli.client_watch._POLL_S", 0.01)

    def run(*arguments: object, stdin: str | None = None) -> Ran:
        group = click.Group(commands=COMMANDS)
        result = CliRunner().invoke(group, [str(a) for a in arguments], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run
