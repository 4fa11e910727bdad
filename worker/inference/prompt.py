"""A request's input as token ids, and how many tokens its answer may have."""

import copy
import threading
from dataclasses import dataclass
from typing import Any, Final

from shared.errors import InvalidRequest
from shared.specs import GenerationRequest
from worker.base_model import BaseModel
from worker.encoding import ChatEncoder, encode_prompt
from worker.inference.grammar import Grammar, GrammarCompiler
from worker.inference.tokens import TokenTable

DEFAULT_MAX_TOKENS: Final = 1024
"""What a request gets that names no `max_tokens`, if the context has so much left."""


@dataclass(frozen=True)
class Prompt:
    """Token ids to read and the most tokens to generate, which together fit the context.

    `echo` is told before the answer, and `grammar` says what the answer may be.
    """

    ids: list[int]
    max_new_tokens: int
    echo: str = ""
    grammar: Grammar | None = None


class PromptReader:
    """Reads requests as prompts of one base model, and refuses those that it cannot answer. Any thread may ask.

    It encodes on its own copy of the tokenizer, one thread at a time, since a fast tokenizer must not be set up by one
    thread while another uses it.
    """

    def __init__(self, base: BaseModel) -> None:
        self._name = base.name
        self._context_length = base.context_length
        model: Any = base.model
        self._vocabulary_size = int(model.get_input_embeddings().num_embeddings)
        self._table = TokenTable.of(base.tokenizer)
        self._grammars = GrammarCompiler(
            self._table, vocabulary_size=self._vocabulary_size, eos_token_ids=base.eos_token_ids
        )
        self._tokenizer = copy.deepcopy(base.tokenizer)
        self._chat = ChatEncoder(self._tokenizer, base.eos_token_ids) if self._tokenizer.chat_template else None
        self._lock = threading.Lock()

    def read(self, request: GenerationRequest) -> Prompt:
        """The prompt of a request; raises InvalidRequest with the numbers where the context is too short for it."""
        _check(request)
        ids = self._ids(request)
        param = "prompt" if request.messages is None else "messages"
        if not ids:
            raise InvalidRequest("the prompt has no tokens", param=param)
        left = self._context_length - len(ids)
        if left < 1:
            raise self._too_long(f"the prompt has {len(ids)} and leaves no room for an answer", param)
        if request.max_tokens is not None and request.max_tokens > left:
            problem = f"the prompt has {len(ids)} and max_tokens asks for {request.max_tokens} more"
            raise self._too_long(problem, "max_tokens")
        max_new_tokens = min(left, DEFAULT_MAX_TOKENS) if request.max_tokens is None else request.max_tokens
        return Prompt(
            ids,
            max_new_tokens,
            echo=self._echo(request) if request.echo else "",
            grammar=None if request.response_format is None else self._grammars.compile(request.response_format),
        )

    def _ids(self, request: GenerationRequest) -> list[int]:
        if isinstance(request.prompt, list):
            return self._checked(request.prompt)
        if request.prompt is not None:
            with self._lock:
                return encode_prompt(self._tokenizer, request.prompt)
        assert request.messages is not None
        try:
            if self._chat is None:
                raise InvalidRequest(f"{self._name!r} has no chat template: send a prompt to /v1/completions instead")
            if not request.messages:
                raise InvalidRequest("there are no messages")
            with self._lock:
                return self._chat.encode(request.messages, add_generation_prompt=True).ids
        except InvalidRequest as error:
            raise InvalidRequest(error.message, param="messages", code=error.error_code) from error

    def _checked(self, ids: list[int]) -> list[int]:
        wrong = [f"{token_id} at {at}" for at, token_id in enumerate(ids) if not 0 <= token_id < self._vocabulary_size]
        if wrong:
            shown = ", ".join(wrong[:5]) + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            allowed = f"{self._name!r} has the token ids 0 to {self._vocabulary_size - 1}"
            raise InvalidRequest(f"{allowed}; the prompt has {shown}", param="prompt")
        return ids

    def _echo(self, request: GenerationRequest) -> str:
        """The prompt's text: as it was given, or every token of it spelled out."""
        if isinstance(request.prompt, str):
            return request.prompt
        assert request.prompt is not None
        return self._table.decode(request.prompt, skip_special_tokens=False)

    def _too_long(self, problem: str, param: str) -> InvalidRequest:
        message = f"{self._name!r} has a context of {self._context_length} tokens; {problem}"
        return InvalidRequest(message, param=param, code="context_length_exceeded")


def _check(request: GenerationRequest) -> None:
    """Raises InvalidRequest for wishes that contradict each other or that no answer could meet."""
    if not all(request.stop):
        raise InvalidRequest("a stop string is empty", param="stop")
    if request.echo and request.messages is not None:
        raise InvalidRequest("echo repeats a prompt; a conversation has none", param="echo")
    if request.echo and request.logprobs is not None:
        raise InvalidRequest(
            "echo and logprobs exclude each other: prompts have no log-probabilities here", param="echo"
        )
    if request.ignore_eos and request.response_format is not None:
        raise InvalidRequest(
            "ignore_eos and response_format exclude each other: JSON that is complete cannot go on", param="ignore_eos"
        )
