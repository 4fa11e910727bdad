"""Secrets of running programs: nothing that they write, answer or show in `ps` holds one, whatever fails."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import httpx2
import pytest

from tests.servers import Broker, Postgres, free_port, run_broker, run_postgres
from tests.system.services import environment, lorad, wait_for

PASSWORD_OF_DATABASE = "c4n4ry-of-the-database"  # looked for; this Postgres lets anybody in
PASSWORD_OF_BROKER = "c4n4ry-of-the-broker"
CLIENT_KEY = "c4n4ry-of-a-client"
HUB_TOKEN = "hf_c4n4ryOfTheHubThatNobodyHas"
PROMPT = "c4n4ry-of-a-prompt"
pytestmark = pytest.mark.system

SCOPES = ("admin", "files:read", "adapters:read", "generate")
PROGRAMS = ("api", "sweeper", "trainer")


@dataclass
class Running:
    """The programs of a service, what they wrote, and what was answered."""

    url: str
    key: str
    postgres: Postgres
    broker: Broker
    logs: dict[str, Path]
    pids: list[int]
    answers: list[str] = field(default_factory=list)

    def ask(self, method: str, path: str, key: str | None = None, **more: object) -> int:
        """The status of a request; its body and headers are kept."""
        headers = {"Authorization": f"Bearer {self.key if key is None else key}"}
        answer = httpx2.request(method, self.url + path, headers=headers, timeout=30, **more)  # type: ignore[arg-type]  # as httpx has them
        self.answers.append(f"{answer.headers} {answer.text}")
        return answer.status_code

    def log(self, program: str) -> str:
        return self.logs[program].read_text(errors="replace")

    def command_lines(self) -> str:
        """What `ps` shows of our programs and their children."""
        listed = subprocess.run(["ps", "-eo", "pid,ppid,args", "-ww"], capture_output=True, text=True, check=True)
        family = set(map(str, self.pids))
        lines = [line.split(None, 2) for line in listed.stdout.splitlines()]
        return "\n".join(line[2] for line in lines if {line[0], line[1]} & family)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """API, sweeper and trainer over a Postgres and a Valkey of their own, both with passwords."""
    with ExitStack() as stack:
        postgres, broker = stack.enter_context(run_postgres()), stack.enter_context(run_broker())
        broker.client.config_set("requirepass", PASSWORD_OF_BROKER)
        postgres.execute("CREATE DATABASE lorad")
        port = free_port()
        env = environment(
            LORAD_DATA_DIR=str(tmp_path / "data"),
            LORAD_PORT=str(port),
            LORAD_DATABASE_URL=f"postgresql://lorad:{PASSWORD_OF_DATABASE}@127.0.0.1:{postgres.port}/lorad",
            LORAD_BROKER_URL=f"redis://:{PASSWORD_OF_BROKER}@127.0.0.1:{broker.url.rpartition(':')[2]}",
            LORAD_API_KEY=CLIENT_KEY,
            HF_TOKEN=HUB_TOKEN,
        )
        lorad("migrate", env=env)
        scopes = [word for scope in SCOPES for word in ("--scope", scope)]
        key = lorad("keys", "create", *scopes, env=env)
        logs, programs = {name: tmp_path / f"{name}.log" for name in PROGRAMS}, []
        for name in PROGRAMS:
            output = stack.enter_context(logs[name].open("wb"))
            programs.append(stack.enter_context(_program(name, env, output)))
            stack.callback(programs[-1].kill)
        url = f"http://127.0.0.1:{port}"
        try:
            wait_for("the API", lambda: _is_ready(url), timeout_s=90)
        except AssertionError as error:
            raise AssertionError("\n".join(path.read_text() for path in logs.values())) from error
        yield Running(url, key.strip(), postgres, broker, logs, [program.pid for program in programs])


def _program(name: str, env: dict[str, str], output: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "shared.cli", name], env=env, stdout=output, stderr=output)


def _is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz", timeout=5).json()["broker"] is True
    except (httpx2.TransportError, KeyError):
        return False


@pytest.mark.timeout(300)
def test_no_secret_is_logged_answered_or_shown(running: Running) -> None:
    """With right and wrong keys, through an error of ours, without the broker and without the database."""
    key_id, secret = running.key.split("_")[1:]
    wrong = f"lorad_{key_id}_{secret[::-1]}"

    assert running.ask("GET", "/v1/files") == running.ask("GET", "/metrics") == 200
    assert running.ask("GET", "/v1/files", key=wrong) == 401
    assert running.ask("GET", f"/v1/files?api_key={running.key}") == 400
    assert running.ask("GET", f"/v1/files/{running.key}") == 404
    chat = {"model": "none", "messages": [{"role": "user", "content": PROMPT}]}
    assert running.ask("POST", "/v1/chat/completions", json=chat) == 404
    command_lines = running.command_lines()

    running.postgres.execute("ALTER TABLE adapters RENAME TO gone", database="lorad")
    assert running.ask("GET", "/v1/models/math") == 500
    wait_for("a running trainer", lambda: _listens(running), timeout_s=120)
    os.kill(running.broker.pid, signal.SIGKILL)
    wait_for("the trainer to miss its broker", lambda: "Cannot connect" in running.log("trainer"), timeout_s=60)
    os.kill(running.postgres.pid, signal.SIGKILL)
    wait_for("the sweeper to miss the database", lambda: "does not answer" in running.log("sweeper"), timeout_s=60)
    ask = f"/v1/files/{running.key}"
    wait_for("the API to miss it too", lambda: running.ask("GET", ask) == 503, timeout_s=30)

    seen = {"answers": "\n".join(running.answers), "ps": command_lines} | {name: running.log(name) for name in PROGRAMS}
    assert "/v1/models/math failed" in seen["api"]
    assert f"/v1/files/lorad_{key_id}_***: database" in seen["api"]
    assert "shared.cli" in seen["ps"] or "gunicorn" in seen["ps"]
    for place, text in seen.items():
        for canary in (PASSWORD_OF_DATABASE, PASSWORD_OF_BROKER, CLIENT_KEY, HUB_TOKEN, PROMPT, secret[::-1]):
            assert canary not in text, place
        # What a client puts into a URL itself may come back to it, and to nobody else.
        assert place == "answers" or secret not in text, place


def _listens(running: Running) -> bool:
    """True once the trainer waits for doorbells."""
    import redis

    port = int(running.broker.url.rpartition(":")[2].partition("/")[0])
    with redis.Redis(port=port, password=PASSWORD_OF_BROKER, socket_timeout=2) as client:
        return any(one["cmd"] == "brpop" for one in client.client_list())
