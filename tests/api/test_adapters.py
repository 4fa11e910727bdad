"""The adapter store over HTTP: names, versions, aliases, and bytes that are right or not served."""

import base64
import hashlib
from pathlib import Path

import pytest

from tests.api.conftest import WEIGHTS, Api

FILE = "/v1/adapters/math/versions/1/files/adapter_model.safetensors"
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


def stored(api: Api, version_id: str) -> Path:
    return api.layout.adapter(version_id) / "adapter_model.safetensors"


def test_an_adapter_shows_its_versions(api: Api) -> None:
    """Newest first, each with base model, job, files and aliases; lists leave the versions out."""
    first, second = api.publish(), api.publish()
    api.alias("math", prod=1)
    adapter = api.http.get("/v1/adapters/math").json()
    (listed,) = api.http.get("/v1/adapters").json()["data"]

    assert [(v["version"], v["id"], v["aliases"]) for v in adapter["versions"]] == [
        (2, second.id, []),
        (1, first.id, ["prod"]),
    ]
    assert adapter["versions"][1]["job_id"] == first.job_id
    assert (listed["latest_version"], listed["base_model"], listed["aliases"]) == (2, "tiny", {"prod": 1})
    assert listed["versions"] is None
    weights = next(f for f in adapter["versions"][0]["files"] if f["filename"] == "adapter_model.safetensors")
    assert (weights["sha256"], weights["size_bytes"]) == (SHA256, len(WEIGHTS))


@pytest.mark.parametrize(("reference", "version"), [("1", 1), ("prod", 1), ("latest", 2)])
def test_a_version_is_named_by_number_alias_or_latest(api: Api, reference: str, version: int) -> None:
    """All three ways lead to the version, in the store and for generation alike."""
    api.publish()
    api.publish()
    api.alias("math", prod=1)

    assert api.http.get(f"/v1/adapters/math/versions/{reference}").json()["version"] == version
    assert api.http.get(f"/v1/models/math@{reference}").json()["root"] == f"math@{version}"


def test_a_download_proves_itself(api: Api) -> None:
    """ETag and Repr-Digest are the SHA-256 of the bytes that came."""
    api.publish()
    answer = api.http.get(FILE)

    assert answer.content == WEIGHTS
    assert answer.headers["etag"] == f'"{SHA256}"'
    assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(hashlib.sha256(WEIGHTS).digest()).decode()}:"
    assert answer.headers["accept-ranges"] == "bytes"


def test_only_a_pinned_url_may_be_cached_for_ever(api: Api) -> None:
    """The number of a version never means other bytes; `latest` and an alias may."""
    api.publish()
    api.alias("math", prod=1)

    assert "immutable" in api.http.get(FILE).headers["cache-control"]
    for moving in ("latest", "prod"):
        assert api.http.get(FILE.replace("/1/", f"/{moving}/")).headers["cache-control"] == "private, no-cache"


def test_head_has_the_headers_without_the_bytes(api: Api) -> None:
    """HEAD answers as GET would."""
    api.publish()
    answer = api.http.head(FILE)

    assert (answer.status_code, answer.content) == (200, b"")
    assert (answer.headers["content-length"], answer.headers["etag"]) == (str(len(WEIGHTS)), f'"{SHA256}"')


@pytest.mark.parametrize(
    ("asked", "status", "slice_"),
    [
        ("bytes=0-9", 206, slice(0, 10)),
        ("bytes=1000-", 206, slice(1000, None)),
        ("bytes=-24", 206, slice(-24, None)),
        ("bytes=-999999", 206, slice(None)),
        ("bytes=1000-999999", 206, slice(1000, None)),
        ("bytes=0-1,3-4", 200, slice(None)),
        ("lines=0-1", 200, slice(None)),
        ("bytes=9-0", 200, slice(None)),
        ("bytes=x", 200, slice(None)),
        ("bytes=-", 200, slice(None)),
    ],
)
def test_ranges_are_answered_as_rfc_9110_says(api: Api, asked: str, status: int, slice_: slice) -> None:
    """One satisfiable range is served; several, malformed ones and other units are ignored."""
    api.publish()
    answer = api.http.get(FILE, headers={"Range": asked})

    assert (answer.status_code, answer.content) == (status, WEIGHTS[slice_])


@pytest.mark.parametrize("asked", ["bytes=1024-", "bytes=-0", f"bytes={10**17}-"])
def test_a_range_outside_the_file_is_416_in_json(api: Api, asked: str) -> None:
    """The answer says how long the file is."""
    api.publish()
    answer = api.http.get(FILE, headers={"Range": asked})

    assert (answer.status_code, answer.json()["error"]["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(WEIGHTS)}"


def test_conditional_requests(api: Api) -> None:
    """What the client has is not sent again; a part of another file is not appended to its own."""
    api.publish()

    assert api.http.get(FILE, headers={"If-None-Match": f'"{SHA256}"'}).status_code == 304
    assert api.http.get(FILE, headers={"If-None-Match": '"other"'}).status_code == 200
    ranged = {"Range": "bytes=10-"}
    assert api.http.get(FILE, headers=ranged | {"If-Range": f'"{SHA256}"'}).status_code == 206
    assert api.http.get(FILE, headers=ranged | {"If-Range": '"other"'}).content == WEIGHTS
    unmet = api.http.get(FILE, headers={"If-Match": '"other"'})
    assert (unmet.status_code, unmet.json()["error"]["code"]) == (412, "precondition_failed")


def test_a_flipped_bit_is_never_served(api: Api) -> None:
    """A file that is not what its row says is a conflict, however often it is asked for."""
    path = stored(api, api.publish().id)
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 1
    path.write_bytes(damaged)

    for _ in range(2):
        answer = api.http.get(FILE)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "adapter_corrupt")
        assert answer.headers["x-should-retry"] == "false"


def test_a_symbolic_link_is_not_followed(api: Api, tmp_path: Path) -> None:
    """A link in the place of a file is not that file, even if the bytes would be right."""
    path = stored(api, api.publish().id)
    elsewhere = tmp_path / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)

    assert api.http.get(FILE).json()["error"]["code"] == "adapter_corrupt"


def test_a_deleted_adapter_is_gone_and_its_numbers_too(api: Api) -> None:
    """After a deletion nothing is found; the name can live again and counts on."""
    api.publish()
    assert api.http.delete("/v1/adapters/math").json() == {"id": "math", "object": "adapter", "deleted": True}

    assert api.http.get(FILE).status_code == 404
    assert api.http.delete("/v1/adapters/math").status_code == 404
    assert api.publish().version == 2


def test_one_version_is_deleted_through_models(api: Api) -> None:
    """`DELETE /v1/models/math@1` leaves the other versions alone."""
    api.publish()
    api.publish()
    assert api.http.delete("/v1/models/math@1").json() == {"id": "math@1", "object": "model", "deleted": True}

    assert [v["version"] for v in api.http.get("/v1/adapters/math").json()["versions"]] == [2]
    assert api.http.get("/v1/models/math@1").status_code == 404


def test_uploaded_bytes_have_etag_and_range_too(api: Api) -> None:
    """A data set can be fetched in parts like an adapter, and is saved under its own name, never shown as a page."""
    file = api.upload()
    answer = api.http.get(f"/v1/files/{file['id']}/content", headers={"Range": "bytes=0-4"})

    assert (answer.status_code, answer.headers["etag"]) == (206, f'"{file["sha256"]}"')
    assert answer.headers["content-disposition"] == "attachment; filename=data.jsonl"
    assert (answer.headers["content-type"], answer.headers["x-content-type-options"]) == (
        "application/octet-stream",
        "nosniff",
    )
