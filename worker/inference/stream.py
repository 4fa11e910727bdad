"""What a caller of the engine holds: the chunks of one answer as they come, and a way to say that nobody listens."""

import queue
import threading
from collections.abc import Callable, Iterator

from shared.errors import LoradError
from shared.specs import Chunk, ChunkError


class ChunkStream(Iterator[Chunk]):
    """The chunks of one answer, in order; iterating waits for the next. One thread reads, any thread may cancel."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._chunks: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()
        self._sink: Callable[[Chunk], None] = self._chunks.put
        self._lock = threading.Lock()
        self._wake = wake
        self._is_read = False
        self._is_written = False
        self._cancelled = False

    def __next__(self) -> Chunk:
        chunk = None if self._is_read else self._chunks.get()
        if chunk is None:
            self._is_read = True
            raise StopIteration
        self._is_read = chunk.is_last
        return chunk

    def forward(self, sink: Callable[[Chunk], None]) -> None:
        """Hand every chunk to `sink` as it comes, those first that wait already; nobody iterates then.

        `sink` runs in the thread of whoever writes, so it must be quick.
        """
        with self._lock:
            while not self._chunks.empty():
                if (chunk := self._chunks.get()) is not None:
                    sink(chunk)
            self._sink = sink

    def cancel(self) -> None:
        """Stop generating; the row is free one step later. The stream ends without a last chunk, unless it had one."""
        self._cancelled = True
        self._chunks.put(None)
        self._wake()

    @property
    def is_cancelled(self) -> bool:
        return self._cancelled

    def write(self, chunk: Chunk) -> None:
        """For the engine: hand over one chunk; what comes after the last one is dropped."""
        with self._lock:
            if not self._is_written:
                self._is_written = chunk.is_last
                self._sink(chunk)

    def fail(self, error: Exception) -> None:
        """For the engine: end with an error chunk. Only domain errors are shown as they are."""
        if isinstance(error, LoradError):
            shown = ChunkError(code=error.error_code, message=error.message, param=error.param)
        else:
            shown = ChunkError(code="internal_error", message="The model failed on this request.")
        self.write(Chunk(error=shown))
