"""Settings: frozen, read once from the environment, and the only reader of it."""

import hashlib
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal
from urllib.parse import unquote, urlsplit

from shared.errors import SettingsError

MAX_SOCKET_PATH: Final = 100
"""Bytes; the kernel's sun_path holds 108 on Linux and 104 on macOS, with the closing zero."""

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16"]
Kernels = Literal["auto", "torch"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Names of the environment variables are the field names in capitals after LORAD_; times are in seconds."""

    data_dir: Path
    database_url: str
    broker_url: str | None
    """None: the embedded Valkey on a unix socket under `data_dir`."""
    host: str = "127.0.0.1"
    port: int = 8321
    device: Device = "auto"
    dtype: Dtype = "auto"
    kernels: Kernels = "auto"
    """What a generator computes with on a CPU: kernels that it compiles where there is a C compiler, or torch alone."""
    api_threads: int = 32
    train_slots: int = 4
    """Jobs that one trainer trains side by side."""
    train_tokens: int = 2048
    generate_slots: int = 32
    """Rows of a generator: sequences that one base model generates side by side."""
    generate_waiting: int = 32
    """Requests that a generator takes beyond its rows: it chooses among them, and reads their adapters meanwhile."""
    generate_hung_s: float = 120.0
    """A generator whose engine takes longer than this for one turn ends itself."""
    kv_cache_bytes: int = 2 << 30
    """Keys and values that the rows of one base model may hold in a generator."""
    adapter_cache_bytes: int = 1 << 30
    heartbeat_s: float = 10.0
    lease_s: float = 60.0
    sweep_s: float = 10.0
    checkpoint_s: float = 300.0
    hung_s: float = 600.0
    """A trainer whose forward and backward takes longer than this, and than 20 times the usual, ends itself."""
    max_queued_jobs: int = 1000
    max_running_jobs: int = 0
    """Jobs of one tenant that run at once; 0 is no cap."""
    max_job_s: float | None = None
    """How long a job may run, all its attempts together, before it is cancelled with the error `time_limit`."""
    min_free_bytes: int = 1 << 30
    """A trainer claims nothing while the data directory has less free space; 0 is no mark."""
    max_queued_requests: int = 1000
    """Generation requests that may wait for one base model; more are answered 429."""
    requests_per_minute: int = 0
    """With one API key, or without keys from one address; more are answered 429. 0: any number."""
    failed_logins_per_minute: int = 10
    """Wrong API keys from one address; more are answered 429, right keys go on working. 0: any number."""
    base_url: str = "http://127.0.0.1:8321/v1"
    """For the client half of the command: where the API is."""
    api_key: str | None = None

    @property
    def embedded_broker_socket(self) -> Path:
        """In the data directory, or where that path is too long for a socket, in a directory of our own under the
        system's temporary one; every program finds the same place."""
        path = self.data_dir / "broker" / "valkey.sock"
        if len(os.fsencode(path)) <= MAX_SOCKET_PATH:
            return path
        digest = hashlib.sha256(os.fsencode(self.data_dir)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"lorad-{os.getuid()}-{digest}" / "valkey.sock"

    @property
    def resolved_broker_url(self) -> str:
        """The broker to talk to, as a redis:// , rediss:// or unix:// URL."""
        return self.broker_url or f"unix://{self.embedded_broker_socket}"

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must never be shown: passwords, as they are and as URLs write them, and the client's key."""
        written = [urlsplit(url).password or "" for url in (self.database_url, self.broker_url or "")]
        return tuple(filter(None, (*written, *map(unquote, written), self.api_key)))

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> "Settings":
        """Settings from LORAD_* variables; raises SettingsError that lists every wrong or unknown one."""
        return _read(os.environ if env is None else env)


def environment_for(
    settings: Settings, inherited: Mapping[str, str] | None = None, *, program: str = ""
) -> dict[str, str]:
    """An environment for a child process from which `Settings.from_env` reads these same settings."""
    base = {k: v for k, v in (os.environ if inherited is None else inherited).items() if not k.startswith("LORAD_")}
    kept = {k: v for k, v in (os.environ if inherited is None else inherited).items() if k in _NOT_SETTINGS}
    own = {_variable(f): str(getattr(settings, f)) for f in _FIELDS if getattr(settings, f) is not None}
    if program and program != "importer":
        base = {k: v for k, v in base.items() if k not in _FOR_IMPORTER}
    return _COMPUTE | _COMPUTE_OF.get(program, {}) | base | kept | own


# Two programs compute on one machine: OpenMP threads that spin while they wait starve each other (measured: the same 20
# training steps took 482 s spinning and 56 s passive beside other work on 2 cores). Whoever sets it decides.
_COMPUTE = {"OMP_WAIT_POLICY": "PASSIVE"}
# A generator's step is hundreds of operations of some 50 us: waking a thread for each takes 0.6 of its speed, so it may
# spin for about 10 us (measured on 2 cores, 16 rows: 260 tokens/s without, 408 with, 446 with 10 times as much; two
# such programs side by side 526 together without, 415 with, and with 10 times as much next to nothing).
_COMPUTE_OF = {"generator": {"GOMP_SPINCOUNT": "1000"}}
# Tokens of the Hugging Face Hub: only `lorad base add` downloads.
_FOR_IMPORTER = frozenset({"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_TOKEN"})
# Read by single modules, not settings: the failpoints of tests.
_NOT_SETTINGS = frozenset({"LORAD_FAILPOINT"})
_CHOICES: dict[str, tuple[str, ...]] = {
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "float32", "bfloat16"),
    "kernels": ("auto", "torch"),
}
_POSITIVE_INTS = (
    "api_threads",
    "train_slots",
    "train_tokens",
    "generate_slots",
    "generate_waiting",
    "adapter_cache_bytes",
    "kv_cache_bytes",
    "max_queued_jobs",
    "max_queued_requests",
)
_INTS_OR_OFF = ("max_running_jobs", "min_free_bytes", "requests_per_minute", "failed_logins_per_minute")
_POSITIVE_FLOATS = ("heartbeat_s", "lease_s", "sweep_s", "checkpoint_s", "hung_s", "generate_hung_s", "max_job_s")
_TEXTS = ("database_url", "broker_url", "host", "base_url", "api_key")
_SCHEMES = {
    "database_url": ("sqlite:////", "postgresql://", "postgresql+psycopg://", "postgres://"),
    "broker_url": ("redis://", "rediss://", "unix:///"),
}
"""Absolute paths only: the programs start in different directories."""
_FIELDS = ("data_dir", "port", *_CHOICES, *_POSITIVE_INTS, *_INTS_OR_OFF, *_POSITIVE_FLOATS, *_TEXTS)


def _variable(field: str) -> str:
    return f"LORAD_{field.upper()}"


def _read(env: Mapping[str, str]) -> Settings:
    problems: list[str] = []
    known = {_variable(f) for f in _FIELDS} | _NOT_SETTINGS
    problems += [f"{name} is not a setting" for name in sorted(env) if name.startswith("LORAD_") and name not in known]
    given = {f: env[_variable(f)] for f in _FIELDS if env.get(_variable(f))}
    values: dict[str, object] = {f: given[f] for f in _TEXTS if f in given}
    for field, choices in _CHOICES.items():
        if field in given and given[field] not in choices:
            problems.append(f"{_variable(field)}={given[field]!r}: allowed are {', '.join(choices)}")
        elif field in given:
            values[field] = given[field]
    for field in (*_POSITIVE_INTS, *_INTS_OR_OFF, "port"):
        if field in given:
            values[field] = _integer(field, given[field], problems)
    for field in _POSITIVE_FLOATS:
        if field in given:
            values[field] = _seconds(field, given[field], problems)
    for field, schemes in _SCHEMES.items():
        if field in given and not given[field].startswith(schemes):
            # Only the scheme is shown: the rest may hold a password.
            problems.append(
                f"{_variable(field)}={given[field].partition(':')[0]}:...: allowed are {', '.join(schemes)}"
            )
        elif field in given and not _is_url(given[field]):
            problems.append(
                f"{_variable(field)}={given[field].partition(':')[0]}:... cannot be read: in a user name or password,"
                " write anything but letters, digits, '-', '.', '_' and '~' as %XX"
            )
    if problems:
        raise SettingsError("; ".join(problems))
    data_dir = Path(given.get("data_dir", "~/.lorad")).expanduser().absolute()
    values["data_dir"] = data_dir
    values.setdefault("database_url", f"sqlite:///{data_dir / 'lorad.db'}")
    values.setdefault("broker_url", None)
    settings = Settings(**values)  # type: ignore[arg-type]  # every value was checked above
    if settings.lease_s < 2 * settings.heartbeat_s:
        raise SettingsError(
            f"LORAD_LEASE_S={settings.lease_s:g} must be at least twice LORAD_HEARTBEAT_S={settings.heartbeat_s:g}"
        )
    return settings


def _is_url(text: str) -> bool:
    """True if it is a path, or all libraries will find the same parts in it: else their errors may show a password."""
    if text.startswith(("sqlite:", "unix:")):
        return True
    try:
        parts = urlsplit(text)
        _ = parts.port
    except ValueError:
        return False
    return parts.netloc.count("@") <= 1 and not any(character in text for character in "#\\ \t\r\n")


def _integer(field: str, text: str, problems: list[str]) -> int:
    lower, upper = int(field not in _INTS_OR_OFF), 65535 if field == "port" else 1 << 62
    if not (text.isascii() and text.isdigit() and len(text) < 20 and lower <= int(text) <= upper):
        problems.append(f"{_variable(field)}={text!r}: a whole number from {lower} to {upper} is needed")
        return 1
    return int(text)


def _seconds(field: str, text: str, problems: list[str]) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1e9:
        problems.append(f"{_variable(field)}={text!r}: a number of seconds above 0 is needed")
        return 1.0
    return value
