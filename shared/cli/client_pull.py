"""Download an adapter version: resumable, checked against its SHA-256, and in place only when all of it is right."""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2

from shared.cli.http import Json, Service, ServiceError, path_of

_FRUITLESS_TRIES = 3
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class RemoteFile:
    """One file of an adapter version, as the service lists it."""

    filename: str
    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class PulledFile:
    """One file that is now in place. `reused` says that it was there already, byte for byte."""

    path: Path
    size_bytes: int
    sha256: str
    reused: bool

    def to_json(self) -> Json:
        return {"path": str(self.path), "size_bytes": self.size_bytes, "sha256": self.sha256, "reused": self.reused}


Received = Callable[[RemoteFile, int], None]
"""Told how many bytes of a file are here, while it arrives."""


def find_version(service: Service, reference: str) -> Json:
    """The version that NAME, NAME@3 or NAME@alias means now."""
    name, _, version = reference.partition("@")
    return service.get("/adapters" + path_of(name, "versions", version or "latest"))


def files_of(version: Json) -> list[RemoteFile]:
    """The files of a version, by its number, so that an alias that moves meanwhile mixes nothing."""
    directory = path_of("adapters", version["name"], "versions", str(version["version"]), "files")
    return [
        RemoteFile(f["filename"], directory + path_of(f["filename"]), f["size_bytes"], f["sha256"])
        for f in version["files"]
        if _is_plain(f)
    ]


def pull(service: Service, files: list[RemoteFile], directory: Path, received: Received) -> list[PulledFile]:
    """Put the files into `directory`, replacing older ones; nothing is replaced before every file is here and right.

    What an earlier, interrupted pull left in a .part file is used again. Raises ServiceError for bytes that do not
    hash to what the service says.
    """
    directory.mkdir(parents=True, exist_ok=True)
    present = {f.filename for f in files if _hash(directory / f.filename) == f.sha256}
    for file in files:
        if file.filename in present:
            received(file, file.size_bytes)
        else:
            _fetch(service, file, _part(directory, file), received)
    for file in files:
        if file.filename not in present:
            _part(directory, file).replace(directory / file.filename)
        for stale in directory.glob(f"{file.filename}.*.part"):
            stale.unlink()
    _sync(directory)
    return [PulledFile(directory / f.filename, f.size_bytes, f.sha256, f.filename in present) for f in files]


def _part(directory: Path, file: RemoteFile) -> Path:
    """Where a file collects its bytes. The name holds the hash, so that parts of two versions never join."""
    return directory / f"{file.filename}.{file.sha256[:16]}.part"


def _fetch(service: Service, file: RemoteFile, part: Path, received: Received) -> None:
    """The whole file in `part`, verified. Goes on where it stopped as long as tries bring new bytes."""
    if _size(part) > file.size_bytes:
        part.unlink()
    fruitless = 0
    while _size(part) < file.size_bytes or not part.exists():
        before = _size(part)
        try:
            _receive(service, file, part, received)
        except ServiceError as error:
            fruitless = 0 if _size(part) > before else fruitless + 1
            if error.status is not None or fruitless == _FRUITLESS_TRIES:
                raise
    received(file, file.size_bytes)
    if _size(part) == file.size_bytes and _hash(part) == file.sha256:
        return
    part.unlink()
    raise ServiceError(
        f"{file.filename}: the bytes do not have the SHA-256 {file.sha256}; nothing was kept, pull again",
        code="checksum_mismatch",
    )


def _receive(service: Service, file: RemoteFile, part: Path, received: Received) -> None:
    """One request: what `part` lacks is appended, or the whole file is written anew if the service sends it whole."""
    have = _size(part)
    headers = {"Range": f"bytes={have}-", "If-Range": f'"{file.sha256}"'} if have else {}
    with service.bytes_from(file.path, headers) as response:
        _check_etag(file, response)
        goes_on = response.status_code == 206 and response.headers["content-range"].startswith(f"bytes {have}-")
        with _durable(part, "ab" if goes_on else "wb") as write:
            here = have if goes_on else 0
            for chunk in response.iter_raw():  # as they come: a chunk size would lose the last one to a break
                here += len(chunk)
                if here > file.size_bytes:
                    raise ServiceError(f"{file.filename}: more than its {file.size_bytes} bytes came", status=200)
                write(chunk)
                received(file, here)


def _check_etag(file: RemoteFile, response: httpx2.Response) -> None:
    etag = response.headers.get("etag", "").strip('"')
    if response.status_code == 416 or etag != file.sha256:
        raise ServiceError(
            f"{file.filename}: the service serves {etag or 'an unnamed file'}, not {file.sha256}",
            status=response.status_code,
            code="checksum_mismatch",
        )


@contextmanager
def _durable(path: Path, mode: str) -> Iterator[Callable[[bytes], object]]:
    """A file to write to that is on disk when the block is left, also by an exception."""
    with path.open(mode) as stream:
        try:
            yield stream.write
        finally:
            stream.flush()
            os.fsync(stream.fileno())


def _is_plain(file: Json) -> bool:
    """True, or ServiceError: a listed file must not reach outside the directory it is pulled into."""
    if _PLAIN_NAME.fullmatch(file["filename"]) and _SHA256.fullmatch(file["sha256"]):
        return True
    raise ServiceError(f"the service lists a file that is not safe to write: {file['filename']!r}", code="not_lorad")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _hash(path: Path) -> str | None:
    """SHA-256 of a file in hex; None if there is none."""
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
