"""Bodies of /v1/completions and /v1/chat/completions: what is answered."""

from typing import Literal

from pydantic import model_serializer

from api.schemas.wire import Out
from shared import specs

FinishReason = Literal["stop", "length"]


class UsageView(Out):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, usage: specs.Usage) -> "UsageView":
        total = usage.prompt_tokens + usage.completion_tokens
        return cls(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens, total_tokens=total)


class Answered(Out):
    """`model` is the base model's name, or `name@version` of the adapter that spoke; `system_fingerprint` is a digest
    over the weights of both."""

    id: str
    created: int
    model: str
    system_fingerprint: str | None


class AssistantMessage(Out):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Out):
    index: int = 0
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: None = None


class ChatCompletion(Answered):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: UsageView


class Delta(Out):
    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _what_is_new(self) -> dict[str, str]:
        """Clients join deltas, so a delta holds only what it adds."""
        return {name: value for name, value in self if value is not None}


class ChatChunkChoice(Out):
    index: int = 0
    delta: Delta
    finish_reason: FinishReason | None = None
    logprobs: None = None


class ChatCompletionChunk(Answered):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: UsageView | None = None


class TextChoice(Out):
    index: int = 0
    text: str
    finish_reason: FinishReason
    logprobs: None = None


class Completion(Answered):
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: UsageView


class TextChunkChoice(Out):
    index: int = 0
    text: str
    finish_reason: FinishReason | None
    logprobs: None = None


class CompletionChunk(Answered):
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChunkChoice]
    usage: UsageView | None = None
