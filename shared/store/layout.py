"""Where things lie under the data directory. Paths are made from checked ids only, never from user strings."""

from dataclasses import dataclass
from pathlib import Path

from shared import ids
from shared.errors import NotFound


@dataclass(frozen=True)
class Layout:
    """The directories under `root` ($LORAD_DATA_DIR)."""

    root: Path

    @property
    def tmp(self) -> Path:
        """Staging; anything in it may be deleted after 24 h."""
        return self.root / "tmp"

    @property
    def broker_dir(self) -> Path:
        return self.root / "broker"

    def prepare(self) -> None:
        """Create the directories, readable by us only."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in ("files", "models", "checkpoints", "adapters", "tmp", "broker"):
            (self.root / name).mkdir(mode=0o700, exist_ok=True)

    def files(self, file_id: str) -> Path:
        return self.root / "files" / _checked(file_id, ids.FILE)

    def model(self, base_id: str) -> Path:
        return self.root / "models" / _checked(base_id, ids.BASE_MODEL)

    def checkpoint(self, job_id: str, step: int, fence: int) -> Path:
        return self.checkpoints(job_id) / f"{step:d}-{fence:d}"

    def checkpoints(self, job_id: str) -> Path:
        """The directory of all checkpoints of a job."""
        return self.root / "checkpoints" / _checked(job_id, ids.JOB)

    def adapter(self, version_id: str) -> Path:
        return self.root / "adapters" / _checked(version_id, ids.ADAPTER_VERSION)


def _checked(text: str, prefix: str) -> str:
    if not ids.is_id(text, prefix):
        raise NotFound
    return text
