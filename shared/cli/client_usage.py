"""How the client commands explain themselves: options in groups, and wrong usage in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click


class GroupedOption(click.Option):
    """An option that --help lists under the heading `group`."""

    def __init__(self, *arguments: Any, group: str, **facts: Any) -> None:
        super().__init__(*arguments, **facts)
        self.group = group


class OneLineCommand(click.Command):
    """A command whose usage errors are one line each, and whose --help has a section for each group of options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with _in_one_line(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with _in_one_line(ctx):
            return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                group = parameter.group if isinstance(parameter, GroupedOption) else "Options"
                sections.setdefault(group, []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class _WrongUsage(click.UsageError):
    """Shown as one line; the exit status is 2 as for any usage error."""

    def show(self, file: IO[Any] | None = None) -> None:
        hint = f" (see {self.ctx.command_path} --help)" if self.ctx else ""
        click.echo(f"lorad: {self.format_message()}{hint}", file=file, err=True)


@contextmanager
def _in_one_line(ctx: click.Context) -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        lines = error.format_message().splitlines()
        raise _WrongUsage(" ".join(line.strip() for line in lines), ctx) from None
