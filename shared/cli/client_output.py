"""What the client commands print: sentences and tables for people, or one JSON object per line for programs."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime

from rich.console import Console
from rich.table import Table
from rich.text import Text

from shared.cli.http import Json, ServiceError
from shared.errors import LoradError


class Output:
    """Standard output in one of two languages. Errors go to standard error in the same language."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console(file=sys.stdout, highlight=False)

    def record(self, value: Json, text: str) -> None:
        """`value` for programs, `text` for people."""
        if self.as_json:
            self.json_line(value)
        else:
            self.note(text)

    def json_line(self, value: Json) -> None:
        sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """For people only. The text is printed as it is: what users wrote is never markup."""
        if not self.as_json:
            self.console.print(Text(text), soft_wrap=True)

    def piece(self, text: str) -> None:
        """A part of a longer text, at once and exactly."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def table(self, items: Iterable[Json], columns: Mapping[str, Sequence[str]], *, empty: str) -> None:
        """`columns` maps a heading to the keys to try in turn; people get `empty` where there is no item."""
        rows = list(items)
        if self.as_json:
            for item in rows:
                self.json_line(item)
            return
        if not rows:
            self.note(empty)
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in columns:
            table.add_column(heading, no_wrap=heading == next(iter(columns)), overflow="fold")
        for item in rows:
            table.add_row(*(Text(_cell(item, keys)) for keys in columns.values()))
        self.console.print(table)

    def fail(self, error: LoradError) -> None:
        if self.as_json:
            body = error.to_json() if isinstance(error, ServiceError) else ServiceError(error.message).to_json()
            sys.stderr.write(json.dumps(body, ensure_ascii=False) + "\n")
        else:
            suffix = f" [{error.param}]" if error.param and error.param not in error.message else ""
            sys.stderr.write(f"lorad: {error.message}{suffix}\n")


def _cell(item: Json, keys: Sequence[str]) -> str:
    for key in keys:
        value = item.get(key)
        if value is None:
            continue
        if key.endswith("_at"):
            return datetime.fromtimestamp(int(value)).strftime("%Y-%m-%d %H:%M:%S")
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "-"
