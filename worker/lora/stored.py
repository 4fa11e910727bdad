"""The bytes of a file: read into memory once, and held to the checksum that was recorded for them."""

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from shared.errors import AdapterCorrupt, IncompatibleAdapter
from worker.lora.tensor_file import refuse

_BLOCK_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class StoredAdapter:
    """Where an adapter's files are, and the SHA-256 that was recorded for each by name; none: it is not checked."""

    directory: Path
    sha256: Mapping[str, str] = field(default_factory=dict)


class FileBytes:
    """The content of one file. Its checksum is computed on another thread, while the content is put to use.

    `check_start` sees the first 8 bytes and the size before the rest is read. Raises IncompatibleAdapter if the file is
    missing, no plain file, or larger than `max_bytes`. With `expected` it is a file that we stored: AdapterCorrupt.
    """

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int,
        expected: str | None = None,
        check_start: Callable[[bytes, int], None] | None = None,
    ) -> None:
        self._path = path
        self._expected = expected
        self._found = ""
        try:
            self.content = _read(path, max_bytes, check_start)
        except (IncompatibleAdapter, OSError) as error:
            if expected is None:
                raise
            raise AdapterCorrupt(f"{path.name} of {path.parent.name} cannot be read") from error
        self._hashing: threading.Thread | None = None
        if len(self.content) > _BLOCK_BYTES:
            self._hashing = threading.Thread(target=self._hash, name="checksum", daemon=True)
            self._hashing.start()
        else:
            self._hash()

    def sha256(self) -> str:
        """In hex, once it is known; AdapterCorrupt if it is not the expected one."""
        if self._hashing is not None:
            self._hashing.join()
        if self._expected not in (None, self._found):
            raise AdapterCorrupt(f"{self._path.name} of {self._path.parent.name} does not match its recorded checksum")
        return self._found

    def _hash(self) -> None:
        self._found = hashlib.sha256(self.content).hexdigest()


def _read(path: Path, max_bytes: int, check_start: Callable[[bytes, int], None] | None) -> bytearray:
    if not path.is_file():
        raise refuse(["there is no such file"], file=path.name)
    with path.open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise refuse([f"{size} bytes; at most {max_bytes} are allowed"], file=path.name)
        if check_start is not None:
            check_start(os.pread(file.fileno(), 8, 0), size)
        content = bytearray(size)
        position = 0
        with memoryview(content) as view:
            while position < size and (count := file.readinto(view[position : position + _BLOCK_BYTES])):
                position += count
        if position != size or file.read(1):
            raise refuse(["the file changed while it was read"], file=path.name)
    return content
