"""A Hypothesis state machine: users, trainers and sweepers in any order, on the real ledger and its model side by side.

Each step asks both the same and compares the answers; after each, all rows are compared with the model, and the facts
that nobody may break are checked on the rows alone. Arguments are small numbers that pick among what exists, so that a
failing run reads and repeats well although ids differ each time.
"""

from collections.abc import Sequence
from typing import Final, TypeVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shared.jobs import Claim
from tests.shared.ledger_both import BothLedgers
from tests.shared.ledger_calls import Ledger
from tests.shared.ledger_facts import Facts, check_agreement
from tests.shared.ledger_rows import ENDED, LEASE_MS, MAX_QUEUED, MAX_STORAGE_FAILURES, UNUSED_MS
from tests.shared.ledger_trainers import Hand, Trainer

TENANTS: Final = ("acme", "rival", "modest")
NAMES: Final = ("math", "poems")
PRIORITIES: Final = (0, 0, 0, 0, 5, -5)
JUMPS_S: Final = (1, 31, 61, 601, -61, -3600)
HOUR_MS: Final = 3_600_000
OWNER_VERBS: Final = ("beat", "note", "checkpoint", "fail", "give_back", "give_back_for_storage", "obey", "publish")
STEPS: Final = (
    *("ring", "ring", "submit", "submit", "cancel", "pause", "resume", "interrupt", "interrupt", "delete"),
    *("beat", "beat", "report", "save", "obey", "obey", "prepare", "publish", "publish"),
    *("fail", "give_back", "fill_disk", "crash", "shut_down", "lose_answer", "stop_or_wake"),
    *("zombie", "zombie", "zombie", "sweep", "expire", "poison", "take_over", "take_over", "jump"),
)
"""What can happen, by the names of the machine's methods."""

T = TypeVar("T")


