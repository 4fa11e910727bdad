from dataclasses import dataclass
from typing import Final

from shared.tables import JobState


@dataclass(frozen=True)
class Arc:
    source: JobState | None
    target: JobState
    event: str
    sentence: str


ARCS: Final[dict[str, Arc]] = {}


def diagram() -> str:
    raise NotImplementedError
