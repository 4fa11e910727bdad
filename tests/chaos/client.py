"""A client of a lab's API, over HTTP."""

from typing import Any

import httpx2

from tests.chaos.programs import Process

JOBS = "/v1/fine_tuning/jobs"
SAMPLES = b"".join(b'{"prompt": "%d and 2 is", "completion": " %d"}\n' % (n, n + 2) for n in range(40))


class Client:
    """Talks to one API program, `process`; the worker processes of gunicorn end with its group."""

    def __init__(self, process: Process, url: str) -> None:
        self.process = process
        self.http = httpx2.Client(base_url=url, timeout=30, trust_env=False)

    def close(self) -> None:
        self.http.close()

    def is_ready(self) -> bool:
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    def upload(self) -> str:
        """The id of a new data set."""
        files = {"file": ("samples.jsonl", SAMPLES)}
        answer = self.http.post("/v1/files", data={"purpose": "fine-tune"}, files=files).raise_for_status()
        return str(answer.json()["id"])

    def submit(self, file_id: str, *, key: str | None = None, steps: int = 5) -> httpx2.Response:
        """Ask for a job, once for each key."""
        body: dict[str, Any] = {"model": "tiny", "training_file": file_id, "training": {"max_steps": steps}}
        return self.http.post(JOBS, json=body, headers={"Idempotency-Key": key} if key else {})
