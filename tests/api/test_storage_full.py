"""An upload that the disk has no room for."""

from collections.abc import Callable, Iterator

import pytest

from shared import failpoints
from tests.api.conftest import SAMPLES, Api


@pytest.fixture
def arm() -> Iterator[Callable[[str], None]]:
    """Arm failpoints; whatever is left of them goes with the test."""
    yield failpoints.arm
    failpoints.arm("")


def post(api: Api, **headers: str) -> tuple[int, dict[str, object]]:
    answer = api.http.post(
        "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("data.jsonl", SAMPLES)}, headers=headers
    )
    return answer.status_code, dict(answer.json())


def test_a_full_disk_is_507_and_keeps_nothing(api: Api, arm: Callable[[str], None]) -> None:
    """The code says what to do about it, and neither a row nor a byte stays; once there is room the same call works."""
    arm("publish.before_rename:enospc")
    status, body = post(api, **{"Idempotency-Key": "again"})
    listed = api.http.get("/v1/files").json()["data"]
    left = [path for name in ("files", "tmp") for path in (api.layout.root / name).iterdir()]
    repeated, _ = post(api, **{"Idempotency-Key": "again"})

    assert status == 507
    assert body["error"]["code"] == "insufficient_storage"  # type: ignore[index]  # an answer of any shape fails too
    assert (listed, left) == ([], [])
    assert repeated == 200


def test_a_failing_disk_is_not_called_full(api: Api, arm: Callable[[str], None]) -> None:
    """An I/O error is our own failure, without details."""
    arm("publish.after_rename:eio")
    status, body = post(api)
    files = list((api.layout.root / "files").iterdir())

    assert status == 500
    assert body["error"]["code"] == "internal_error"  # type: ignore[index]  # an answer of any shape fails too
    assert files == []
