"""Values that cross a process border: what to train, what to generate, and the pieces of an answer.

All are frozen, validated on both sides, and refuse unknown fields; JSON in the database and on the broker is
`model_dump_json()` of these and is read back with `model_validate_json()`.
"""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from shared import limits


class Spec(BaseModel):
    # An error's text goes to logs, where nothing that a user wrote belongs.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


TargetPreset = Literal["attention", "mlp", "all-linear"]
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*$", max_length=200)]
LrSchedule = Literal["linear", "cosine", "constant"]
VersionId = Annotated[str, Field(pattern=r"^adv-[0-9a-f]{32}$")]


class LoraSpec(Spec):
    """Shape of one adapter. The update is s * B A with s = alpha / r, or alpha / sqrt(r) with `use_rslora`.

    The patterns give single modules another r or alpha: keys are module names, matched as targets are (exactly or as
    dotted suffix); the first that matches counts.
    """

    r: Annotated[int, Field(ge=1, le=limits.MAX_RANK)] = 8
    alpha: Annotated[float, Field(gt=0, le=limits.MAX_ALPHA)] = 16.0
    dropout: Annotated[float, Field(ge=0, le=limits.MAX_DROPOUT)] = 0.0
    target_modules: TargetPreset | Annotated[list[ModuleName], Field(min_length=1, max_length=64)] = [
        "q_proj",
        "v_proj",
    ]
    use_rslora: bool = False
    rank_pattern: Annotated[
        dict[ModuleName, Annotated[int, Field(ge=1, le=limits.MAX_RANK)]], Field(max_length=limits.MAX_PATTERNS)
    ] = {}
    alpha_pattern: Annotated[
        dict[ModuleName, Annotated[float, Field(gt=0, le=limits.MAX_ALPHA)]], Field(max_length=limits.MAX_PATTERNS)
    ] = {}


class TrainSpec(Spec):
    """How one adapter is trained; every value is resolved, nothing is 'auto' any more.

    One optimizer step sees `batch_size` samples. `max_steps` wins over `n_epochs`. Lengths are in tokens.
    B learns at `lora_plus_ratio` times the rate of A (LoRA+, Hayou et al. 2024, arXiv:2402.12354).

    `validation_split` is the share of the training file's samples that are held out; it excludes a validation file.
    Evaluations come every `eval_every` steps (None: after each epoch) and at the end. Training stops early after
    `early_stopping_patience` evaluations in a row without a lower validation loss, and after `max_seconds` of
    training, whatever attempts they were spent in. `publish` "best" publishes the adapter of the evaluation with the
    lowest loss. `init_from` is the id of the adapter version whose weights are the start; the optimizer starts fresh.
    """

    lora: LoraSpec = LoraSpec()
    seed: Annotated[int, Field(ge=0, le=limits.MAX_SEED)] = 0
    n_epochs: Annotated[int, Field(ge=1, le=limits.MAX_EPOCHS)] = 3
    batch_size: Annotated[int, Field(ge=1, le=limits.MAX_BATCH_SIZE)] = 8
    max_steps: Annotated[int, Field(ge=1, le=limits.MAX_STEPS)] | None = None
    learning_rate: Annotated[float, Field(gt=0, le=limits.MAX_LEARNING_RATE)] = 2e-4
    lr_schedule: LrSchedule = "linear"
    lora_plus_ratio: Annotated[float, Field(ge=1, le=limits.MAX_LORA_PLUS_RATIO)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0, le=limits.MAX_STEPS)] = 0
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0, le=1000)] = 1.0
    max_seq_len: Annotated[int, Field(ge=8, le=limits.MAX_SEQ_LEN)] = 1024
    train_on: Literal["completion", "all"] = "completion"
    checkpoint_every: Annotated[int, Field(ge=1, le=limits.MAX_STEPS)] | None = None
    max_seconds: Annotated[int, Field(ge=1, le=limits.MAX_SECONDS)] | None = None
    validation_split: Annotated[float, Field(gt=0, le=0.5)] | None = None
    eval_every: Annotated[int, Field(ge=1, le=limits.MAX_STEPS)] | None = None
    early_stopping_patience: Annotated[int, Field(ge=1, le=limits.MAX_STEPS)] | None = None
    publish: Literal["last", "best"] = "last"
    init_from: VersionId | None = None


class Order(StrEnum):
    """What the ledger tells a trainer about one of its jobs."""

    GO_ON = "go_on"
    CANCEL = "cancel"
    PAUSE = "pause"
    LOST = "lost"  # another owner has the job: stop at once, publish nothing


class StepReport(Spec):
    """One optimizer step of one job. `train_loss` is the mean over the step's label tokens, in nats."""

    step: int
    total_steps: int
    train_loss: float
    learning_rate: float
    grad_norm: float
    epoch: float
    num_tokens: int
    num_label_tokens: int
    tokens_per_second: float
    eta_seconds: float