class LedgerMachine(RuleBasedStateMachine):
    """One rule performs all steps: of several, Hypothesis would leave out most in each run, and where nobody claims, or
    no time passes, nothing else happens either. `which` and `flag` mean something else to each step."""

    def __init__(self, ledger: Ledger, followed: set[str]) -> None:
        """`followed` gathers the names of all arcs that jobs have followed."""
        super().__init__()
        self.both = BothLedgers(ledger, followed)
        self.ledger = ledger
        self.model = self.both.model
        self.trainers = [Trainer("t1", slots=1), Trainer("t2", slots=2), Trainer("t3", slots=2)]
        self.claims: list[Claim] = []
        self.facts = Facts()

    @initialize(number=st.integers(2, 6))
    def start(self, number: int) -> None:
        for place in range(number):
            self.both.submit(_pick(TENANTS, place // 2), "math", self.ledger.bases[place == 2], 0)
        self.ring(9, False)

    @rule(what=st.sampled_from(STEPS), which=st.integers(0, 11), flag=st.booleans())
    def step(self, what: str, which: int, flag: bool) -> None:
        getattr(self, what)(which, flag)

    # -- users

    def submit(self, which: int, flag: bool) -> None:
        name, base = NAMES[which % 2], self.ledger.bases[flag]
        for _ in range(MAX_QUEUED + 1 if which == 11 and flag else 1):
            self.both.submit(_pick(TENANTS, which), name, base, _pick(PRIORITIES, which))

    def cancel(self, which: int, flag: bool) -> None:
        self._ask_of_job("cancel", which, flag)

    def pause(self, which: int, flag: bool) -> None:
        self._ask_of_job("pause", which, flag)

    def resume(self, which: int, flag: bool) -> None:
        self._ask_of_job("resume", which, flag)

    def _ask_of_job(self, verb: str, which: int, flag: bool) -> None:
        """Of any job, mostly of one that runs or is paused; now and then as somebody whose job it is not."""
        likely = self.model.in_state("running", "paused")
        job = _pick(likely if likely and which < 6 else list(self.model.jobs.values()), which)
        self.both.ask(verb, "stranger" if flag and which > 8 else job.tenant, job.id)

    def interrupt(self, which: int, flag: bool) -> None:
        """Ask the job of a trainer at work to stop; the trainer hears of it at its next beat, or when it publishes."""
        for _, hand in self._picked_hand(which):
            for verb in ("pause", "cancel") if which > 8 else ("pause",) if flag else ("cancel",):
                self.both.ask(verb, hand.claim.tenant, hand.claim.job_id)
            if which % 3 == 0:
                self.publish(which, flag)
            elif which % 3 == 1:
                self.obey(which, flag)

    def delete(self, which: int, flag: bool) -> None:
        """Delete an adapter or one version, which may be deleted already; its bytes go a little later."""
        if not self.model.versions:
            return
        version = _pick(list(self.model.versions.values()), which)
        if flag:
            self.both.ask("delete", version.tenant, version.name)
        else:
            self.both.ask("delete_version", version.tenant, version.name, version.number)
        self.both.set_clock(self.model.now + (which % 2) * (UNUSED_MS + 1))
        self.ledger.remove_deleted()
        for version in self.model.versions.values():
            gone = version.deleted_at is not None and version.deleted_at < self.model.now - UNUSED_MS
            assert not (gone and self.ledger.weights(version.id).exists())

    # -- trainers, which go on with what they have in hand whether they still own it or not

    def ring(self, which: int, flag: bool) -> None:
        """A doorbell, repeated or not: all trainers look once, or one looks until there is nothing more for it."""
        if which > 8:
            for trainer in self.trainers:
                if trainer.has_room:
                    self._claim(trainer)
            return
        if flag:
            self.both.set_clock(self.model.now + LEASE_MS + 1)  # some wait too long to be passed over any more
        trainer = _pick(self.trainers, which)
        while trainer.has_room and self._claim(trainer, max_running=which // 3):
            pass

    def beat(self, which: int, flag: bool) -> None:
        for _, hand in self._picked_hand(which):
            hand.step += flag
            hand.order = str(self.both.ask("beat", hand.claim, hand.step if flag else None))

    def report(self, which: int, flag: bool) -> None:
        for _, hand in self._picked_hand(which):
            self.both.ask("note", hand.claim, f"note of step {hand.step}")

    def save(self, which: int, flag: bool) -> None:
        for _, hand in self._picked_hand(which):
            for _ in range(1 + flag):
                hand.step += 1 + which  # so that a later claim's checkpoints may be of fewer steps
                self.both.ask("checkpoint", hand.claim, hand.step)

    def obey(self, which: int, flag: bool) -> None:
        """Stop as the last beat said, which may be long ago; if nobody was told to, whoever beats now and is told."""
        for trainer, hand in self._hands():
            if hand.order == "go_on":
                hand.order = str(self.both.ask("beat", hand.claim, None))
            if hand.order in ("cancel", "pause"):
                self.both.ask("obey", hand.claim, hand.order)
                trainer.hands.remove(hand)
                return

    def prepare(self, which: int, flag: bool) -> None:
        """The training is over and its files are durable, but nothing is published yet."""
        for _, hand in self._picked_hand(which):
            hand.prepared = hand.prepared or self.ledger.prepare(hand.claim)

    def publish(self, which: int, flag: bool) -> None:
        self.prepare(which, flag)
        for trainer, hand in self._picked_hand(which):
            if hand.prepared is None:
                raise AssertionError
            if self.both.publish(hand.claim, hand.prepared) == "cancel_requested":
                hand.order = "cancel"
            else:
                trainer.hands.remove(hand)

    def fail(self, which: int, flag: bool) -> None:
        self._give_up(which, "fail")

    def give_back(self, which: int, flag: bool) -> None:
        self._give_up(which, "give_back", True)

    def fill_disk(self, which: int, flag: bool) -> None:
        """A full disk, or with `flag` one that stays full for whoever claims next."""
        self._give_up(which, "give_back_for_storage")
        for _ in range(MAX_STORAGE_FAILURES * flag):
            self.both.set_clock(max([self.model.now, *(job.not_before for job in self.model.in_state("queued"))]))
            if self._claim(Trainer("victim", slots=1)):
                self.both.ask("give_back_for_storage", self.claims[-1])

    def _give_up(self, which: int, verb: str, *arguments: object) -> None:
        for trainer, hand in self._picked_hand(which):
            self.both.ask(verb, hand.claim, *arguments)
            trainer.hands.remove(hand)

    def crash(self, which: int, flag: bool) -> None:
        _pick(self.trainers, which).restart()

    def shut_down(self, which: int, flag: bool) -> None:
        """SIGTERM: all is given back, uncharged."""
        for trainer, _ in self._picked_hand(which):
            for hand in trainer.hands:
                self.both.ask("give_back", hand.claim, False)
            trainer.restart()

    def lose_answer(self, which: int, flag: bool) -> None:
        """The answer to a claim never came; if the trainer knows that one is missing, it gives all such back."""
        if self._picked_hand(which):
            trainer = max(self.trainers, key=lambda trainer: len(trainer.hands) * (not trainer.stopped))
            if trainer.has_room:
                self._claim(trainer)
            trainer.hands.pop()
            if flag:
                self.both.ask("take_back", trainer.name, [held.claim.job_id for held in trainer.hands])

    def stop_or_wake(self, which: int, flag: bool) -> None:
        trainer = _pick(self.trainers, which)
        trainer.stopped = not trainer.stopped

    def zombie(self, which: int, flag: bool) -> None:
        """Somebody acts on a claim that was lost, mostly to an heir at work, or has ended; nothing is written."""
        lost = [claim for claim in reversed(self.claims) if not self.model.owns(claim)]
        if not lost:
            return
        robbed = [claim for claim in lost if self.model.jobs[claim.job_id].state == "running"]
        claim, verb = _pick(robbed or lost, which // 4), OWNER_VERBS[which % 4 + 4 * flag]
        before = self.ledger.snapshot()
        if verb == "publish":
            answer = self.both.publish(claim, self.ledger.prepare(claim))
        else:
            rest = {"note": ("zombie",), "checkpoint": (99,), "give_back": (which < 6,), "obey": ("cancel",)}
            answer = self.both.ask(verb, claim, *rest.get(verb, ()))

        assert answer == "lost"
        assert self.ledger.snapshot() == before

    # -- sweepers and the clock

    def sweep(self, which: int, flag: bool) -> None:
        """Without the right to take jobs, with it, with a limit to how long jobs may run; and it has rung, or not."""
        self.both.ask("sweep", which > 2, LEASE_MS * 2 if which > 8 else None)
        if flag:
            self.both.ask("mark_rung")
            self.both.set_clock(self.model.now + 1)
            self.both.ask("sweep", False)

    def expire(self, which: int, flag: bool) -> None:
        """A lease runs out to the millisecond: until then no sweeper takes the job, after it the first that may."""
        ends = [job.lease_expires_at for job in self.model.in_state("running") if job.lease_expires_at is not None]
        if not ends:
            return
        self.both.set_clock(max(self.model.now, _pick(ends, which)))
        self.both.ask("sweep", True)
        self.both.set_clock(self.model.now + 1)
        for may_expire in (False, True, *([True] * flag)):
            self.both.ask("sweep", may_expire)

    def take_over(self, which: int, flag: bool) -> None:
        """A trainer stands still for longer than its lease, and another one gets the job."""
        for _, hand in self._picked_hand(which):
            job = self.model.jobs[hand.claim.job_id]
            self.both.set_clock(max(self.model.now, (job.lease_expires_at or 0) + 1))
            self.both.ask("sweep", True)
            self.both.set_clock(max(self.model.now, job.not_before))
            heir = _pick(self.trainers, which + 1)
            heir.restart()
            self._claim(heir)
            self.zombie(which, flag)

    def poison(self, which: int, flag: bool) -> None:
        """A job that was lost before fails once more after its backoff, and takes the trainer with it or not."""
        back = [job.not_before for job in self.model.in_state("queued") if job.attempt]
        if not back:
            return
        self.both.set_clock(max(self.model.now, *back))
        victim = Trainer(f"victim-{self.model.now}", slots=1)
        if self._claim(victim) and flag:
            self.both.ask("give_back", self.claims[-1], True)
        elif victim.hands:
            self.both.set_clock(self.model.now + LEASE_MS + 1)
            self.both.ask("sweep", True)

    def jump(self, which: int, flag: bool) -> None:
        self.both.set_clock(self.model.now + _pick(JUMPS_S, which) * 1000)

    # -- what must hold

    @invariant()
    def rows_are_sound(self) -> None:
        self.both.agree = False
        seen = self.ledger.snapshot()
        check_agreement(self.model, seen)
        self.facts.check(seen, self.ledger)
        self.both.agree = True

    def teardown(self) -> None:
        """Nothing is stuck: trainers that do their work and sweepers end every job, the paused ones once resumed."""
        if not self.both.agree:
            return
        self._drain()
        assert {job.state for job in self.model.jobs.values()} <= ENDED | {"paused"}
        for job in self.model.in_state("paused"):
            self.both.ask("resume", job.tenant, job.id)
        self._drain()
        assert {job.state for job in self.model.jobs.values()} <= ENDED

    def _drain(self) -> None:
        """Two rounds: in the first, what the dead held comes back to the queue; the second is after its backoff."""
        fresh = Trainer("fresh", slots=1)
        for _ in range(2):
            self.both.set_clock(self.both.latest + HOUR_MS)
            self.both.ask("sweep", True)
            while self._claim(fresh):
                hand = fresh.hands.pop()
                hand.order = str(self.both.ask("beat", hand.claim, None))
                if hand.order == "go_on":
                    self.both.publish(hand.claim, self.ledger.prepare(hand.claim))
                else:
                    self.both.ask("obey", hand.claim, hand.order)
            self.rows_are_sound()

    # -- what the rules share

    def _claim(self, trainer: Trainer, max_running: int = 0) -> bool:
        """True if the trainer was given a job."""
        claim = self.both.claim(trainer.name, trainer.base, max_running)
        if claim is None:
            return False
        trainer.take(claim)
        self.claims.append(claim)
        return True

    def _picked_hand(self, which: int) -> list[tuple[Trainer, Hand]]:
        """A trainer that is not stopped, and one job in its hands; trainers without any look first."""
        if not self._hands():
            if not self.model.in_state("queued"):
                self.submit(which, False)
            self.ring(9, False)
        hands = self._hands()
        return [_pick(hands, which)] if hands else []

    def _hands(self) -> list[tuple[Trainer, Hand]]:
        return [(trainer, hand) for trainer in self.trainers if not trainer.stopped for hand in trainer.hands]


def _pick(items: Sequence[T], number: int) -> T:
    return items[number % len(items)]
