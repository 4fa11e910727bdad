"""Rules that mend the ledger. All are idempotent; several sweepers may run."""

from dataclasses import dataclass

from shared.db import Tx


@dataclass(frozen=True, kw_only=True)
class Swept:
    """What one sweep found. `ring`: jobs wait and no doorbell rang for them lately."""

    ring: bool
    waiting: int
    requeued: int
    failed: int
    cancelled: int
    paused: int


def sweep(tx: Tx, *, may_expire: bool, lease_s: float = 60.0) -> Swept:
    """Carry out what is due. `may_expire` False leaves expired leases alone."""
    raise NotImplementedError


def mark_rung(tx: Tx) -> None:
    """Note that the doorbell rang for everything that waits now."""
    raise NotImplementedError
