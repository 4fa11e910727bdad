"""Generation with a base model, an adapter or a mix of adapters, in OpenAI's two dialects.

`lora_mix` adds up several adapters of one base model, each by its weight; `model` is then that base model, or the first
of them again. Each of `n` choices draws for itself; in a stream their chunks are mixed and tell their `index`. `top_k`
0 means no limit. `min_p` drops tokens less likely than that share of the likeliest. A `repetition_penalty` above 1
makes tokens of the prompt and the answer less likely to come again; the other two penalties are OpenAI's. `ignore_eos`
goes on to `max_tokens`. `user` and its heirs are labels, ignored. OpenAI's parameters that are not implemented are
refused by name unless they are at their neutral value. A client that hangs up cancels its request.
"""

from collections import defaultdict
from functools import partial

from flask import Response

from api import generation, logprobs, sse
from api.call import Call
from api.endpoint import endpoint
from api.generation import Choice, Generation, Piece
from api.logprobs import Places
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

_STREAMED = {sse.CONTENT_TYPE: "chunks as they come when `stream` is true, then `[DONE]`"}


@endpoint("POST /v1/chat/completions", scope="generate", body_bytes=limits.INFERENCE_BODY_BYTES, media=_STREAMED)
def chat(call: Call, body: ChatRequest) -> ChatCompletion | Response:
    """Answer a conversation, through the base model's own chat template."""
    answer = generation.begin(
        call,
        body,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        num_logprobs=body.num_logprobs,
        messages=[message.as_message() for message in body.messages],
    )
    return answer.stream(partial(_chat_chunk, answer), with_usage=body.wants_usage) if body.stream else _chat(answer)


@endpoint("POST /v1/completions", scope="generate", body_bytes=limits.INFERENCE_BODY_BYTES, media=_STREAMED)
def complete(call: Call, body: CompletionRequest) -> Completion | Response:
    """Continue a raw prompt."""
    answer = generation.begin(
        call, body, max_tokens=body.length, num_logprobs=body.logprobs, prompt=body.prompt, echo=bool(body.echo)
    )
    say = partial(_text_chunk, answer, defaultdict(Places))
    return answer.stream(say, with_usage=body.wants_usage) if body.stream else _text(answer)


def _chat(answer: Generation) -> ChatCompletion:
    choices, usage = answer.whole()
    return ChatCompletion(
        id=f"chatcmpl-{answer.hex_id}",
        created=answer.created,
        model=answer.model_id,
        system_fingerprint=answer.fingerprint,
        choices=[_chat_choice(choice) for choice in choices],
        usage=UsageView.of(usage),
    )


def _chat_choice(choice: Choice) -> ChatChoice:
    return ChatChoice(
        index=choice.index,
        message=AssistantMessage(content=choice.text),
        finish_reason=choice.finish_reason,
        logprobs=logprobs.in_chat(choice.tokens),
    )


def _chat_chunk(answer: Generation, piece: Piece) -> ChatCompletionChunk:
    delta = Delta(role="assistant", content="") if piece.is_first else Delta(content=piece.text or None)
    choice = ChatChunkChoice(
        index=piece.index,
        delta=delta,
        finish_reason=piece.finish_reason,
        logprobs=logprobs.in_chat(piece.tokens),
    )
    return ChatCompletionChunk(
        id=f"chatcmpl-{answer.hex_id}",
        created=answer.created,
        model=answer.model_id,
        system_fingerprint=answer.fingerprint,
        choices=[] if piece.usage else [choice],
        usage=UsageView.of(piece.usage) if piece.usage else None,
    )


def _text(answer: Generation) -> Completion:
    choices, usage = answer.whole()
    return Completion(
        id=f"cmpl-{answer.hex_id}",
        created=answer.created,
        model=answer.model_id,
        system_fingerprint=answer.fingerprint,
        choices=[_text_choice(choice) for choice in choices],
        usage=UsageView.of(usage),
    )


def _text_choice(choice: Choice) -> TextChoice:
    return TextChoice(
        index=choice.index,
        text=choice.text,
        finish_reason=choice.finish_reason,
        logprobs=logprobs.in_text(choice.tokens, Places()),
    )


def _text_chunk(answer: Generation, places: defaultdict[int, Places], piece: Piece) -> CompletionChunk:
    choice = TextChunkChoice(
        index=piece.index,
        text=piece.text,
        finish_reason=piece.finish_reason,
        logprobs=logprobs.in_text(piece.tokens, places[piece.index]),
    )
    return CompletionChunk(
        id=f"cmpl-{answer.hex_id}",
        created=answer.created,
        model=answer.model_id,
        system_fingerprint=answer.fingerprint,
        choices=[] if piece.usage else [choice],
        usage=UsageView.of(piece.usage) if piece.usage else None,
    )
