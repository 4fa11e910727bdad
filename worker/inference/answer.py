"""One request while it is being answered, and its choices: what was generated, and whether that is the end."""

import hashlib
import logging
import time
from collections.abc import Sequence
from typing import Any, Literal

from shared.errors import GenerationTimeout, LoradError
from shared.specs import AdapterShare, Chunk, GeneratedToken, GenerationRequest, Usage
from worker.inference import logprobs
from worker.inference.cuts import Cuts
from worker.inference.penalties import Penalties
from worker.inference.prompt import Prompt
from worker.inference.sampling import Chosen, Sampler
from worker.inference.stream import ChunkStream
from worker.inference.text import Detokeniser, StopScanner
from worker.inference.tokens import TokenTable

log = logging.getLogger("lorad.inference")


class Answer:
    """The `n` choices of one request. A token in `eos_token_ids` ends a choice, unless the request ignores that.

    Made by the thread that submits; belongs to the engine's thread from then on.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        prompt: Prompt,
        stream: ChunkStream,
        tokenizer: Any,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.request = request
        self.prompt = prompt
        self.stream = stream
        table = TokenTable.of(tokenizer)
        self.choices = [Choice(self, index, table=table, eos_token_ids=eos_token_ids) for index in range(request.n)]
        self._is_over = False

    @property
    def is_gone(self) -> bool:
        """True if nobody waits any more: all told, failed, cancelled, or past the deadline, which is then told."""
        if not self._is_over and not self.stream.is_cancelled and time.time() >= self.request.deadline_unix_s:
            self.fail(GenerationTimeout())
        return self._is_over or self.stream.is_cancelled

    def fail(self, error: Exception) -> None:
        """End with an error, if it has not ended; what is no domain error is logged, since the stream hides it."""
        if self._is_over:
            return
        self._is_over = True
        if not isinstance(error, LoradError):
            log.error("a generation request failed", exc_info=error)
        self.stream.fail(error)

    def close(self) -> Usage | None:
        """A choice has ended: what all have used together, if it was the last; else None."""
        if not all(choice.has_ended for choice in self.choices):
            return None
        self._is_over = True
        completion_tokens = sum(len(choice.token_ids) for choice in self.choices)
        return Usage(prompt_tokens=len(self.prompt.ids), completion_tokens=completion_tokens)


class Choice:
    """One of the sequences that answer a request: turns its tokens into chunks on the request's stream.

    `token_ids` is what was generated so far; the token that ends it (EOS) counts but has no text.
    """

    def __init__(self, answer: Answer, index: int, *, table: TokenTable, eos_token_ids: frozenset[int]) -> None:
        request = answer.request
        self.request = request
        self.index = index
        self.prompt = answer.prompt
        self.stream = answer.stream
        self.adapters: tuple[AdapterShare, ...] = tuple(request.adapters)
        self.token_ids: list[int] = []
        self.has_ended = False
        self.sampler = _sampler(request, answer.prompt, index)
        self._answer = answer
        self._table = table
        self._eos_token_ids = eos_token_ids
        self._detokeniser = Detokeniser(table, answer.prompt.ids)
        self._scanner = StopScanner(request.stop)
        self._untold: list[GeneratedToken] = []
        self._fingerprint = ""

    @property
    def is_gone(self) -> bool:
        """True if nobody waits for more of it: it has ended, or its answer is gone."""
        return self.has_ended or self._answer.is_gone

    def begin(self, fingerprint: str) -> None:
        """It is known which weights answer."""
        self._fingerprint = fingerprint

    def fail(self, error: Exception) -> None:
        """End the whole answer, all its choices, with an error."""
        self._answer.fail(error)

    def take(self, chosen: Chosen) -> bool:
        """Write what the next token adds to the stream; True if it was the last."""
        token_id = chosen.token_id
        self.token_ids.append(token_id)
        if chosen.logprob is not None:
            self._untold.append(logprobs.told(self._table, token_id, chosen.logprob, chosen.top))
        is_eos = token_id in self._eos_token_ids
        ends = is_eos and not self.request.ignore_eos
        if not ends:
            self.sampler.add(token_id)
        text = "" if is_eos else self._scanner.add(self._detokeniser.add(token_id))
        if ends or self._scanner.stopped or self.sampler.is_complete:
            self._finish("stop", text)
        elif len(self.token_ids) == self.prompt.max_new_tokens:
            self._finish("length", text)
        elif text or len(self.token_ids) == 1:
            self._write(text)
        return self.has_ended

    def _finish(self, reason: Literal["stop", "length"], text: str) -> None:
        if not self._scanner.stopped:
            text += self._scanner.add(self._detokeniser.finish()) + self._scanner.finish()
        self.has_ended = True
        self._write(text, reason)

    def _write(self, text: str, reason: Literal["stop", "length"] | None = None) -> None:
        """One chunk with all that was not told yet; the first has the prompt in front where it is echoed."""
        is_first, untold = len(self.token_ids) == 1, self._untold
        self._untold = []
        self.stream.write(
            Chunk(
                index=self.index,
                text=self.prompt.echo + text if is_first else text,
                logprobs=untold if self.request.logprobs is not None else None,
                finish_reason=reason,
                usage=None if reason is None else self._answer.close(),
                fingerprint=self._fingerprint if is_first or reason is not None else None,
            )
        )


def _sampler(request: GenerationRequest, prompt: Prompt, index: int) -> Sampler:
    """Choice number `index` draws with the seed `index` above the request's."""
    return Sampler(
        Cuts(temperature=request.temperature, top_k=request.top_k, top_p=request.top_p, min_p=request.min_p),
        seed=None if request.seed is None else request.seed + index,
        penalties=Penalties(
            prompt.ids,
            repetition=request.repetition_penalty,
            frequency=request.frequency_penalty,
            presence=request.presence_penalty,
        ),
        constraint=None if prompt.grammar is None else prompt.grammar.start(),
        num_top=request.logprobs,
    )


def fingerprint(base_digest: str, adapters: Sequence[tuple[str, float]]) -> str:
    """A short name for the weights that made an answer: "fp_" and 16 hex digits over the digests of the base and of
    each adapter with its weight, in any order."""
    made_of = [base_digest, *sorted(f"{digest} {float(weight)!r}" for digest, weight in adapters)]
    return "fp_" + hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]
