"""Gzip as a stream in bounded memory, whatever the file claims to be."""

import io
import zlib
from typing import TYPE_CHECKING, BinaryIO, Final

from shared import limits

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAGIC: Final = b"\x1f\x8b"
_BLOCK_BYTES: Final = 64 << 10
_FREE_BYTES: Final = 4 << 20
"""Up to here no ratio is judged: little that repeats itself compresses well and costs nothing."""


class Unreadable(Exception):
    """The rest of the file cannot be read; `code` and the message say why."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Inflated(io.RawIOBase):
    """The decompressed bytes of a gzip file of one or more members; zeros may follow one, as gzip itself allows.

    Raises Unreadable when the file is damaged, ends too early, or gives more bytes than text of its size would
    (`limits.DATASET_GZIP_RATIO`). Holds two blocks at a time and never decompresses more than it is asked for.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._pending = b""
        self._size_in = self._size_out = 0
        self._num_members = 1
        self._member = zlib.decompressobj(wbits=31)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Fills the front of `buffer`; 0 at the end of the last member."""
        view = memoryview(buffer).cast("B")
        while True:
            if not self._pending:
                self._pending = self._file.read(_BLOCK_BYTES)
                self._size_in += len(self._pending)
            is_end = not self._pending
            if self._member.eof:
                if is_end:
                    return 0
                self._begin_member()
            elif block := self._decompress(len(view)):
                view[: len(block)] = block
                return len(block)
            elif is_end and not self._member.eof:
                raise Unreadable("truncated_gzip", "the compressed file ends too early; upload it again")

    def _begin_member(self) -> None:
        self._pending = self._pending.lstrip(b"\0")
        if self._pending:
            self._num_members += 1
            if self._num_members > limits.DATASET_GZIP_MEMBERS:
                message = f"a gzip file has at most {limits.DATASET_GZIP_MEMBERS:,} members"
                raise Unreadable("too_many_members", message)
            self._member = zlib.decompressobj(wbits=31)

    def _decompress(self, size: int) -> bytes:
        try:
            block = self._member.decompress(self._pending, size)
        except zlib.error as error:
            raise Unreadable("invalid_gzip", f"the compressed file is damaged: {error}") from error
        self._pending = self._member.unused_data if self._member.eof else self._member.unconsumed_tail
        self._size_out += len(block)
        size_in = self._size_in - len(self._pending)
        if self._size_out > max(_FREE_BYTES, limits.DATASET_GZIP_RATIO * size_in):
            message = f"the file grows more than {limits.DATASET_GZIP_RATIO}-fold when it is decompressed"
            raise Unreadable("gzip_ratio", f"{message}; upload it uncompressed if it is meant so")
        return block
