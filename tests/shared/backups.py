"""A service's place, as `lorad backup` and `lorad restore` find it, and what tests of both do there."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from click.testing import CliRunner, Result

from shared import jobs
from shared.cli import lorad as lorad_command
from shared.db import open_engine, write
from shared.store import checkpoints
from shared.store.layout import Layout

if TYPE_CHECKING:
    from tests.shared.conftest import World


@dataclass(frozen=True)
class Place:
    """Where a service keeps its data, as its settings say it."""

    data_dir: Path
    database_url: str

    def lorad(self, *arguments: object) -> Result:
        """Run `lorad ARGUMENTS` with these settings."""
        env = {"LORAD_DATA_DIR": str(self.data_dir), "LORAD_DATABASE_URL": self.database_url}
        return CliRunner(env=env).invoke(lorad_command, [str(a) for a in arguments], prog_name="lorad")


def opened(place: Place, world: "World") -> "World":
    """The same world as it is at another place; its engine is the caller's to dispose of."""
    return replace(world, engine=open_engine(place.database_url), layout=Layout(place.data_dir))


def save_checkpoint(world: "World", claim: jobs.Claim, step: int) -> None:
    """A new checkpoint; all but the newest two are forgotten and removed, as a trainer does it."""
    prepared = checkpoints.prepare(
        world.layout, lambda staged: _fill(staged, step), job_id=claim.job_id, step=step, fence=claim.fence
    )
    with write(world.engine) as tx:
        jobs.record_checkpoint(
            tx, claim, checkpoint_id=prepared.checkpoint_id, step=step, manifest=prepared.manifest
        )  # fmt: skip
        forgotten = checkpoints.forget_old(tx, claim.job_id)
    checkpoints.remove(world.layout, forgotten)


def _fill(staged: Path, step: int) -> None:
    (staged / "state.json").write_text(f"{step}")
