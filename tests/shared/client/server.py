"""A small real HTTP server that keeps the client's side of the contract honest: it answers as the API must."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

Json = dict[str, Any]


@dataclass
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Json:
        parsed: Json = json.loads(self.body)
        return parsed


@dataclass
class Script:
    """What a job does: at each look at it, its next stage becomes true. The last stage stays."""

    stages: list[tuple[str, list[Json]]]
    events: list[Json] = field(default_factory=list)
    status: str = "queued"

    def advance(self) -> None:
        if self.stages:
            self.status, fresh = self.stages.pop(0)
            self.events += fresh


class ContractServer:
    """Its state is set by a test before, and read after; the socket and the bytes on it are real."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.refuse_next: list[tuple[int, Json]] = []
        """Answers to give instead of real ones, first come, first served."""
        self.script = Script([])
        self.uploads: dict[str, tuple[str, bytes]] = {}
        self.jobs: dict[str, Json] = {}
        self.adapter_files: dict[str, bytes] = {}
        self.cut_downloads_after: list[int] = []
        """Each entry breaks one download after so many bytes."""
        self.served_sha256: str | None = None
        """An ETag to serve instead of the true one."""
        self.answer = ["Half", " of", " it nya~"]
        self.break_stream = False
        self.line_report: Json = {}
        self.token_report: Json | None = None
        """What `/report` answers with a model; None is answered as a file that has no tokens."""
        self.estimate: Json = {}
        self._keys: dict[str, Json] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    @contextmanager
    def running(self) -> Iterator["ContractServer"]:
        thread = threading.Thread(target=lambda: self._http.serve_forever(poll_interval=0.01))
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            self._http.server_close()
            thread.join()

    def requests(self, method: str, path: str) -> list[Seen]:
        return [request for request in self.seen if (request.method, request.path) == (method, path)]

    def job(self, job_id: str) -> Json:
        over = self.script.status in ("succeeded", "failed", "cancelled")
        error = {"code": "training_failed", "message": "the loss is not finite", "param": None}
        return self.jobs[job_id] | {
            "status": self.script.status,
            "fine_tuned_model": "nya@1" if self.script.status == "succeeded" else None,
            "error": error if self.script.status == "failed" else None,
            "finished_at": 2 if over else None,
        }

    def create_job(self, body: Json, key: str | None) -> Json:
        if key is not None and key in self._keys:
            return self._keys[key]
        job = {"id": f"ftjob-{len(self.jobs) + 1:032x}", "object": "fine_tuning.job", "created_at": 1, **body}
        self.jobs[job["id"]] = job
        answer = self.job(job["id"])
        if key is not None:
            self._keys[key] = answer
        return answer


def metrics(step: int, total: int, loss: float) -> Json:
    data = {
        "step": step,
        "total_steps": total,
        "train_loss": loss,
        "tokens_per_second": 100.0,
        "eta_seconds": 1.0 * (total - step),
    }
    return {"id": f"ftevent-{step:032x}", "level": "info", "message": f"step {step}", "type": "metrics", "data": data}


def message(number: int, text: str, level: str = "info") -> Json:
    return {"id": f"ftevent-m{number:031x}", "level": level, "message": text, "type": "message", "data": None}


def page(items: list[Json], query: dict[str, list[str]], limit: int = 20) -> Json:
    limit = int(query.get("limit", [str(limit)])[0])
    start = next((i + 1 for i, item in enumerate(items) if [item["id"]] == query.get("after")), 0)
    return {"object": "list", "data": items[start : start + limit], "has_more": len(items) > start + limit}


