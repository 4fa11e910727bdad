"""Every limit of the service, in one place. docs/api.md prints this table."""

import re
from typing import Final

JSON_BODY_BYTES: Final = 1 << 20
INFERENCE_BODY_BYTES: Final = 256 << 10
JSON_DEPTH: Final = 32
DATASET_BYTES: Final = 512 << 20
DATASET_LINE_BYTES: Final = 1 << 20
DATASET_LINES: Final = 2_000_000
DATASET_GZIP_RATIO: Final = 200
DATASET_GZIP_MEMBERS: Final = 100_000
ADAPTER_BYTES: Final = 2 << 30
SAFETENSORS_HEADER_BYTES: Final = 1 << 20
SAFETENSORS_TENSORS: Final = 20_000
ADAPTER_CONFIG_BYTES: Final = 256 << 10
MAX_RANK: Final = 256
MAX_ALPHA: Final = 1024.0
MAX_DROPOUT: Final = 0.9
MAX_LEARNING_RATE: Final = 1.0
MAX_BATCH_SIZE: Final = 256
MAX_EPOCHS: Final = 50
MAX_STEPS: Final = 100_000
MAX_SECONDS: Final = 30 * 24 * 3600
MAX_LORA_PLUS_RATIO: Final = 64.0
MAX_PATTERNS: Final = 64
MAX_SEED: Final = 2_147_483_647
MAX_PRIORITY: Final = 100
MAX_SEQ_LEN: Final = 8192
MAX_STOP_STRINGS: Final = 4
MAX_STOP_CHARS: Final = 64
MAX_CHOICES: Final = 4
MAX_TOP_LOGPROBS: Final = 20
MAX_SCHEMA_CHARS: Final = 64 << 10
MAX_MIX: Final = 8
MAX_MIX_WEIGHT: Final = 4.0
MAX_METADATA_PAIRS: Final = 16
MAX_METADATA_KEY: Final = 64
MAX_METADATA_VALUE: Final = 512
MAX_PAGE: Final = 100
MAX_QUEUED_JOBS: Final = 1000
GENERATION_TIMEOUT_S: Final = 120
MAX_ATTEMPTS: Final = 3
TMP_MAX_AGE_S: Final = 24 * 3600
MAX_IDEMPOTENCY_KEY: Final = 255
IDEMPOTENCY_KEY_S: Final = 24 * 3600
SDK_RETRY_S: Final = 15 * 60
AUDIT_KEPT_S: Final = 90 * 24 * 3600
REFUSALS_KEPT_PER_MINUTE: Final = 60

NAME_PATTERN: Final = r"[a-z0-9](?:[a-z0-9._-]{0,62}[a-z0-9])?"
_NAME = re.compile(NAME_PATTERN)


def is_name(text: str) -> bool:
    """True if `text` may name an adapter, a base model, an alias or a tenant."""
    return _NAME.fullmatch(text) is not None and ".." not in text
