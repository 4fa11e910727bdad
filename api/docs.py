"""The API reference as Markdown and as a page. `python -m api.docs` writes docs/api.md anew."""

import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

from api.endpoint import Endpoint
from api.reference import Block, Code, Heading, Paragraph, Table, blocks

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem }
code, pre { background: #8882; border-radius: 3px; padding: 0 .2em } pre { padding: .8em; overflow-x: auto }
table { border-collapse: collapse } th, td { border: 1px solid #8886; padding: .2em .6em; text-align: left }
h3 { margin-top: 2em } :root { color-scheme: light dark }"""
_IN_TICKS = re.compile(r"`([^`]*)`")


def markdown(endpoints: Iterable[Endpoint]) -> str:
    note = "<!-- Made from the code by `python -m api.docs`; do not edit. -->"
    return "\n\n".join([note, *map(_markdown, blocks(endpoints))]) + "\n"


def html(endpoints: Iterable[Endpoint]) -> str:
    head = f'<meta charset="utf-8"><title>lorad: HTTP API</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(map(_html, blocks(endpoints)))}</body>'


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Code(text):
            return f"```python\n{text}\n```"
        case Table(head, rows):
            lines = [head, tuple("---" for _ in head), *rows]
            return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Code(text):
            return f"<pre>{escape(text)}</pre>"
        case Table(head, rows):
            return f"<table>{_row('th', head)}{''.join(_row('td', row) for row in rows)}</table>"


def _row(tag: str, cells: tuple[str, ...]) -> str:
    return f"<tr>{''.join(f'<{tag}>{_inline(cell)}</{tag}>' for cell in cells)}</tr>"


def _inline(text: str) -> str:
    return _IN_TICKS.sub(r"<code>\1</code>", escape(text, quote=False))


def main() -> None:
    from api.app import ENDPOINTS

    target = Path(__file__).parent.parent / "docs" / "api.md"
    target.write_text(markdown(ENDPOINTS), encoding="utf-8")


if __name__ == "__main__":
    main()
