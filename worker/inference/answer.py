"""One request while it is being answered: what was read, what was generated, and whether that is the end."""

import hashlib
import time
from typing import Literal

from shared.specs import Chunk, GenerationRequest, Usage
from worker.inference.prompt import Prompt
from worker.inference.sampling import Sampler, Sampling
from worker.inference.stream import ChunkStream
from worker.inference.text import Detokeniser, StopScanner


class Answer:
    """Turns the tokens of one request into chunks on its stream. A token in `eos_token_ids` ends it.

    Belongs to the engine's thread once it is submitted.
    """

    def __init__(
        self,
        request: GenerationRequest,
        *,
        prompt: Prompt,
        stream: ChunkStream,
        detokeniser: Detokeniser,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.adapter = request.adapters[0].version_id if request.adapters else None
        self.prompt = prompt
        self.stream = stream
        self.deadline_unix_s = request.deadline_unix_s
        self.sampler = Sampler(
            Sampling(
                temperature=request.temperature, top_k=request.top_k, top_p=request.top_p, seed=request.seed
            )
        )  # fmt: skip
        self.token_ids: list[int] = []
        self._scanner = StopScanner(request.stop)
        self._detokeniser = detokeniser
        self._eos_token_ids = eos_token_ids
        self._fingerprint = ""

    def begin(self, fingerprint: str) -> None:
        """It is known which weights answer."""
        self._fingerprint = fingerprint

    @property
    def is_late(self) -> bool:
        return time.time() >= self.deadline_unix_s

    def take(self, token_id: int) -> bool:
        """Write what the next token adds to the stream; True if it was the last.

        The token that ends an answer (EOS) counts as one but has no text.
        """
        self.token_ids.append(token_id)
        ended = token_id in self._eos_token_ids
        text = "" if ended else self._scanner.add(self._detokeniser.add(token_id))
        if ended or self._scanner.stopped:
            self._finish("stop", text)
        elif len(self.token_ids) == self.prompt.max_new_tokens:
            self._finish("length", text)
        else:
            is_first = len(self.token_ids) == 1
            if text or is_first:
                self.stream.write(Chunk(text=text, fingerprint=self._fingerprint if is_first else None))
            return False
        return True

    def _finish(self, reason: Literal["stop", "length"], text: str) -> None:
        if not self._scanner.stopped:
            text += self._scanner.add(self._detokeniser.finish()) + self._scanner.finish()
        usage = Usage(prompt_tokens=len(self.prompt.ids), completion_tokens=len(self.token_ids))
        self.stream.write(Chunk(text=text, finish_reason=reason, usage=usage, fingerprint=self._fingerprint))


def fingerprint(base_digest: str, adapter_digest: str | None) -> str:
    """A short name for the weights that made an answer: "fp_" and 16 hex digits over base and adapter digest."""
    made_of = f"{base_digest}\n{adapter_digest or ''}"
    return "fp_" + hashlib.sha256(made_of.encode()).hexdigest()[:16]
