"""Where results go: Markdown between two markers of a page, and JSON beside it."""

import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT


def publish(name: str, text: str, record: dict[str, Any]) -> None:
    """Write docs/benchmarks.md between the markers of `bench-<name>`, and benchmarks/results/<name>.json."""
    page = ROOT / "docs" / "benchmarks.md"
    page.write_text(put_between_markers(page.read_text(encoding="utf-8"), text, name=name), encoding="utf-8")
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"Written to docs/benchmarks.md and benchmarks/results/{name}.json.")


def markers(name: str) -> tuple[str, str]:
    """The lines between which `make bench-<name>` writes."""
    return f"<!-- bench-{name}: written by `make bench-{name}` -->", f"<!-- bench-{name}: end -->"


def put_between_markers(page: str, text: str, *, name: str) -> str:
    """`page` with what stands between its markers replaced. Raises ValueError unless each is there once, in order."""
    start, end = markers(name)
    if page.count(start) != 1 or page.count(end) != 1 or page.index(start) > page.index(end):
        raise ValueError(f"the page needs the lines {start} and {end}, once each and in this order")
    before, rest = page.split(start)
    _, after = rest.split(end)
    return f"{before}{start}\n\n{text.strip()}\n\n{end}{after}"


def processor() -> str:
    """The processor's model name as the kernel gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "an unknown processor")


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python and the packages that the figures depend on; "absent" for one that is not installed."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")
