"""Importing from the Hub: the real program and client against a fake Hub on a local port."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.worker.importing import assert_refused, run
from worker.base_model import digest_directory


class FakeHub(ThreadingHTTPServer):
    """Serves one repository, me/tiny, over the Hub's download protocol, and notes which files were asked for."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), FakeHubHandler)
        self.files = files
        self.downloaded: set[str] = set()
        self.commit = "c" * 40


class FakeHubHandler(BaseHTTPRequestHandler):
    server: FakeHub

    def do_GET(self) -> None:
        hub, body, name = self.server, None, self.path.rpartition("/")[2]
        if self.path.startswith("/api/models/me/tiny/revision/"):
            body = json.dumps({"id": "me/tiny", "sha": hub.commit, "siblings": [{"rfilename": f} for f in hub.files]})
        elif self.path.startswith("/api/models/me/tiny/tree/"):
            body = json.dumps(
                [{"type": "file", "path": f, "size": len(c), "oid": "0" * 40} for f, c in hub.files.items()]
            )
        elif self.path.startswith(f"/me/tiny/resolve/{hub.commit}/"):
            hub.downloaded |= {name} if self.command == "GET" else set()
        content = body.encode() if body is not None else hub.files.get(name)
        self.send_response(200 if content is not None else 404)
        self.send_header("Content-Length", str(len(content or b"")))
        self.send_header("ETag", f'"{sha1(content or b"").hexdigest()}"')
        self.send_header("X-Repo-Commit", hub.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(source: Path) -> Iterator[FakeHub]:
    extra = {"evil.py": b"raise SystemExit('ran')", "pytorch_model.bin": b"pickle", "README.md": b"# tiny"}
    server = FakeHub({p.name: p.read_bytes() for p in source.iterdir()} | extra)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run_with_hub(data_dir: Path, endpoint: str, repo_id: str) -> Result:
    """The program as `python -m` starts it, in its own process since the client reads its endpoint at import."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    own = {"LORAD_DATA_DIR": str(data_dir), "HF_ENDPOINT": endpoint, "HF_HOME": str(data_dir.parent / "hf")}
    command = [sys.executable, "-W", "error", "-m", "worker.importer", "tiny", "--hub", repo_id, "--json"]
    done = subprocess.run(command, env=keep | own | {"NO_PROXY": "127.0.0.1"}, capture_output=True)
    return Result(CliRunner(), done.stdout, done.stderr, done.stdout + done.stderr, None, done.returncode, None)


def test_hub_model_is_downloaded(hub: FakeHub, data_dir: Path, source: Path) -> None:
    """A Hub id downloads weights, configuration and tokenizer, and neither code nor pickle."""
    result = run_with_hub(data_dir, f"http://127.0.0.1:{hub.server_port}", "me/tiny")

    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["digest"] == digest_directory(source)
    assert hub.downloaded == {p.name for p in source.iterdir()}


def test_missing_hub_model_is_refused(hub: FakeHub, data_dir: Path) -> None:
    """A repository that is not there is one clear error."""
    assert_refused(run_with_hub(data_dir, f"http://127.0.0.1:{hub.server_port}", "me/other"), data_dir, "me/other")


def test_malformed_hub_id_is_refused(data_dir: Path) -> None:
    """What cannot be a repository's id is refused without asking anyone."""
    assert_refused(run(data_dir, "tiny", "--hub", "../../etc"), data_dir, "cannot download ../../etc")


def test_unreachable_hub_is_refused(data_dir: Path) -> None:
    """No Hub to be reached is one clear error."""
    assert_refused(run_with_hub(data_dir, "http://127.0.0.1:9", "me/tiny"), data_dir, "cannot download me/tiny")
