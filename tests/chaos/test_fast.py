"""The faults that `make test` tries; `make chaos` has all of them."""

from collections.abc import Iterator

import pytest

from tests.chaos import broker_faults, database_faults, publication_faults, request_faults
from tests.chaos.bench import Bench
from tests.chaos.faults import FAULTS

pytestmark = [pytest.mark.system, pytest.mark.timeout(150)]

MODULES = {module.__name__ for module in (broker_faults, database_faults, publication_faults, request_faults)}
FAST = [fault.name for fault in FAULTS.values() if fault.is_fast and fault.run.__module__ in MODULES]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Bench(tmp_path_factory.mktemp("chaos")) as running:
        yield running


@pytest.mark.parametrize("name", FAST)
def test_survives(bench: Bench, name: str) -> None:
    """What the fault's own docstring says holds after it, and so do all invariants."""
    FAULTS[name].run(bench)
