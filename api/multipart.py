"""multipart/form-data read as a stream: a file's bytes go where the caller sends them, never through a form parser's
temporary file. Fields may come before or after the file, as clients differ."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData

from shared.errors import InvalidRequest

_CHUNK_BYTES = 64 << 10
_BUFFER_BYTES = 1 << 20
_FIELD_BYTES = 64 << 10
_PARTS = 64


T = TypeVar("T")


class Readable(Protocol):
    def read(self, size: int = ..., /) -> bytes: ...


@dataclass
class Form(Generic[T]):
    """The fields as text, and for each file part its filename and what `receive` made of its bytes."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, tuple[str, T]] = field(default_factory=dict)


def read_form(stream: Readable, boundary: str, receive: Callable[[Readable], T], form: Form[T]) -> None:
    """Fill `form` from `stream`. `form` is the caller's, so that after an error it still says what was received."""
    parts = _Parts(stream, boundary)
    while (head := parts.next_part()) is not None:
        if not head.name or head.name in form.fields or head.name in form.files:
            raise InvalidRequest(f"The form part {head.name!r} is given twice or has no name.", param=head.name or None)
        if isinstance(head, File):
            received = receive(parts)
            form.files[head.name] = (head.filename, received)
            parts.skip_part()
        else:
            form.fields[head.name] = parts.read_field(head.name)


class _Parts:
    """One part after the other; `read` gives the bytes of the current one."""

    def __init__(self, stream: Readable, boundary: str) -> None:
        self._stream = stream
        self._decoder = MultipartDecoder(boundary.encode("latin-1", "replace"), _BUFFER_BYTES, max_parts=_PARTS)
        self._delimiter_bytes = len(boundary) + len(b"\r\n----\r\n")
        self._held = b""
        self._left = b""
        self._in_part = False

    def next_part(self) -> Field | File | None:
        self.skip_part()
        while not isinstance(event := self._event(), Epilogue):
            if isinstance(event, Field | File):
                self._in_part = True
                return event
        return None

    def read(self, size: int = -1, /) -> bytes:
        """At least one byte and at most `size` of the current part, b'' at its end; all of it for a negative size."""
        if size < 0:
            return b"".join(iter(lambda: self.read(_CHUNK_BYTES), b""))
        while not self._left and self._in_part:
            event = self._event()
            if isinstance(event, Data):
                self._left, self._in_part = event.data, event.more_data
        piece, self._left = self._left[:size], self._left[size:]
        return piece

    def skip_part(self) -> None:
        while self.read(_CHUNK_BYTES):
            pass

    def read_field(self, name: str) -> str:
        raw = b""
        while piece := self.read(_CHUNK_BYTES):
            raw += piece
            if len(raw) > _FIELD_BYTES:
                raise InvalidRequest(f"The form field {name!r} is longer than {_FIELD_BYTES} bytes.", param=name)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise InvalidRequest(f"The form field {name!r} is not UTF-8.", param=name) from None

    def _event(self) -> object:
        try:
            while isinstance(event := self._decoder.next_event(), NeedData):
                self._decoder.receive_data(self._more())
        except ValueError as error:
            raise InvalidRequest(f"The form is not valid multipart/form-data: {error}.") from None
        return event

    def _more(self) -> bytes | None:
        """The next bytes for the decoder, None at the end. A line that may be a delimiter is held until it is whole.

        Werkzeug 3.1's decoder takes the CR before a delimiter for data if it sees the delimiter without its end, and
        the file would have one byte too many.
        """
        while piece := self._stream.read(_CHUNK_BYTES):
            ready, self._held = self._held + piece, b""
            tail = max(0, len(ready) - self._delimiter_bytes)
            breaks = [at for at in (ready.find(b"\r", tail), ready.find(b"\n", tail)) if at >= 0]
            if breaks:
                ready, self._held = ready[: min(breaks)], ready[min(breaks) :]
            if ready:
                return ready
        rest, self._held = self._held, b""
        return rest or None
