"""The streaming form reader, by itself: any split of the bytes gives the same form."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from werkzeug.exceptions import RequestEntityTooLarge

from api.multipart import Form, Readable, read_form
from shared.errors import InvalidRequest


def encoded(*parts: tuple[str, bytes]) -> bytes:
    """A form; a part whose name begins with '*' is a file."""
    body = b""
    for name, content in parts:
        is_file = name.startswith("*")
        extra = '; filename="x.jsonl"' if is_file else ""
        body += f'--BB\r\nContent-Disposition: form-data; name="{name.lstrip("*")}"{extra}\r\n\r\n'.encode()
        body += content + b"\r\n"
    return body + b"--BB--\r\n"


class Trickle:
    """Gives at most `size` bytes a read."""

    def __init__(self, raw: bytes, size: int) -> None:
        self._raw, self._size = io.BytesIO(raw), size

    def read(self, size: int = -1, /) -> bytes:
        return self._raw.read(min(self._size, size) if size >= 0 else self._size)


def read(raw: bytes, *, step: int = 65536, block: int = 4096) -> Form[bytes]:
    def receive(stream: Readable) -> bytes:
        return b"".join(iter(lambda: stream.read(block), b""))

    form: Form[bytes] = Form()
    read_form(Trickle(raw, step), "BB", receive, form)
    return form


@given(content=st.binary(max_size=300), step=st.integers(1, 60), block=st.integers(1, 70))
def test_any_bytes_survive_any_split(content: bytes, step: int, block: int) -> None:
    """A file's bytes come out as they went in, even if they look like line ends and boundaries."""
    tricky = content + b"\r\n--B\r\n-\r" + content
    form = read(encoded(("purpose", b"fine-tune"), ("*file", tricky)), step=step, block=block)

    assert form.fields == {"purpose": "fine-tune"}
    assert form.files == {"file": ("x.jsonl", tricky)}


@pytest.mark.parametrize("content", [b"", b"\r", b"\n", b"\r\n", b"x", b"--B", b"\r\n--BBx", b"\r" * 9])
def test_a_file_ends_where_it_ends(content: bytes) -> None:
    """Wherever the stream is split, no byte of the delimiter gets into the file and none of the file is lost."""
    raw = encoded(("*file", content), ("purpose", b"fine-tune"))

    for step in range(1, len(raw) + 1):
        assert read(raw, step=step).files["file"][1] == content


def test_fields_may_follow_the_file() -> None:
    """curl sends parts in the order of its arguments."""
    form = read(encoded(("*file", b"a"), ("purpose", b"fine-tune")))

    assert (form.fields["purpose"], form.files["file"][1]) == ("fine-tune", b"a")


def test_what_the_receiver_leaves_is_skipped() -> None:
    """A receiver that stops early does not confuse the parts after it."""
    form: Form[bytes] = Form()
    read_form(
        Trickle(encoded(("*file", b"abc" * 1000), ("after", b"1")), 10), "BB", lambda stream: stream.read(2), form
    )

    assert form.fields == {"after": "1"}


@pytest.mark.parametrize("parts", [[("a", b"1"), ("a", b"2")], [("*a", b"1"), ("a", b"2")], [("", b"1")]])
def test_ambiguous_parts_are_refused(parts: list[tuple[str, bytes]]) -> None:
    """Which of two parts with one name counts is not guessed."""
    with pytest.raises(InvalidRequest):
        read(encoded(*parts))


def test_a_field_has_a_limit_and_is_utf_8() -> None:
    """Only the file may be large."""
    with pytest.raises(InvalidRequest, match="longer than"):
        read(encoded(("purpose", b"x" * 70_000)))
    with pytest.raises(InvalidRequest, match="UTF-8"):
        read(encoded(("purpose", b"\xff")))


def test_the_number_of_parts_has_a_limit() -> None:
    """Many small parts are refused before they cost anything."""
    with pytest.raises(RequestEntityTooLarge):
        read(encoded(*((f"f{n}", b"") for n in range(100))))


def test_what_was_received_before_an_error_is_known() -> None:
    """So that the caller can remove it."""
    form: Form[bytes] = Form()
    raw = encoded(("*file", b"abc"), ("*file", b"def"))

    with pytest.raises(InvalidRequest):
        read_form(Trickle(raw, 100), "BB", lambda stream: stream.read(100), form)
    assert form.files == {"file": ("x.jsonl", b"abc")}
