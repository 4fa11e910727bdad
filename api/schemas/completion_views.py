"""Bodies of /v1/completions and /v1/chat/completions: what is answered."""

from typing import Literal

from pydantic import model_serializer

from api.schemas.wire import Out
from shared import specs

FinishReason = Literal["stop", "length"]


class UsageView(Out):
    """Tokens of one request: the prompt's once, and those of all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, usage: specs.Usage) -> "UsageView":
        total = usage.prompt_tokens + usage.completion_tokens
        return cls(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens, total_tokens=total)


class Answered(Out):
    """`model` is the base model's name, or `name@version` of the adapter that spoke, or for a mix the base model and
    what was added to it: `base+math@3*0.7+poetry@1*-0.5`. `system_fingerprint` is a digest over all those weights."""

    id: str
    created: int
    model: str
    system_fingerprint: str | None


class LikelyToken(Out):
    """`logprob` is the natural logarithm of the token's probability, before temperature and cuts. `bytes` are what the
    token adds to the text: none for a special token, such as the one that ends an answer."""

    token: str
    logprob: float
    bytes: list[int]

    @classmethod
    def of(cls, token: specs.TokenLogprob) -> "LikelyToken":
        return cls(token=token.token, logprob=token.logprob, bytes=token.bytes)


class ChosenToken(LikelyToken):
    """A token of the answer, and the likeliest ones at its place, likeliest first."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(Out):
    content: list[ChosenToken]
    refusal: None = None


class TextLogprobs(Out):
    """One entry per token. `text_offset` counts the characters of the choice's whole text before the token, also in a
    stream. `top_logprobs` holds the chosen token too. A token that is only part of a character is written
    `bytes:\\xe2\\x82`."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class AssistantMessage(Out):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Out):
    index: int
    message: AssistantMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None


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
    index: int
    delta: Delta
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None


class ChatCompletionChunk(Answered):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: UsageView | None = None


class TextChoice(Out):
    index: int
    text: str
    finish_reason: FinishReason
    logprobs: TextLogprobs | None


class Completion(Answered):
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: UsageView


class TextChunkChoice(Out):
    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: TextLogprobs | None


class CompletionChunk(Answered):
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChunkChoice]
    usage: UsageView | None = None
