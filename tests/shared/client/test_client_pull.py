"""`lorad pull`: what arrives is whole and right, or nothing is put in place."""

import hashlib
from pathlib import Path

import pytest

from tests.shared.client.conftest import Lorad
from tests.shared.client.server import ContractServer

WEIGHTS = bytes(range(256)) * 64
CONFIG = b'{"r": 8}'
URL = "/adapters/nya/versions/1/files/adapter_model.safetensors"


@pytest.fixture(autouse=True)
def stored(server: ContractServer) -> None:
    server.adapter_files = {"adapter_model.safetensors": WEIGHTS, "adapter_config.json": CONFIG}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def held(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_pull_brings_exactly_the_files(server: ContractServer, lorad: Lorad, tmp_path: Path) -> None:
    """The directory holds the version's files, byte for byte, and nothing else."""
    ran = lorad("pull", "nya", tmp_path / "out")

    assert ran.code == 0
    assert held(tmp_path / "out") == server.adapter_files
    assert sha256(WEIGHTS) in ran.out


def test_pull_names_paths_and_hashes_in_json(lorad: Lorad, tmp_path: Path) -> None:
    """Programs get one object per file."""
    lines = lorad("pull", "nya@1", tmp_path, "--json").lines

    assert {line["path"]: line["sha256"] for line in lines} == {
        str(tmp_path / "adapter_model.safetensors"): sha256(WEIGHTS),
        str(tmp_path / "adapter_config.json"): sha256(CONFIG),
    }


def test_a_broken_download_goes_on_where_it_stopped(server: ContractServer, lorad: Lorad, tmp_path: Path) -> None:
    """After a connection that breaks, the next request asks only for what is missing, of the same bytes."""
    server.cut_downloads_after = [1000]

    ran = lorad("pull", "nya", tmp_path)

    _, second = server.requests("GET", URL)
    assert ran.code == 0
    assert (second.headers["range"], second.headers["if-range"]) == ("bytes=1000-", f'"{sha256(WEIGHTS)}"')
    assert held(tmp_path) == server.adapter_files


def test_a_pull_that_gave_up_is_resumed_by_the_next(server: ContractServer, lorad: Lorad, tmp_path: Path) -> None:
    """What one command fetched, the next one does not fetch again; until then no file is in place."""
    server.cut_downloads_after = [1000, 0, 0, 0]

    gave_up = lorad("pull", "nya", tmp_path)
    left = set(held(tmp_path))
    again = lorad("pull", "nya", tmp_path)

    assert (gave_up.code, again.code) == (1, 0)
    assert left == {f"adapter_model.safetensors.{sha256(WEIGHTS)[:16]}.part"}
    assert server.requests("GET", URL)[-1].headers["range"] == "bytes=1000-"
    assert held(tmp_path) == server.adapter_files


def test_wrong_bytes_are_refused(server: ContractServer, lorad: Lorad, tmp_path: Path) -> None:
    """A part whose bytes are not the version's gives an error, no file and no part; pulling again mends it."""
    part = tmp_path / f"adapter_model.safetensors.{sha256(WEIGHTS)[:16]}.part"
    part.write_bytes(b"not what the service has")

    ran = lorad("pull", "nya", tmp_path)

    assert ran.code == 1
    assert "SHA-256" in ran.err
    assert held(tmp_path) == {}
    assert lorad("pull", "nya", tmp_path).code == 0


def test_an_etag_that_is_not_the_listed_hash_is_refused(server: ContractServer, lorad: Lorad, tmp_path: Path) -> None:
    """Bytes the service itself names otherwise are not taken."""
    server.served_sha256 = "0" * 64

    ran = lorad("pull", "nya", tmp_path)

    assert (ran.code, held(tmp_path)) == (1, {})


def test_old_files_stay_until_all_new_ones_are_right(server: ContractServer, lorad: Lorad, tmp_path: Path) -> None:
    """A pull that fails half way leaves the version that was there, not a mixture."""
    (tmp_path / "adapter_config.json").write_bytes(b"old")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"older")
    server.cut_downloads_after = [len(WEIGHTS), 0, 0, 0]

    assert lorad("pull", "nya", tmp_path).code == 1

    kept = held(tmp_path)
    assert (kept["adapter_config.json"], kept["adapter_model.safetensors"]) == (b"old", b"older")
    assert lorad("pull", "nya", tmp_path).code == 0
    assert held(tmp_path) == server.adapter_files


def test_what_is_there_already_is_not_fetched(server: ContractServer, lorad: Lorad, tmp_path: Path) -> None:
    """A second pull moves no bytes and says so."""
    lorad("pull", "nya", tmp_path)
    before = len(server.requests("GET", URL))

    lines = lorad("pull", "nya", tmp_path, "--json").lines

    assert len(server.requests("GET", URL)) == before
    assert all(line["reused"] for line in lines)


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "..", ".hidden", "a/b", "a\nb"])
def test_a_listed_name_cannot_leave_the_directory(
    server: ContractServer, lorad: Lorad, tmp_path: Path, name: str
) -> None:
    """A service that lists a path instead of a name is not obeyed, and nothing is written."""
    server.adapter_files = {name: b"evil"}

    ran = lorad("pull", "nya", tmp_path / "out")

    assert ran.code == 1
    assert not (tmp_path / "out").exists()


def test_an_unknown_adapter_is_one_line(lorad: Lorad, tmp_path: Path) -> None:
    """A name that is not there is said, and no directory is made."""
    ran = lorad("pull", "woof", tmp_path / "out")

    assert (ran.code, ran.err) == (1, "lorad: There is no such object.\n")
    assert not (tmp_path / "out").exists()


def test_a_directory_that_cannot_be_made_is_one_line(lorad: Lorad, tmp_path: Path) -> None:
    """A file where the directory's parent should be is an error of one line."""
    (tmp_path / "file").write_text("")

    ran = lorad("pull", "nya", tmp_path / "file" / "out")

    assert (ran.code, ran.err.count("\n")) == (1, 1)