def _handler(server: ContractServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._serve()

        def do_POST(self) -> None:
            self._serve()

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _serve(self) -> None:
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path, query = unquote(url.path).removeprefix("/v1"), parse_qs(url.query)
            server.seen.append(Seen(self.command, path, {k.lower(): v for k, v in self.headers.items()}, body))
            if server.refuse_next:
                self._json(*server.refuse_next.pop(0))
            elif self.command == "POST":
                self._post(path, body)
            else:
                self._get(path, query)

        def _post(self, path: str, body: bytes) -> None:
            match path.split("/")[1:]:
                case ["files"]:
                    self._json(200, self._upload(body))
                case ["fine_tuning", "jobs"] if json.loads(body).get("dry_run"):
                    self._json(200, server.estimate)
                case ["fine_tuning", "jobs"]:
                    self._json(200, server.create_job(json.loads(body), self.headers.get("Idempotency-Key")))
                case ["fine_tuning", "jobs", job_id, "cancel"] if job_id in server.jobs:
                    server.script = Script([], server.script.events, "cancelled")
                    self._json(200, server.job(job_id))
                case ["chat", "completions"]:
                    self._chat(json.loads(body))
                case _:
                    self._missing()

        def _get(self, path: str, query: dict[str, list[str]]) -> None:
            match path.split("/")[1:]:
                case ["fine_tuning", "jobs"]:
                    self._json(200, page([server.job(j) for j in reversed(server.jobs)], query))
                case ["fine_tuning", "jobs", job_id] if job_id in server.jobs:
                    server.script.advance()
                    self._json(200, server.job(job_id))
                case ["fine_tuning", "jobs", job_id, "events"] if job_id in server.jobs:
                    self._json(200, page(server.script.events[::-1], query))
                case ["files", file_id, "report"]:
                    tokens = server.token_report if "model" in query else None
                    self._json(200, {"id": file_id, "status": "processed", "tokens": tokens} | server.line_report)
                case ["adapters", "nya", "versions", "latest" | "1"]:
                    self._json(200, self._version())
                case ["adapters", "nya", "versions", "1", "files", name] if name in server.adapter_files:
                    self._file(server.adapter_files[name])
                case _:
                    self._missing()

        def _upload(self, body: bytes) -> Json:
            head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
            purpose, file = BytesParser(policy=HTTP).parsebytes(head + body).iter_parts()
            assert purpose.get_content().strip() == "fine-tune"
            content = file.get_payload(decode=True)
            assert isinstance(content, bytes)
            file_id = f"file-{len(server.uploads) + 1:032x}"
            server.uploads[file_id] = (str(file.get_filename()), content)
            bad = not content.startswith(b"{")
            return {
                "id": file_id,
                "object": "file",
                "status": "error" if bad else "processed",
                "status_details": "line 1: not JSON" if bad else None,
            }

        def _version(self) -> Json:
            files = [
                {"filename": name, "size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                for name, content in server.adapter_files.items()
            ]
            return {"id": "adv-1", "name": "nya", "version": 1, "files": files}

        def _file(self, content: bytes) -> None:
            etag = f'"{server.served_sha256 or hashlib.sha256(content).hexdigest()}"'
            start = 0
            if "Range" in self.headers and self.headers.get("If-Range", etag) == etag:
                start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            self.send_response(206 if start else 200)
            self.send_header("ETag", etag)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if server.cut_downloads_after:
                self.wfile.write(content[start : start + server.cut_downloads_after.pop(0)])
                self.close_connection = True
            else:
                self.wfile.write(content[start:])

        def _chat(self, body: Json) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(b": ping\n\n")
            head = {"object": "chat.completion.chunk", "model": "nya@1", "system_fingerprint": "fp_1"}
            for piece in server.answer:
                self._event(head | {"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]})
            if server.break_stream:
                self._event({"error": {"message": "the generator died", "code": "unavailable"}})
                return
            self._event(head | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
            self.wfile.write(b"data: [DONE]\n\n")

        def _event(self, event: Json) -> None:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())

        def _missing(self) -> None:
            self._json(404, {"error": {"message": "There is no such object.", "code": "not_found", "param": None}})

        def _json(self, status: int, body: Json) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler
