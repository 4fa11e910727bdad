"""What reaches a log: whole lines, without secrets."""

import logging
import subprocess
import sys

import pytest

from shared.cli.servers import CODE_DIR
from shared.config import Settings
from shared.logs import OneLine, Redacting, redactor

KEY = f"lorad_{'a1' * 8}_{'c4' * 32}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql+psycopg://lorad:c4n4ry@db:5432/lorad", "postgresql+psycopg://lorad:***@db:5432/lorad"),
        ("cannot connect to redis://:c4n4ry@redis:6379/0.", "cannot connect to redis://:***@redis:6379/0."),
        ("rediss://u:c4n@4ry@h and redis://:c4n4ry@i", "rediss://u:***@h and redis://:***@i"),
        ("the key " + KEY, f"the key lorad_{'a1' * 8}_***"),
        (f"Authorization: Bearer {KEY}x", "Authorization: Bearer ***"),
        ("{'Authorization': 'Basic YzRuNHJ5'}", "{'Authorization': 'Basic ***'}"),
        ("authorization=c4n4ry", "authorization=***"),
        ("token hf_c4n4ryc4n4ryc4n4ry", "token ***"),
        ("host=db user=lorad password=c4n4ry dbname=x", "host=db user=lorad password=*** dbname=x"),
        ("connect(password='c4n4ry', port=1)", "connect(password='***', port=1)"),
    ],
)
def test_what_looks_like_a_secret_is_not_shown(text: str, shown: str) -> None:
    """Only the secret goes; who and where stay for whoever has to mend it."""
    assert redactor()(text) == shown


@pytest.mark.parametrize(
    "text",
    [
        "GET /v1/files 200 in 3 ms",
        "http://127.0.0.1:8321/v1/models/a@3",
        "lorad is ready: http://127.0.0.1:8321 (data in /home/a/.lorad)",
        "unix:///tmp/lorad-0-abc/valkey.sock",
        "loaded lorad_model (float32 on cpu)",
        "password authentication failed for user lorad",
    ],
)
def test_other_text_is_left_alone(text: str) -> None:
    """Addresses without a password, adapter names with a version, and the word itself."""
    assert redactor()(text) == text


def test_what_is_known_to_be_secret_is_hidden_anywhere() -> None:
    """Passwords of the settings, as they are and as URLs write them; a very short one only in its place."""
    settings = Settings.from_env(
        {
            "LORAD_DATABASE_URL": "postgresql://lorad:c4n%2F4ry@db/lorad",
            "LORAD_BROKER_URL": "redis://:abc@redis",
            "LORAD_API_KEY": "sk-something",
        }
    )
    redact = redactor(settings.secrets)

    assert redact("c4n/4ry c4n%2F4ry sk-something abc") == "*** *** *** abc"
    assert redact("redis://:abc@redis") == "redis://:***@redis"


def record(message: str, *args: object) -> logging.LogRecord:
    return logging.LogRecord("x", logging.INFO, __file__, 1, message, args, None)


def test_a_message_cannot_forge_a_line() -> None:
    """Control characters of what users send are escaped; letters of any script are not."""
    text = OneLine("%(levelname)s %(message)s").format(record("a %s ü", "b\nERROR c\r\x1b[31m\u2028"))

    assert text == "INFO a b\\nERROR c\\r\\x1b[31m\\u2028 ü"


def test_tracebacks_are_redacted_too() -> None:
    """An error's own text is where libraries put the URL that they could not use."""
    try:
        raise ValueError(f"bad url redis://:c4n4ry@h with {KEY}")
    except ValueError:
        failed = record("failed")
        failed.exc_info = sys.exc_info()

    text = Redacting(OneLine("%(message)s"), redactor()).format(failed)

    assert "Traceback" in text
    assert "redis://:***@h" in text
    assert "c4n4ry" not in text
    assert KEY not in text


PROGRAM = """
import logging, threading
library = logging.getLogger("library")
library.propagate = False
library.addHandler(logging.StreamHandler())
from shared import logs
logs.set_up(secrets=["c4n4ry"])
library.warning("library %s", "c4n4ry")
logging.getLogger("lorad").info("ours c4n4ry")
def fail(): raise RuntimeError("thread c4n4ry")
thread = threading.Thread(target=fail, name="t"); thread.start(); thread.join()
raise RuntimeError("main c4n4ry")
"""


def test_a_program_s_every_line_is_redacted() -> None:
    """Its own, those of a library with a handler of its own, and errors that nobody caught, in any thread."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=CODE_DIR, capture_output=True, text=True, timeout=60, check=False
    )

    assert (done.returncode, done.stdout) == (1, "")
    for line in ("library ***", "ours ***", "RuntimeError: thread ***", "RuntimeError: main ***"):
        assert line in done.stderr
    assert "c4n4ry" not in done.stderr.replace('"main c4n4ry"', "").replace('"thread c4n4ry"', "")
