"""Bodies of /v1/completions and /v1/chat/completions: what is asked.

OpenAI's parameters that mean something else here than their neutral value are refused by name, never ignored.
"""

import json
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from api.schemas.wire import In, ModelName
from shared import limits
from shared.errors import InvalidRequest
from shared.specs import Message

MAX_SEED = (1 << 63) - 1


class Only:
    """Accepts null and the given values of a parameter that is not implemented."""

    def __init__(self, *neutral: object) -> None:
        self.neutral = (None, *neutral)

    def __get_pydantic_core_schema__(self, _source: object, _handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, _handler: GetJsonSchemaHandler) -> dict[str, object]:
        return {"enum": [*self.neutral], "description": "Not implemented; accepted at its neutral value."}

    def _check(self, value: object) -> object:
        if not any(type(value) is type(one) and value == one for one in self.neutral):
            shown = " or ".join(json.dumps(one) for one in self.neutral)
            raise PydanticCustomError("unsupported", "is not supported but as {shown}", {"shown": shown})
        return value


Zero = Annotated[object, Only(0, 0.0)]
One = Annotated[object, Only(1)]
No = Annotated[object, Only(False)]
NoneAtAll = Annotated[object, Only([])]
EmptyMap = Annotated[object, Only({})]
Nothing = Annotated[object, Only()]
StopString = Annotated[str, Field(min_length=1, max_length=limits.MAX_STOP_CHARS)]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


class StreamOptions(In):
    include_usage: bool | None = None
    include_obfuscation: No = None


class Sampling(In):
    """What chat and raw completions share. `top_k` 0 means no limit; `user` and its heirs are labels, ignored."""

    model: ModelName
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stop: Annotated[list[StopString], Field(max_length=limits.MAX_STOP_STRINGS), BeforeValidator(_listed)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: One = None
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: EmptyMap = None
    user: str | None = None

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> "Sampling":
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("'stream_options' needs 'stream': true.", param="stream_options")
        return self

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(In):
    type: Literal["text"]
    text: str


class ChatMessage(In):
    """One turn. `developer` means system. An answer can be sent back as it came: its null fields are accepted."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: Nothing = None
    refusal: Nothing = None
    annotations: NoneAtAll = None
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: NoneAtAll = None

    def as_message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class ChatRequest(Sampling):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """OpenAI's newer name of max_tokens."""
    logprobs: No = None
    top_logprobs: Zero = None
    response_format: Annotated[object, Only({"type": "text"})] = None
    modalities: Annotated[object, Only(["text"])] = None
    tools: NoneAtAll = None
    tool_choice: Annotated[object, Only("none", "auto")] = None
    parallel_tool_calls: bool | None = None
    store: No = None
    metadata: EmptyMap = None
    service_tier: Annotated[object, Only("auto", "default")] = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _one_limit(self) -> "ChatRequest":
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest("Give 'max_completion_tokens' or 'max_tokens', not both.", param="max_tokens")
        return self


class CompletionRequest(Sampling):
    """`prompt` is raw text: it may hold special tokens. `max_tokens` defaults to 16, as with OpenAI."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]
    best_of: One = None
    echo: No = None
    logprobs: Nothing = None
    suffix: Nothing = None

    @property
    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]
