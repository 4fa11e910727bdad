"""Checkpoint directories: checkpoints/<job id>/<step>-<fence>, whole, durable and checked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.db import Tx
from shared.store.layout import Layout
from shared.tables import Checkpoint


@dataclass(frozen=True, kw_only=True)
class PreparedCheckpoint:
    """A durable checkpoint directory that no row names yet; `jobs.record_checkpoint` makes it known."""

    checkpoint_id: str
    step: int
    manifest: dict[str, Any]


def prepare(layout: Layout, write: Callable[[Path], None], *, job_id: str, step: int, fence: int) -> PreparedCheckpoint:
    """Let `write` fill a staged directory and publish it."""
    raise NotImplementedError


def newest_valid(layout: Layout, checkpoints: Sequence[Checkpoint]) -> tuple[Checkpoint, Path] | None:
    """The first of `checkpoints` whose every file has the recorded size and sha256, with its directory."""
    raise NotImplementedError


def forget_old(tx: Tx, job_id: str, *, keep: int = 2) -> list[Checkpoint]:
    """Mark all but the newest `keep` as deleted and return those; remove their bytes after the commit."""
    raise NotImplementedError


def remove(layout: Layout, checkpoints: Sequence[Checkpoint]) -> None:
    """Delete the directories of forgotten checkpoints."""
    raise NotImplementedError
