"""A file's bytes as numbered lines of text: plain or gzipped, within the limits."""

import io
from collections.abc import Iterator
from typing import BinaryIO, Final

from shared import limits
from shared.data_format.gzipped import MAGIC, Inflated, Unreadable
from shared.data_format.samples import Problem

_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_NOT_TEXT: Final = {
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"PAR1": "Parquet",
}


def is_gzipped(file: BinaryIO) -> bool:
    """Whether the bytes from here on begin as gzip does; the position stays."""
    at = file.tell()
    start = file.read(len(MAGIC))
    file.seek(at)
    return start == MAGIC


def numbered_lines(file: BinaryIO) -> Iterator[tuple[int, str | Problem]]:
    """Lines that hold something, decoded, with their numbers; ends at what makes the rest of the file unreadable."""
    for magic, name in _NOT_TEXT.items():
        start = file.read(len(magic))
        file.seek(0)
        if start == magic:
            message = f"this is a {name} file; upload JSON Lines, plain or compressed with gzip"
            yield 0, Problem(0, "", "unsupported_file", message)
            return
    is_compressed = is_gzipped(file)
    plain = io.BufferedReader(Inflated(file)) if is_compressed else file
    yield from _lines(plain, "decompressed bytes" if is_compressed else "bytes")


def _lines(file: BinaryIO | io.BufferedReader, unit: str) -> Iterator[tuple[int, str | Problem]]:
    line = size_bytes = 0
    is_continued = False
    while True:
        try:
            raw = file.readline(limits.DATASET_LINE_BYTES + 2)  # the limit is on the text without CR LF
        except Unreadable as error:
            line += not is_continued
            yield line, Problem(line, "", error.code, str(error))
            return
        if not raw:
            return
        line += not is_continued
        size_bytes += len(raw)
        if line > limits.DATASET_LINES:
            yield line, Problem(line, "", "too_many_lines", f"a file has at most {limits.DATASET_LINES:,} lines")
            return
        if size_bytes > limits.DATASET_BYTES:
            yield line, Problem(line, "", "file_too_large", f"a file has at most {limits.DATASET_BYTES:,} {unit}")
            return
        was_continued, is_continued = is_continued, not raw.endswith(b"\n")
        if was_continued:
            continue
        text = raw.rstrip(b"\r\n")
        if line == 1:
            text = text.removeprefix(_BYTE_ORDER_MARK)
        if len(text) > limits.DATASET_LINE_BYTES:
            yield line, Problem(line, "", "line_too_long", f"a line has at most {limits.DATASET_LINE_BYTES:,} bytes")
        elif text.strip():
            yield line, _decode(line, text)


def _decode(line: int, text: bytes) -> str | Problem:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        return Problem(line, "", "invalid_utf8", f"byte {error.start + 1} is not UTF-8")
