"""A request's input as token ids, and how many tokens its answer may have."""

import copy
import threading
from dataclasses import dataclass
from typing import Final

from shared.errors import InvalidRequest
from shared.specs import GenerationRequest
from worker.base_model import BaseModel
from worker.encoding import ChatEncoder, encode_prompt

DEFAULT_MAX_TOKENS: Final = 1024
"""What a request gets that names no `max_tokens`, if the context has so much left."""


@dataclass(frozen=True)
class Prompt:
    """Token ids to read and the most tokens to generate; together they fit the context."""

    ids: list[int]
    max_new_tokens: int


class PromptReader:
    """Reads requests as prompts of one base model. Any thread may ask; they take turns.

    It works on its own copy of the tokenizer: a fast tokenizer must not be set up by one thread while another uses it.
    """

    def __init__(self, base: BaseModel) -> None:
        self._name = base.name
        self._context_length = base.context_length
        self._tokenizer = copy.deepcopy(base.tokenizer)
        self._chat = ChatEncoder(self._tokenizer, base.eos_token_ids) if self._tokenizer.chat_template else None
        self._lock = threading.Lock()

    def read(self, request: GenerationRequest) -> Prompt:
        """The prompt of a request; raises InvalidRequest with the numbers where the context is too short for it."""
        if not all(request.stop):
            raise InvalidRequest("a stop string is empty", param="stop")
        with self._lock:
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
        return Prompt(ids, min(left, DEFAULT_MAX_TOKENS) if request.max_tokens is None else request.max_tokens)

    def _ids(self, request: GenerationRequest) -> list[int]:
        if request.messages is None:
            assert request.prompt is not None
            return encode_prompt(self._tokenizer, request.prompt)
        try:
            if self._chat is None:
                raise InvalidRequest(f"{self._name!r} has no chat template: send a prompt to /v1/completions instead")
            if not request.messages:
                raise InvalidRequest("there are no messages")
            return self._chat.encode(request.messages, add_generation_prompt=True).ids
        except InvalidRequest as error:
            raise InvalidRequest(error.message, param="messages", code=error.error_code) from error

    def _too_long(self, problem: str, param: str) -> InvalidRequest:
        message = f"{self._name!r} has a context of {self._context_length} tokens; {problem}"
        return InvalidRequest(message, param=param, code="context_length_exceeded")
