"""One answer on its way from a generator to a client, whole or as a stream."""

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

from flask import Response, request
from pydantic import BaseModel

from api import errors, hangup, sse
from api.call import Call
from api.mix import speaker
from api.schemas.completions import Sampling
from shared import ids, limits
from shared.errors import InvalidRequest, LoradError, Unavailable
from shared.specs import Chunk, GeneratedToken, GenerationRequest, Message, Usage
from shared.tables import BaseModelRow

FinishReason = Literal["stop", "length"]

_PASSED_ON = {
    "n", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
    "seed", "stop", "ignore_eos",
}  # fmt: skip
"""Parameters that the generator knows by the same name; what is null is the generator's default."""


@dataclass(frozen=True)
class Piece:
    """Part of one choice of a streamed answer, or the usage of all, in no dialect yet."""

    index: int = 0
    text: str = ""
    tokens: list[GeneratedToken] | None = None
    finish_reason: FinishReason | None = None
    is_first: bool = False
    usage: Usage | None = None


@dataclass(frozen=True)
class Choice:
    """One whole sequence, in no dialect yet. `tokens` only if log-probabilities were asked for."""

    index: int
    text: str
    tokens: list[GeneratedToken] | None
    finish_reason: FinishReason


class Whole(NamedTuple):
    """A finished answer: its choices by index."""

    choices: list[Choice]
    usage: Usage


@dataclass
class _Draft:
    """What is there of one choice."""

    texts: list[str] = field(default_factory=list)
    tokens: list[GeneratedToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, chunk: Chunk) -> None:
        self.texts.append(chunk.text)
        self.tokens += chunk.logprobs or []
        self.finish_reason = chunk.finish_reason or self.finish_reason


@dataclass
class Generation:
    """An answer whose first chunk has come. `hex_id` names it; `model_id` and `fingerprint` say which weights speak."""

    hex_id: str
    model_id: str
    created: int
    num_choices: int
    has_logprobs: bool
    fingerprint: str | None
    chunks: Iterator[Chunk]
    cancel: Callable[[], None]

    def whole(self) -> Whole:
        """Wait for the end of every choice; raises what the generator reports, and ClientGone."""
        drafts: dict[int, _Draft] = defaultdict(_Draft)
        try:
            for chunk in self._checked_chunks():
                drafts[chunk.index].add(chunk)
                if chunk.usage is not None:
                    return Whole([self._choice(index, drafts[index]) for index in range(self.num_choices)], chunk.usage)
        finally:
            self.cancel()
        raise _BrokeOff

    def stream(self, say: Callable[[Piece], BaseModel], *, with_usage: bool) -> Response:
        """The answer as server-sent events, each piece put into words by `say`."""
        return sse.stream(self._events(say, with_usage), on_close=self.cancel)

    def _choice(self, index: int, draft: _Draft) -> Choice:
        if draft.finish_reason is None:
            raise _BrokeOff
        return Choice(index, "".join(draft.texts), draft.tokens if self.has_logprobs else None, draft.finish_reason)

    def _events(self, say: Callable[[Piece], BaseModel], with_usage: bool) -> Iterator[str]:
        try:
            for piece in self._pieces(with_usage):
                yield sse.event(say(piece).model_dump_json())
            yield sse.event("[DONE]")
        except LoradError as error:  # the status line is sent: the stream itself must say it
            yield sse.event(errors.body_for(error).model_dump_json())

    def _pieces(self, with_usage: bool) -> Iterator[Piece]:
        begun: set[int] = set()
        for chunk in self._checked_chunks():
            if chunk.index not in begun:
                begun.add(chunk.index)
                yield Piece(chunk.index, is_first=True)
            if chunk.text or chunk.logprobs:
                yield Piece(chunk.index, chunk.text, chunk.logprobs)
            if chunk.finish_reason is not None:
                yield Piece(chunk.index, finish_reason=chunk.finish_reason)
            if chunk.usage is not None:
                if with_usage:
                    yield Piece(usage=chunk.usage)
                return
        raise _BrokeOff

    def _checked_chunks(self) -> Iterator[Chunk]:
        for chunk in self.chunks:
            self.fingerprint = _checked(chunk).fingerprint or self.fingerprint
            yield chunk


class _BrokeOff(Unavailable):
    """The answer broke off."""


def begin(
    call: Call,
    asked: Sampling,
    *,
    max_tokens: int | None,
    num_logprobs: int | None,
    messages: list[Message] | None = None,
    prompt: str | list[int] | None = None,
    echo: bool = False,
) -> Generation:
    """Send the request and wait for its first chunk, so that what is wrong with it has its own HTTP status."""
    with call.read() as tx:
        who = speaker(tx, call.tenant, asked)
    _check_fit(who.base, max_tokens, prompt)
    wanted = GenerationRequest(
        request_id=ids.new_id(ids.REQUEST),
        tenant=call.tenant,
        base_model_id=who.base.id,
        adapters=who.shares,
        messages=messages,
        prompt=prompt,
        max_tokens=max_tokens,
        echo=echo,
        logprobs=num_logprobs,
        response_format=asked.response_format.as_spec() if asked.response_format else None,
        whole=not asked.stream,
        deadline_unix_s=time.time() + limits.GENERATION_TIMEOUT_S,
        **asked.model_dump(include=_PASSED_ON, exclude_none=True),
    )
    chunks = cast("Generator[Chunk]", call.queue.generate(wanted, look_up=hangup.watch(request.environ)))
    first = _first(chunks)
    return Generation(
        hex_id=wanted.request_id.removeprefix(ids.REQUEST),
        model_id=who.model_id,
        created=int(time.time()),
        num_choices=wanted.n,
        has_logprobs=num_logprobs is not None,
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


def _check_fit(base: BaseModelRow, max_tokens: int | None, prompt: str | list[int] | None) -> None:
    """Refuse what this base model cannot have been asked for: more tokens than its context, tokens it has not."""
    context: int = base.config["context_length"]
    if max_tokens is not None and max_tokens > context:
        raise InvalidRequest(
            f"'max_tokens' may be at most {context}, the context of {base.name!r} (given: {max_tokens}).",
            param="max_tokens",
        )
    num_ids: int = base.config["vocab_size"]
    if isinstance(prompt, list) and max(prompt) >= num_ids:
        raise InvalidRequest(
            f"'prompt' holds the token id {max(prompt)}; those of {base.name!r} end at {num_ids - 1}.", param="prompt"
        )
