"""Where results go: Markdown between two markers of a page, and JSON beside it."""

import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Final

MARKERS: Final = ("<!-- bench-train: written by `make bench-train` -->", "<!-- bench-train: end -->")
_PACKAGES: Final = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")


def put_between_markers(page: str, text: str) -> str:
    """`page` with what stands between its markers replaced. Raises ValueError unless each is there once, in order."""
    start, end = MARKERS
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


def versions() -> dict[str, str]:
    """Of Python and the packages that the figures depend on; "absent" for one that is not installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")
