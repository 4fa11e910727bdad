"""Bodies of /v1/completions and /v1/chat/completions: what is asked.

OpenAI's parameters that mean something else here than their neutral value are refused by name, never ignored.
"""

import json
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, JsonValue, model_validator
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from api.schemas.wire import In, ModelName
from shared import limits, specs
from shared.errors import InvalidRequest
from shared.specs import Message

MAX_SEED = (1 << 63) - 1
_OPENAI_DEFAULT_MAX_TOKENS = 16


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


No = Annotated[object, Only(False)]
NoneAtAll = Annotated[object, Only([])]
EmptyMap = Annotated[object, Only({})]
Nothing = Annotated[object, Only()]
StopString = Annotated[str, Field(min_length=1, max_length=limits.MAX_STOP_CHARS)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
NumLogprobs = Annotated[int, Field(ge=0, le=limits.MAX_TOP_LOGPROBS)]


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _only_one(value: object) -> object:
    """The prompt of a list of prompts."""
    if not isinstance(value, list) or not value or not all(isinstance(one, str | list) for one in value):
        return value
    if len(value) > 1:
        raise PydanticCustomError(
            "several_prompts", "holds {count} prompts: send one request for each", {"count": len(value)}
        )
    return value[0]


class StreamOptions(In):
    include_usage: bool | None = None
    include_obfuscation: No = None


class JsonSchemaFormat(In):
    """`schema` is a JSON Schema; `name` and `description` are labels. It always holds, whatever `strict` says."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    json_schema: Annotated[dict[str, JsonValue], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(In):
    """What the text of an answer is: anything, any JSON object, or JSON that a schema accepts.

    An answer that reaches `max_tokens` ends where it stands, as its `finish_reason` says.
    """

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_iff_asked(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise InvalidRequest(
                "'response_format.json_schema' is given with the type \"json_schema\", and only with it.",
                param="response_format.json_schema",
            )
        return self

    def as_spec(self) -> specs.ResponseFormat | None:
        """None stands for plain text."""
        if self.type == "text":
            return None
        schema = None if self.json_schema is None else self.json_schema.json_schema
        return specs.ResponseFormat(type=self.type, json_schema=schema)


class MixPart(In):
    """One adapter of a mix. Its update counts `weight` times: 1 is the adapter as it was trained."""

    model: ModelName
    weight: Annotated[float, Field(ge=-limits.MAX_MIX_WEIGHT, le=limits.MAX_MIX_WEIGHT)] = 1.0


class Sampling(In):
    """What chat and raw completions share; the module of the endpoints says what it means."""

    model: ModelName
    lora_mix: Annotated[list[MixPart], Field(min_length=2, max_length=limits.MAX_MIX)] | None = None
    n: Annotated[int, Field(ge=1, le=limits.MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1_000_000)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stop: Annotated[list[StopString], Field(max_length=limits.MAX_STOP_STRINGS), BeforeValidator(_listed)] | None = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
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
    """`top_logprobs` are the likeliest tokens at each place of the answer, and need `logprobs`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    """OpenAI's newer name of max_tokens."""
    logprobs: bool | None = None
    top_logprobs: NumLogprobs | None = None
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
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampling):
    """`prompt` is raw text, which may hold special tokens, or token ids; a list of one prompt is that prompt.

    `max_tokens` defaults to 16, as with OpenAI. `echo` begins each answer with the prompt. `logprobs` asks for so many
    of the likeliest tokens at each place, beside the one that was chosen; those of an echoed prompt are not to be had.
    """

    prompt: Annotated[str | Annotated[list[TokenId], Field(min_length=1)], BeforeValidator(_only_one)]
    best_of: Annotated[int, Field(ge=1, le=limits.MAX_CHOICES)] | None = None
    echo: bool | None = None
    logprobs: NumLogprobs | None = None
    suffix: Nothing = None

    @model_validator(mode="after")
    def _possible(self) -> "CompletionRequest":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequest("All answers are returned: 'best_of' must be equal to 'n'.", param="best_of")
        if self.echo and self.logprobs is not None:
            raise InvalidRequest("'logprobs' cannot be had with 'echo'.", param="logprobs")
        return self

    @property
    def length(self) -> int:
        """The longest answer, in tokens."""
        return self.max_tokens or _OPENAI_DEFAULT_MAX_TOKENS
