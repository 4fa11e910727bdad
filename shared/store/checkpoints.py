"""Checkpoint directories: checkpoints/<job id>/<step>-<fence>, whole, durable and checked."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import select, update

from shared import failpoints, ids
from shared.db import Tx, now_ms
from shared.store.durable import inventory, publish, remove_tree, staging
from shared.store.layout import Layout
from shared.tables import Checkpoint

log = logging.getLogger(__name__)

MANIFEST: Final = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class PreparedCheckpoint:
    """A durable checkpoint directory that no row names yet; `jobs.record_checkpoint` makes it known."""

    checkpoint_id: str
    step: int
    manifest: dict[str, Any]


def prepare(layout: Layout, write: Callable[[Path], None], *, job_id: str, step: int, fence: int) -> PreparedCheckpoint:
    """Let `write` fill a staged directory and publish it. A directory is written once: FileExistsError."""
    with staging(layout) as staged:
        write(staged)
        failpoints.hit("checkpoint.written")
        manifest = {"job_id": job_id, "step": step, "fence": fence, "files": inventory(staged)}
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        publish(staged, layout.checkpoint(job_id, step, fence))
    return PreparedCheckpoint(checkpoint_id=ids.new_id(ids.CHECKPOINT), step=step, manifest=manifest)


def intact(layout: Layout, checkpoints: Sequence[Checkpoint]) -> list[Path]:
    """The directories of those of `checkpoints` whose every file has the recorded size and sha256, in their order."""
    directories = []
    for row in checkpoints:
        directory = layout.checkpoint(row.job_id, row.step, row.fence)
        try:
            found = inventory(directory)
        except OSError as error:
            log.warning("checkpoint %s cannot be read: %s", row.id, error)
            continue
        found.pop(MANIFEST, None)
        if found and found == row.manifest.get("files"):
            directories.append(directory)
        else:
            log.warning("checkpoint %s does not match its manifest", row.id)
    return directories


def forget_old(tx: Tx, job_id: str, *, keep: int = 2) -> list[Checkpoint]:
    """Mark all but the newest `keep` as deleted and return those; remove their bytes after the commit.

    Those of a later claim are newer, whatever their step: a job may have had to go back.
    """
    live = select(Checkpoint).where(Checkpoint.job_id == job_id, Checkpoint.deleted_at.is_(None))
    old = list(tx.scalars(live.order_by(Checkpoint.fence.desc(), Checkpoint.step.desc()).offset(keep)))
    forgotten = update(Checkpoint).where(Checkpoint.id.in_([row.id for row in old])).values(deleted_at=now_ms(tx))
    tx.execute(forgotten, execution_options={"synchronize_session": False})
    return old


def remove(layout: Layout, checkpoints: Sequence[Checkpoint]) -> None:
    """Delete the directories of forgotten checkpoints."""
    for row in checkpoints:
        remove_tree(layout.checkpoint(row.job_id, row.step, row.fence))
