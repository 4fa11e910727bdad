"""Ids: an OpenAI prefix and 32 hex digits of a time-ordered UUID (version 7, RFC 9562 section 5.7)."""

import re
import secrets
import time
from typing import Final

FILE: Final = "file-"
JOB: Final = "ftjob-"
CHECKPOINT: Final = "ftckpt-"
EVENT: Final = "ftevent-"
ADAPTER_VERSION: Final = "adv-"
ADAPTER: Final = "adapter-"
BASE_MODEL: Final = "base-"
REQUEST: Final = "req-"
GENERATOR: Final = "gen-"
AUDIT_EVENT: Final = "audit-"

_HEX_32 = re.compile(r"[0-9a-f]{32}")


def new_id(prefix: str) -> str:
    """A fresh id; ids made later in another millisecond sort after this one."""
    unix_ms = time.time_ns() // 1_000_000
    value = (unix_ms & (1 << 48) - 1) << 80 | 0x7 << 76 | secrets.randbits(12) << 64 | 0b10 << 62 | secrets.randbits(62)
    return f"{prefix}{value:032x}"


def is_id(text: str, prefix: str) -> bool:
    """True if `text` is exactly what `new_id(prefix)` can return; nothing else is looked up or used in a path."""
    return text.startswith(prefix) and _HEX_32.fullmatch(text[len(prefix) :]) is not None
