"""Several calls on one job at the same moment, and what the model allows of them: any order, but one after another."""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from shared.jobs import Claim
from shared.store.adapters import PreparedVersion
from tests.shared.ledger_both import BothLedgers
from tests.shared.ledger_calls import Ledger, comparable, sha256, told, weights_of
from tests.shared.ledger_model import LedgerModel
from tests.shared.ledger_rows import LEASE_MS, MAX_ATTEMPTS

TENANT: Final = "acme"
NAME: Final = "math"


@dataclass
class Scene:
    """One job in some state on both ledgers; `claim` is that of a trainer, who may have lost it since."""

    both: BothLedgers
    job_id: str
    claim: Claim | None = None
    prepared: PreparedVersion | None = None

    def hand_out(self) -> Claim:
        """Let the trainer claim the job."""
        self.claim = self.both.claim("t1", None)
        if self.claim is None:
            raise AssertionError
        return self.claim

    def ask(self, *verbs: str) -> None:
        """Let the job's user ask this of it."""
        for verb in verbs:
            self.both.ask(verb, TENANT, self.job_id)

    def pass_time(self, ms: int) -> None:
        self.both.set_clock(self.both.model.now + ms)


def make_scene(ledger: Ledger, state: str) -> Scene:
    """An empty ledger but for one job in one of STATES, and an older version of the adapter that it will publish."""
    both = BothLedgers(ledger)
    older = Scene(both, _submit(both)).hand_out()
    both.publish(older, ledger.prepare(older))
    scene = Scene(both, _submit(both))
    STATES[state](scene)
    if scene.claim is not None:
        scene.prepared = ledger.prepare(scene.claim)
    return scene


def _submit(both: BothLedgers) -> str:
    return both.submit(TENANT, NAME, both.ledger.bases[0], 0)


def _running(scene: Scene, *asked: str) -> None:
    scene.hand_out()
    scene.ask(*asked)


def _lost(scene: Scene, *asked: str) -> None:
    """The lease has run out, and nobody has seen it yet."""
    _running(scene, *asked)
    scene.pass_time(LEASE_MS + 1)


def _lost_for_the_last_time(scene: Scene) -> None:
    for _ in range(MAX_ATTEMPTS - 1):
        _lost(scene)
        scene.both.ask("sweep", True)
        scene.pass_time(10 * LEASE_MS)
    _lost(scene)


def _taken_over(scene: Scene) -> None:
    _lost(scene)
    zombie = scene.claim
    scene.both.ask("sweep", True)
    scene.pass_time(10 * LEASE_MS)
    scene.hand_out()
    scene.claim = zombie


STATES: Final[Mapping[str, Callable[[Scene], None]]] = {
    "queued": lambda scene: None,
    "running": _running,
    "asked to pause": lambda scene: _running(scene, "pause"),
    "asked to cancel": lambda scene: _running(scene, "cancel"),
    "lost": _lost,
    "asked to pause, then lost": lambda scene: _lost(scene, "pause"),
    "lost for the last time": _lost_for_the_last_time,
    "taken over": _taken_over,
    "paused": lambda scene: scene.ask("pause"),
}

Call = Callable[[Scene, Any], object]
"""A call on the second argument, a scene's ledger or its model; its answer is the same if both do the same."""

CALLS: Final[Mapping[str, Call]] = {
    "cancel": lambda scene, on: on.cancel(TENANT, scene.job_id),
    "pause": lambda scene, on: on.pause(TENANT, scene.job_id),
    "resume": lambda scene, on: on.resume(TENANT, scene.job_id),
    "delete": lambda scene, on: on.delete(TENANT, NAME),
    "delete_version": lambda scene, on: on.delete_version(TENANT, NAME, 1),
    "claim": lambda scene, on: _told(on.claim("t2", None)),
    "take_back": lambda scene, on: _unanswered(on.take_back("t1", ())),
    "sweep": lambda scene, on: _unanswered(on.sweep(True)),
    "mark_rung": lambda scene, on: on.mark_rung(),
}

OWNER_CALLS: Final[Mapping[str, Call]] = {
    "beat": lambda scene, on: on.beat(scene.claim, 7),
    "note": lambda scene, on: on.note(scene.claim, "note"),
    "checkpoint": lambda scene, on: on.checkpoint(scene.claim, 5),
    "publish": lambda scene, on: _publish(scene, on),
    "fail": lambda scene, on: on.fail(scene.claim),
    "give_back": lambda scene, on: on.give_back(scene.claim, True),
    "shut_down": lambda scene, on: on.give_back(scene.claim, False),
    "give_back_for_storage": lambda scene, on: on.give_back_for_storage(scene.claim),
}

ONCE: Final = frozenset({"checkpoint"})
"""What an owner never does twice."""


def calls_in(scene: Scene) -> dict[str, Call]:
    """The calls that make sense in a scene."""
    return {**CALLS, **(OWNER_CALLS if scene.claim is not None else {})}


def allowed(scene: Scene, calls: Sequence[Call]) -> Iterator[tuple[list[object], dict[str, Any]]]:
    """For each order of the calls: their answers, in the order given, and how all is left."""
    for order in itertools.permutations(range(len(calls))):
        model = copy.deepcopy(scene.both.model)
        answers: list[object] = [None] * len(calls)
        for place in order:
            answers[place] = calls[place](scene, model)
        yield answers, _left_in_model(model)


def left(ledger: Ledger) -> dict[str, Any]:
    """How all jobs and versions are left."""
    seen = ledger.snapshot()
    return {
        "jobs": {job_id: comparable(row) for job_id, row in seen.jobs.items()},
        "outcomes": {job_id: [row["outcome"] for row in rows] for job_id, rows in seen.attempts.items()},
        "versions": {key: (row["job_id"], row["version"], row["state"]) for key, row in seen.versions.items()},
        "adapters": {name for (_, name), lives in seen.adapters.items() if lives},
    }


def _left_in_model(model: LedgerModel) -> dict[str, Any]:
    versions = model.versions.values()
    return {
        "jobs": {job_id: job.row() for job_id, job in model.jobs.items()},
        "outcomes": {job_id: [a.outcome for a in job.attempts] for job_id, job in model.jobs.items() if job.attempts},
        "versions": {v.id: (v.job_id, v.number, "ready" if v.deleted_at is None else "deleted") for v in versions},
        "adapters": {v.name for v in versions if v.deleted_at is None},
    }


def _told(claim: object) -> object:
    return told(claim) if isinstance(claim, Claim) else claim


def _unanswered(_counts: object) -> None:
    """Two that do the same work at once may share it, so how much each did says nothing."""


def _publish(scene: Scene, on: Any) -> object:
    if scene.claim is None or scene.prepared is None:
        raise AssertionError
    if isinstance(on, LedgerModel):
        return on.publish(scene.claim, scene.prepared.version_id, sha256(weights_of(scene.claim)))
    return on.publish(scene.claim, scene.prepared)