class Message(Spec):
    """One chat turn; the content is plain text, whatever it holds."""

    role: Literal["system", "user", "assistant"]
    content: str


class AdapterShare(Spec):
    """One adapter version and how strongly it counts: 1 is the adapter as it was trained."""

    version_id: str
    weight: Annotated[float, Field(ge=-limits.MAX_MIX_WEIGHT, le=limits.MAX_MIX_WEIGHT)] = 1.0


class ResponseFormat(Spec):
    """What the text of an answer must be: any JSON object, or JSON that a JSON Schema accepts."""

    type: Literal["json_object", "json_schema"]
    json_schema: dict[str, JsonValue] | None = None

    @model_validator(mode="after")
    def _schema_iff_asked(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("a json_schema is given exactly with type json_schema")
        return self


class GenerationRequest(Spec):
    """The answers to make to one input: `n` choices. Exactly one of `messages` (chat) and `prompt` is set.

    A prompt is raw, may hold special tokens, and is text or token ids. `adapters` empty means the bare base model;
    several are one mix, the sum of their updates by weight. `logprobs` asks for the log-probability of each generated
    token and that many of the likeliest. `whole` says that nobody reads what follows the first piece before the end is
    there. `deadline_unix_s` is wall time after which nobody listens.
    """

    request_id: str
    tenant: str = "default"
    base_model_id: str
    adapters: Annotated[list[AdapterShare], Field(max_length=limits.MAX_MIX)] = []
    messages: list[Message] | None = None
    prompt: str | list[Annotated[int, Field(ge=0)]] | None = None
    n: Annotated[int, Field(ge=1, le=limits.MAX_CHOICES)] = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=2)] = 1.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    seed: int | None = None
    stop: Annotated[list[str], Field(max_length=limits.MAX_STOP_STRINGS)] = []
    ignore_eos: bool = False
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=limits.MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    whole: bool = False
    deadline_unix_s: float

    @model_validator(mode="after")
    def _one_input(self) -> "GenerationRequest":
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("exactly one of messages and prompt must be set")
        return self

    @model_validator(mode="after")
    def _each_adapter_once(self) -> "GenerationRequest":
        ids = [share.version_id for share in self.adapters]
        if len(set(ids)) != len(ids):
            raise ValueError(f"an adapter version is in the mix more than once: {', '.join(ids)}")
        return self


class Usage(Spec):
    """Tokens of one request; the completion's are those of all choices together."""

    prompt_tokens: int
    completion_tokens: int


class TokenLogprob(Spec):
    """A token as text and as bytes, and the natural logarithm of its probability before temperature and cuts."""

    token: str
    bytes: list[int]
    logprob: float


class GeneratedToken(TokenLogprob):
    """A token that was chosen, with the likeliest ones at its place, likeliest first."""

    top: list[TokenLogprob] = []


class ChunkError(Spec):
    code: str
    message: str
    param: str | None = None


class Chunk(Spec):
    """A piece of choice number `index` of an answer. The last piece of each choice has `finish_reason`.

    The last chunk of a request has `usage`, or `error`; no other has. The first chunk of a choice may have empty text:
    it says that the request was accepted and its prompt read. `logprobs` are of tokens not told before.
    `fingerprint` is a digest over base and adapter weights.
    """

    index: int = 0
    text: str = ""
    logprobs: list[GeneratedToken] | None = None
    finish_reason: Literal["stop", "length"] | None = None
    usage: Usage | None = None
    fingerprint: str | None = None
    error: ChunkError | None = None

    @property
    def is_last(self) -> bool:
        return self.usage is not None or self.error is not None


class InspectionRequest(Spec):
    """Ask what training would see: one tenant's files, as this base model and this spec tokenise them.

    `deadline_unix_s` is wall time after which nobody listens.
    """

    request_id: str
    tenant: str
    base_model_id: str
    training_file_id: str
    validation_file_id: str | None = None
    spec: TrainSpec
    deadline_unix_s: float


class Foreseen(Spec):
    """What training would see and need. `training` and `validation` are reports on the tokens of the two files.

    Tokens are those that are trained on, labels those of them that are learnt; in one epoch, and in all `total_steps`.
    `memory_bytes` estimates the most that a trainer with this job alone needs, the base model included.
    """

    training: dict[str, JsonValue]
    validation: dict[str, JsonValue] | None
    steps_per_epoch: int
    total_steps: int
    num_tokens_per_epoch: int
    num_label_tokens_per_epoch: int
    num_tokens: int
    num_label_tokens: int
    trainable_parameters: int
    memory_bytes: int


class Inspection(Spec):
    """The answer to an inspection. A first one without anything says that a trainer has begun; the last has either."""

    found: Foreseen | None = None
    error: ChunkError | None = None

    @property
    def is_last(self) -> bool:
        return self.found is not None or self.error is not None
