"""What a trainer process believes to hold, for the state machine: it may be wrong about all of it."""

from dataclasses import dataclass, field

from shared.jobs import Claim
from shared.store.adapters import PreparedVersion


@dataclass
class Hand:
    """One job in a trainer's hands, whether it still owns it or not; `order` is what the last beat brought."""

    claim: Claim
    step: int = 0
    order: str = "go_on"
    prepared: PreparedVersion | None = None


@dataclass
class Trainer:
    """One trainer process. A stopped one (SIGSTOP) does nothing, and goes on with what it believes once it wakes."""

    name: str
    slots: int
    base: str | None = None
    stopped: bool = False
    lives: int = 1
    hands: list[Hand] = field(default_factory=list)

    @property
    def has_room(self) -> bool:
        """True if it would look for another job."""
        return not self.stopped and len(self.hands) < self.slots

    def take(self, claim: Claim) -> None:
        self.base = claim.base_model_id
        self.hands.append(Hand(claim))

    def restart(self) -> None:
        """The process is gone with all that it held, and another stands in its place."""
        name, _, _ = self.name.partition(".")
        self.lives += 1
        self.name, self.base, self.stopped, self.hands = f"{name}.{self.lives}", None, False, []
