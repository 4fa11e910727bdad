"""The documentation says what the code does."""

import re
from pathlib import Path

import pytest

from shared import jobs

ROOT = Path(__file__).parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
STOP = re.compile(r"`((?:api|worker|shared)/[a-z_/]+\.py):([A-Za-z_]+)`")


def test_the_state_diagram_is_the_table_of_arcs() -> None:
    """docs/architecture.md shows exactly the arcs that the ledger can follow."""
    assert f"```mermaid\n{jobs.diagram()}```" in ARCHITECTURE


def test_every_stop_of_a_flow_exists() -> None:
    """Each file:function that docs/architecture.md names is there."""
    stops = STOP.findall(ARCHITECTURE)
    missing = [
        f"{path}:{name}"
        for path, name in stops
        if not re.search(rf"(?:def|class) {name}\b", (ROOT / path).read_text(encoding="utf-8"))
        and not re.search(rf"^{name}\b", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    ]

    assert len(stops) > 15
    assert missing == []


@pytest.mark.parametrize("page", ["operations.md", "security.md"])
def test_what_a_page_says_is_proved_is_there(page: str) -> None:
    """Each test, fault and file that the page names in backticks exists."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    proofs = set(re.findall(r"`(test_\w+)`", text))
    faults = set(re.findall(r"`([a-z]+(?:-[a-z]+)+)`", text))
    files = set(re.findall(r"`((?:api|worker|shared|tests|migrations)/[\w./-]+)`", text))

    assert len(proofs) > 5
    assert {name for name in proofs if not re.search(rf"def {name}\b", code)} == set()
    assert {name for name in faults if f'"{name}"' not in code} == set()
    assert {name for name in files if not (ROOT / name).exists()} == set()
