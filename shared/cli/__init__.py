"""The `lorad` command: servers, administration, and a client that speaks HTTP only."""

import importlib
import sys
from collections.abc import Iterator

import click

from shared.errors import LoradError

_MODULES = ("client", "servers", "up", "admin", "audit", "backup")
"""Each has COMMANDS. Looked through in this order, so that client commands start without the database's library."""


class _Lorad(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(str(command.name) for command in _commands())

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return next((command for command in _commands() if command.name == cmd_name), None)


def _commands() -> Iterator[click.Command]:
    for module in _MODULES:
        yield from importlib.import_module(f"shared.cli.{module}").COMMANDS


@click.group(cls=_Lorad, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lorad", prog_name="lorad")
def lorad() -> None:
    """Train LoRA adapters over HTTP, keep them as versions, talk to any of them.

    Settings are LORAD_* environment variables. `lorad up` runs the whole service on this machine.
    """


def main() -> None:
    """Run the command; what a user can mend is one line on standard error and exit code 2."""
    try:
        sys.exit(lorad.main(prog_name="lorad", standalone_mode=False) or 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except LoradError as error:
        click.echo(f"lorad: {error.message}", err=True)
        sys.exit(2)
