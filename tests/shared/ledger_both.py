"""The real ledger and its model, asked the same and held to the same answers."""

from collections.abc import Callable

from shared.jobs import Claim
from shared.store.adapters import PreparedVersion
from tests.shared.database_clock import START_MS
from tests.shared.ledger_calls import Ledger, sha256, told, weights_of
from tests.shared.ledger_model import LedgerModel


class BothLedgers:
    """Every method is one call on both; AssertionError if they differ. `agree` is False from then on."""

    def __init__(self, ledger: Ledger, followed: set[str] | None = None) -> None:
        """Both empty. `followed` gathers the names of all arcs that jobs have followed."""
        ledger.empty()
        self.ledger = ledger
        self.model = LedgerModel(now=START_MS, followed=set() if followed is None else followed)
        self.latest = START_MS
        self.agree = True

    def ask(self, verb: str, *arguments: object) -> object:
        """The answer to the verb of that name."""
        expected = getattr(self.model, verb)(*arguments)
        return self._same(verb, expected, lambda: getattr(self.ledger, verb)(*arguments))

    def submit(self, tenant: str, name: str, base: str, priority: int) -> str:
        """The new job's id, or 'full'."""
        self.set_clock(self.model.now + 1)
        expected = self.model.is_full(tenant)
        self.agree = False
        job_id = self.ledger.submit(tenant=tenant, name=name, base=base, priority=priority)
        assert (job_id == "full") == expected
        self.agree = True
        if not expected:
            self.model.submit(job_id, tenant=tenant, name=name, base=base, priority=priority)
        return job_id

    def claim(self, trainer: str, holds_base: str | None, max_running: int = 0) -> Claim | None:
        self.set_clock(self.model.now + 1)
        expected = self.model.claim(trainer, holds_base, max_running)
        self.agree = False
        claim = self.ledger.claim(trainer, holds_base, max_running)
        assert told(claim) == expected, f"claim: the ledger answers {told(claim)}, the model {expected}"
        self.agree = True
        return claim

    def publish(self, claim: Claim, prepared: PreparedVersion) -> object:
        expected = self.model.publish(claim, prepared.version_id, sha256(weights_of(claim)))
        return self._same("publish", expected, lambda: self.ledger.publish(claim, prepared))

    def set_clock(self, ms: int) -> None:
        self.model.now = ms
        self.latest = max(self.latest, ms)
        self.ledger.set_clock(ms)

    def _same(self, verb: str, expected: object, call: Callable[[], object]) -> object:
        self.agree = False
        answer = call()
        assert answer == expected, f"{verb}: the ledger answers {answer}, the model {expected}"
        self.agree = True
        return answer
