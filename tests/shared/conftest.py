"""What the tests of the ledger and the store start from: a tenant, a file, a base model, and jobs made in one call."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, text

from shared import jobs
from shared.cli.servers import CODE_DIR
from shared.db import read, write
from shared.jobs import Claim
from shared.specs import TrainSpec
from shared.store import adapters, base_models, durable, files
from shared.store.adapters import PreparedVersion
from shared.store.layout import Layout
from shared.tables import AdapterVersion, BaseModelRow, Job, JobEvent
from tests.servers import Postgres, postgres_binaries
from tests.shared.backups import Place

LEASE_S = 60.0


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """An empty store."""
    layout = Layout(tmp_path / "data")
    layout.prepare()
    return layout


@dataclass
class World:
    """One database and store with two base models and a training file; times are moved by editing rows."""

    engine: Engine
    layout: Layout
    file_id: str
    base: BaseModelRow
    other_base: BaseModelRow

    def submit(self, tenant: str = "acme", *, base: BaseModelRow | None = None, **fields: Any) -> Job:
        """A new queued job of this tenant."""
        new: dict[str, Any] = {"adapter_name": "math", "spec": TrainSpec()} | fields
        with write(self.engine) as tx:
            return jobs.submit(
                tx,
                jobs.NewJob(
                    tenant=tenant, base_model_id=(base or self.base).id, training_file_id=self.file_id, **new
                ),
                max_queued=1000,
            )  # fmt: skip

    def claim(self, trainer: str = "t1", **options: Any) -> Claim | None:
        """The next job for this trainer."""
        with write(self.engine) as tx:
            return jobs.claim_next(tx, trainer=trainer, lease_s=LEASE_S, **options)

    def running(self, **fields: Any) -> Claim:
        """A job just submitted and claimed."""
        self.submit(**fields)
        claim = self.claim(holds_base=fields.get("base", self.base).id)
        assert claim is not None
        return claim

    def job(self, job_id: str) -> Job:
        """The job's row as it is now."""
        with read(self.engine) as tx:
            return tx.get_one(Job, job_id)

    def state(self, job_id: str) -> str:
        return self.job(job_id).state

    def edit(self, job_id: str, assignments: str) -> None:
        """Set columns of a job by SQL, to move it in time."""
        with write(self.engine) as tx:
            tx.execute(text(f"UPDATE jobs SET {assignments} WHERE id = :id"), {"id": job_id})

    def lose(self, claim: Claim) -> None:
        """Let the claim's lease have run out a second ago."""
        self.edit(claim.job_id, "lease_expires_at = heartbeat_at - 1000")

    def sweep(self, *, may_expire: bool = True, **options: Any) -> jobs.Swept:
        with write(self.engine) as tx:
            return jobs.sweep(tx, may_expire=may_expire, lease_s=LEASE_S, **options)

    def messages(self, job_id: str) -> list[str]:
        """The job's events, oldest first."""
        with read(self.engine) as tx:
            rows = tx.query(JobEvent).where(JobEvent.job_id == job_id).order_by(JobEvent.seq)
            return [row.message for row in rows]

    def prepare(
        self, weights: bytes = b"weights", *, name: str = "math", job_id: str | None = None, **options: Any
    ) -> PreparedVersion:
        """Durable adapter bytes that no row names yet."""
        with durable.staging(self.layout) as staged:
            (staged / "adapter_model.safetensors").write_bytes(weights)
            (staged / "adapter_config.json").write_text("{}")
            validate: Callable[[Path], None] = options.pop("validate", lambda _: None)
            return adapters.prepare(
                self.layout,
                staged,
                validate=validate,
                base_model_id=self.base.id,
                base_digest=self.base.digest,
                spec=TrainSpec(),
                job_id=job_id,
                name=name,
                training_sha256=None,
            )

    def publish(self, claim: Claim) -> None:
        """End the claimed job well."""
        prepared = self.prepare(name=claim.adapter_name, job_id=claim.job_id)
        with write(self.engine) as tx:
            jobs.succeed(tx, claim, prepared)


@pytest.fixture
def world(engine: Engine, layout: Layout) -> World:
    """A ready world on each database."""
    return make_world(engine, layout)


def make_world(engine: Engine, layout: Layout) -> World:
    with write(engine) as tx:
        file = files.add_bytes(tx, layout, b"{}\n", tenant="acme", purpose="fine-tune", filename="data.jsonl")
        bases = []
        for name in ("small", "large"):
            with durable.staging(layout) as staged:
                (staged / "model.safetensors").write_bytes(name.encode())
                bases.append(base_models.register(tx, layout, staged, name=name, digest=name * 8, config={}))
    return World(engine, layout, file.id, *bases)


Lorad = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def lorad(tmp_path: Path) -> Lorad:
    """Runs `lorad ARGUMENTS` to its end, from a directory that is not ours, on a data directory of its own."""

    def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        env = {k: v for k, v in os.environ.items() if not k.startswith("LORAD_")}
        env |= {"LORAD_DATA_DIR": str(tmp_path / "data"), "PYTHONPATH": str(CODE_DIR)} | settings
        command = [sys.executable, "-m", "shared.cli", *arguments]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    return run


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings but those of a test, and Postgres' own programs on PATH."""
    for name in [name for name in os.environ if name.startswith("LORAD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{postgres_binaries()}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture
def here(world: World) -> Place:
    """The world's own data directory and database."""
    return Place(world.layout.root, world.engine.url.render_as_string(hide_password=False))


@pytest.fixture
def there(world: World, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """An empty data directory and database of the same kind."""
    data_dir = tmp_path / "there"
    if world.engine.dialect.name == "sqlite":
        data_dir.mkdir()
        yield Place(data_dir, f"sqlite:///{data_dir / 'lorad.db'}")
        return
    server: Postgres = request.getfixturevalue("postgres_server")
    server.execute("CREATE DATABASE restored")
    yield Place(data_dir, server.url("restored"))
    server.execute("DROP DATABASE restored WITH (FORCE)")


def tree(root: Path) -> dict[str, bytes]:
    """Every file below a directory."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def make_old(path: Path, seconds: float = 2 * 24 * 3600) -> Path:
    """Let the path have been written that long ago."""
    then = time.time() - seconds
    os.utime(path, (then, then), follow_symlinks=False)
    return path


def published(world: World, weights: bytes = b"weights", name: str = "math", tenant: str = "acme") -> AdapterVersion:
    """An imported adapter version."""
    prepared = world.prepare(weights, name=name)
    with write(world.engine) as tx:
        return adapters.insert_version(tx, tenant, name, prepared, None)


def flip(path: Path) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[1] ^= 1
    path.write_bytes(content)
