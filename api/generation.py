"""One answer on its way from a generator to a client, whole or as a stream."""

import itertools
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from flask import Response
from pydantic import BaseModel

from api import errors, sse
from api.call import Call
from api.schemas.completions import Sampling
from shared import ids, limits
from shared.errors import InvalidRequest, LoradError, Unavailable
from shared.specs import AdapterShare, Chunk, GenerationRequest, Message, Usage
from shared.store.models import resolve_model
from shared.tables import BaseModelRow


class Piece(NamedTuple):
    """Part of a streamed answer, in no dialect yet."""

    text: str = ""
    finish_reason: Literal["stop", "length"] | None = None
    is_first: bool = False
    usage: Usage | None = None


class Whole(NamedTuple):
    """A finished answer, in no dialect yet."""

    text: str
    finish_reason: Literal["stop", "length"]
    usage: Usage
    fingerprint: str | None


@dataclass
class Generation:
    """An answer whose first chunk has come. `hex_id` names it; `model_id` says which weights speak."""

    hex_id: str
    model_id: str
    created: int
    fingerprint: str | None
    chunks: Iterator[Chunk]
    cancel: Callable[[], None]

    def whole(self) -> Whole:
        """Wait for the end; raises what the generator reports."""
        texts: list[str] = []
        try:
            for chunk in self.chunks:
                texts.append(_checked(chunk).text)
                if chunk.finish_reason is not None and chunk.usage is not None:
                    return Whole(
                        "".join(texts), chunk.finish_reason, chunk.usage, chunk.fingerprint or self.fingerprint
                    )
        finally:
            self.cancel()
        raise Unavailable("The answer broke off.")

    def stream(self, say: Callable[[Piece], BaseModel], *, with_usage: bool) -> Response:
        """The answer as server-sent events, each piece put into words by `say`."""
        return sse.stream(self._events(say, with_usage), on_close=self.cancel)

    def _events(self, say: Callable[[Piece], BaseModel], with_usage: bool) -> Iterator[str]:
        try:
            for piece in self._pieces(with_usage):
                yield sse.event(say(piece).model_dump_json())
            yield sse.event("[DONE]")
        except LoradError as error:  # the status line is sent: the stream itself must say it
            yield sse.event(errors.body_for(error).model_dump_json())

    def _pieces(self, with_usage: bool) -> Iterator[Piece]:
        yield Piece(is_first=True)
        for chunk in self.chunks:
            _checked(chunk)
            if chunk.text:
                yield Piece(chunk.text)
            if chunk.finish_reason is not None:
                yield Piece(finish_reason=chunk.finish_reason)
                if with_usage and chunk.usage is not None:
                    yield Piece(usage=chunk.usage)
                return
        raise Unavailable("The answer broke off.")


def begin(
    call: Call,
    asked: Sampling,
    *,
    max_tokens: int | None,
    messages: list[Message] | None = None,
    prompt: str | None = None,
) -> Generation:
    """Send the request and wait for its first chunk, so that what is wrong with it has its own HTTP status."""
    with call.read() as tx:
        model = resolve_model(tx, call.tenant, asked.model)
    _check_length(max_tokens, model.base)
    request_id = ids.new_id(ids.REQUEST)
    chunks = cast(
        "Generator[Chunk]",
        call.queue.generate(
            GenerationRequest(
                request_id=request_id,
                base_model_id=model.base.id,
                tenant=call.tenant,
                adapters=[AdapterShare(version_id=model.version.id)] if model.version else [],
                messages=messages,
                prompt=prompt,
                max_tokens=max_tokens,
                temperature=1.0 if asked.temperature is None else asked.temperature,
                top_p=1.0 if asked.top_p is None else asked.top_p,
                top_k=asked.top_k or 0,
                seed=asked.seed,
                stop=list(asked.stop or []),
                deadline_unix_s=time.time() + limits.GENERATION_TIMEOUT_S,
            )
        ),
    )
    first = _first(chunks)
    return Generation(
        hex_id=request_id.removeprefix(ids.REQUEST),
        model_id=model.model_id,
        created=int(time.time()),
        fingerprint=first.fingerprint,
        chunks=itertools.chain([first], chunks),
        cancel=chunks.close,
    )


def _first(chunks: Generator[Chunk]) -> Chunk:
    try:
        return _checked(next(chunks))
    except StopIteration:
        raise Unavailable("No answer came.") from None
    except LoradError:
        chunks.close()
        raise


def _checked(chunk: Chunk) -> Chunk:
    if chunk.error is not None:
        raise errors.from_code(chunk.error.code, chunk.error.message, chunk.error.param)
    return chunk


def _check_length(max_tokens: int | None, base: BaseModelRow) -> None:
    context: int = base.config["context_length"]
    if max_tokens is not None and max_tokens > context:
        raise InvalidRequest(
            f"'max_tokens' may be at most {context}, the context of {base.name!r} (given: {max_tokens}).",
            param="max_tokens",
        )
