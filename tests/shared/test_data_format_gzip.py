"""Compressed data sets: found by their bytes, read as if they were plain, and bounded whatever they grow to."""

import gzip
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import limits
from shared.data_format import Text, check_file, read_samples

LINES = b"".join(b'{"text": "line %d"}\n' % i for i in range(200))
File = Callable[[bytes], Path]


@pytest.fixture
def file(tmp_path: Path) -> File:
    """file(content) -> the path of a file that holds it, under a name that tells nothing."""

    def write(content: bytes) -> Path:
        path = tmp_path / "data.bin"
        path.write_bytes(content)
        return path

    return write


def problems(path: Path) -> list[tuple[int, str]]:
    return [(p.line, p.code) for p in check_file(path).problems]


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(LINES),
        gzip.compress(b"\xef\xbb\xbf" + LINES),
        gzip.compress(LINES[:1000]) + gzip.compress(b"") + gzip.compress(LINES[1000:]),
        gzip.compress(LINES) + bytes(1000),
    ],
    ids=["one member", "byte order mark", "three members cut inside a line", "zero padding"],
)
def test_gzip_is_read_as_plain(content: bytes, file: File) -> None:
    """The samples are those of the plain file with the plain file's line numbers; the report says it is gzip."""
    assert [*read_samples(file(content))] == [Text(i + 1, f"line {i}") for i in range(200)]
    report = check_file(file(content))
    assert (report.compression, report.num_samples, report.is_valid) == ("gzip", 200, True)


def test_plain_is_not_called_gzip(file: File) -> None:
    """The opposite: a plain file has no compression."""
    assert check_file(file(LINES)).compression is None


@pytest.mark.parametrize("missing", [1, 8, 9, 100])
def test_truncated(missing: int, file: File) -> None:
    """A file that ends too early is a problem that says so, even if only the checksum is missing."""
    report = check_file(file(gzip.compress(LINES)[:-missing]))

    assert [p.code for p in report.problems] == ["truncated_gzip"]


def test_truncated_at_a_line(file: File) -> None:
    """What came before the cut is read, and the problem has the line that is not there."""
    packer = zlib.compressobj(wbits=31)
    content = packer.compress(b'{"text": "a"}\n{"text": "b"}\n') + packer.flush(zlib.Z_SYNC_FLUSH)

    assert problems(file(content)) == [(3, "truncated_gzip")]


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(LINES)[:-6] + b"\0\0" + gzip.compress(LINES)[-4:],
        gzip.compress(LINES) + b"garbage",
        b"\x1f\x8b\x08\x00" + b"\xff" * 100,
        b"\x1f\x8b\x07\x00" + gzip.compress(LINES)[4:],
    ],
    ids=["checksum", "garbage behind", "garbage inside", "unknown method"],
)
def test_damaged(content: bytes, file: File) -> None:
    """Bytes that are no gzip file are one problem, whatever could be read before."""
    assert [p.code for p in check_file(file(content)).problems] == ["invalid_gzip"]


def test_inside_a_gzip_lines_are_checked(file: File) -> None:
    """Problems of lines have the same numbers as in the plain file."""
    content = LINES + b"\n{}\n"

    assert problems(file(gzip.compress(content))) == problems(file(content)) == [(202, "unknown_format")]


def bomb(size_bytes: int, piece: bytes) -> bytes:
    """A gzip file of `piece` over and over, about a thousandth of `size_bytes`."""
    packer = zlib.compressobj(level=9, wbits=31)
    block = piece * ((1 << 20) // len(piece))
    return b"".join(packer.compress(block) for _ in range(size_bytes >> 20)) + packer.flush()


@pytest.mark.parametrize("piece", [b"a", b" ", b'{"text": "%s"}\n' % (b"a" * 2000)], ids=["line", "blank", "text"])
def test_bomb_is_refused_in_bounded_memory(piece: bytes, file: File) -> None:
    """A file that grows too much is a problem, found early and without holding what it grows to."""
    path = file(bomb(64 << 20, piece))
    tracemalloc.start()
    try:
        report = check_file(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert report.problems[-1].code == "gzip_ratio"
    assert report.problems[-1].line > 0
    assert peak_bytes < 8 << 20


def test_text_that_compresses_well_is_no_bomb(file: File) -> None:
    """The opposite: a large file of similar lines is read."""
    content = b"".join(b'{"text": "%s %d"}\n' % (b"What is %d plus %d? " % (i % 977, i) * 8, i) for i in range(40_000))

    assert check_file(file(gzip.compress(content, 9))).num_samples == 40_000


@pytest.mark.parametrize(
    ("limit", "value", "code"),
    [("DATASET_LINES", 2, "too_many_lines"), ("DATASET_BYTES", len(LINES) // 100 + 1, "file_too_large")],
)
def test_limits_are_on_what_is_decompressed(
    limit: str, value: int, code: str, file: File, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines and bytes are counted after decompression."""
    monkeypatch.setattr(limits, limit, value)

    assert problems(file(gzip.compress(LINES))) == [(3, code)] == problems(file(LINES))


def test_members_are_bounded(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty members cost time and give no line, so there may only be so many."""
    monkeypatch.setattr(limits, "DATASET_GZIP_MEMBERS", 3)

    assert check_file(file(gzip.compress(LINES[:1000]) * 2 + gzip.compress(LINES[1000:]))).compression == "gzip"
    assert problems(file(gzip.compress(b"") * 4)) == [(1, "too_many_members")]


def test_line_that_never_ends_is_bounded(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line beyond all limits ends the reading at the file's limit, plain or compressed."""
    monkeypatch.setattr(limits, "DATASET_LINE_BYTES", 1000)
    monkeypatch.setattr(limits, "DATASET_BYTES", 100_000)
    content = b"a" * 300_000

    assert problems(file(content)) == [(1, "line_too_long"), (1, "file_too_large")]
    assert problems(file(gzip.compress(content))) == [(1, "line_too_long"), (1, "file_too_large")]


@settings(
    max_examples=100, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.binary(max_size=60) | st.just(b'{"text": "t"}'), max_size=6), st.integers(1, 9), st.binary(max_size=3)
)
def test_compression_changes_no_finding(file: File, lines: list[bytes], level: int, end: bytes) -> None:
    """Whatever the bytes, the report of the compressed file is that of the plain one but for the word gzip."""
    content = b"\n".join(lines) + end
    if content.startswith((b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"PAR1", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")):
        return
    plain, packed = (check_file(file(c)).to_json() for c in (content, gzip.compress(content, level)))

    assert packed == {**plain, "compression": "gzip"}
