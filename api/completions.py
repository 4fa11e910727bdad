"""/v1/chat/completions and /v1/completions: generation with a base model or any adapter, in OpenAI's two dialects."""

from functools import partial

from flask import Response

from api import generation, sse
from api.call import Call
from api.endpoint import endpoint
from api.generation import Generation, Piece
from api.schemas.completion_views import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    Delta,
    TextChoice,
    TextChunkChoice,
    UsageView,
)
from api.schemas.completions import ChatRequest, CompletionRequest
from shared import limits

_OPENAI_DEFAULT_MAX_TOKENS = 16
_STREAMED = {sse.CONTENT_TYPE: "chunks as they come when `stream` is true, then `[DONE]`"}


@endpoint("POST /v1/chat/completions", scope="generate", body_bytes=limits.INFERENCE_BODY_BYTES, media=_STREAMED)
def chat(call: Call, body: ChatRequest) -> ChatCompletion | Response:
    """Answer a conversation, through the base model's own chat template."""
    messages = [message.as_message() for message in body.messages]
    answer = generation.begin(call, body, max_tokens=body.max_completion_tokens or body.max_tokens, messages=messages)
    return answer.stream(partial(_chat_chunk, answer), with_usage=body.wants_usage) if body.stream else _chat(answer)


@endpoint("POST /v1/completions", scope="generate", body_bytes=limits.INFERENCE_BODY_BYTES, media=_STREAMED)
def complete(call: Call, body: CompletionRequest) -> Completion | Response:
    """Continue a raw prompt."""
    max_tokens = body.max_tokens or _OPENAI_DEFAULT_MAX_TOKENS
    answer = generation.begin(call, body, max_tokens=max_tokens, prompt=body.text)
    return answer.stream(partial(_text_chunk, answer), with_usage=body.wants_usage) if body.stream else _text(answer)


def _chat(answer: Generation) -> ChatCompletion:
    text, finish_reason, usage, fingerprint = answer.whole()
    return ChatCompletion(
        id=f"chatcmpl-{answer.hex_id}",
        created=answer.created,
        model=answer.model_id,
        system_fingerprint=fingerprint,
        choices=[ChatChoice(message=AssistantMessage(content=text), finish_reason=finish_reason)],
        usage=UsageView.of(usage),
    )


def _chat_chunk(answer: Generation, piece: Piece) -> ChatCompletionChunk:
    delta = Delta(role="assistant", content="") if piece.is_first else Delta(content=piece.text or None)
    return ChatCompletionChunk(
        id=f"chatcmpl-{answer.hex_id}",
        created=answer.created,
        model=answer.model_id,
        system_fingerprint=answer.fingerprint,
        choices=[] if piece.usage else [ChatChunkChoice(delta=delta, finish_reason=piece.finish_reason)],
        usage=UsageView.of(piece.usage) if piece.usage else None,
    )


def _text(answer: Generation) -> Completion:
    text, finish_reason, usage, fingerprint = answer.whole()
    return Completion(
        id=f"cmpl-{answer.hex_id}",
        created=answer.created,
        model=answer.model_id,
        system_fingerprint=fingerprint,
        choices=[TextChoice(text=text, finish_reason=finish_reason)],
        usage=UsageView.of(usage),
    )


def _text_chunk(answer: Generation, piece: Piece) -> CompletionChunk:
    return CompletionChunk(
        id=f"cmpl-{answer.hex_id}",
        created=answer.created,
        model=answer.model_id,
        system_fingerprint=answer.fingerprint,
        choices=[] if piece.usage else [TextChunkChoice(text=piece.text, finish_reason=piece.finish_reason)],
        usage=UsageView.of(piece.usage) if piece.usage else None,
    )
