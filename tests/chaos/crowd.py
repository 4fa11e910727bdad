"""One of several processes that use the same ledger as fast as they can."""

import random
import time
from pathlib import Path

from sqlalchemy import Engine

from shared import db, jobs
from shared.errors import CancelRequested, LoradError
from shared.jobs import Claim, NewJob
from shared.specs import TrainSpec
from shared.store import adapters, durable
from shared.store.layout import Layout


def use_ledger(database_url: str, data_dir: str, base_id: str, file_id: str, number: int, seconds: float) -> None:
    """Submit, claim, report and end jobs for so long; prints how many ended. What the database raises ends it."""
    engine, layout = db.open_engine(database_url), Layout(Path(data_dir))
    draw, until = random.Random(number), time.monotonic() + seconds
    ended = 0
    while time.monotonic() < until:
        new = NewJob(
            tenant="default", base_model_id=base_id, training_file_id=file_id, adapter_name=f"by-{number}",
            spec=TrainSpec(),
        )  # fmt: skip
        with db.write(engine) as tx:
            job_id = jobs.submit(tx, new, max_queued=100_000).id
        with db.write(engine) as tx:
            claim = jobs.claim_next(tx, trainer=f"process-{number}", lease_s=60.0)
        with db.read(engine) as tx:
            jobs.list_page(tx, "default", limit=20)
        if draw.random() < 0.3:
            try:
                with db.write(engine) as tx:
                    jobs.request_cancel(tx, "default", job_id)
            except LoradError:
                pass  # somebody has ended it already
        if claim is not None:
            _work(engine, layout, claim, draw)
            ended += 1
    print(f"ended {ended}", flush=True)
    engine.dispose()


def _work(engine: Engine, layout: Layout, claim: Claim, draw: random.Random) -> None:
    for step in range(draw.randint(1, 5)):
        with db.write(engine) as tx:
            jobs.heartbeat(tx, claim, lease_s=60.0)
        with db.write(engine) as tx:
            jobs.add_event(tx, claim, message=f"Reported {step}")
    if draw.random() < 0.5:
        with db.write(engine) as tx:
            jobs.fail(tx, claim, code="made_up", message="as the dice fell")
        return
    with durable.staging(layout) as staged:
        (staged / "adapter_model.safetensors").write_bytes(draw.randbytes(256))
        (staged / "adapter_config.json").write_text("{}")
        prepared = adapters.prepare(
            layout, staged, validate=lambda _: None, base_model_id=claim.base_model_id, base_digest="d",
            spec=claim.spec, job_id=claim.job_id, name=claim.adapter_name, training_sha256=None,
        )  # fmt: skip
    try:
        with db.write(engine) as tx:
            jobs.succeed(tx, claim, prepared)
    except CancelRequested:
        with db.write(engine) as tx:
            jobs.stop_cancelled(tx, claim)
