"""The adapters in the model's memory: read on other threads, attached between steps, least recently used out."""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Final, Protocol

import torch

from shared.errors import IncompatibleAdapter
from shared.specs import AdapterShare
from worker.lora.bank import AdapterBank
from worker.lora.bank_route import PackedAdapter
from worker.lora.format import AdapterFiles, StoredAdapter

READ_AHEAD: Final = 4
"""How many adapters may be read, or lie read and waiting for room, at one time; a mix of more may by itself."""
NUM_LOADERS: Final = 2
"""Threads that read, one core each: so that a small adapter does not wait behind a large one."""

Shares = Sequence[AdapterShare]
Locate = Callable[[str], StoredAdapter | Path]
"""Where a version's files are. A bare directory is read without checksums."""


class Readiness(Enum):
    READY = auto()
    LOADING = auto()
    NO_ROOM = auto()  # read, but everything that could make way is in use


class LoadMeter(Protocol):
    """Who is told of adapters that come and go; `seconds` is what reading and attaching took."""

    def adapter_loaded(self, version_id: str, seconds: float, size_bytes: int) -> None: ...
    def adapter_evicted(self, version_id: str) -> None: ...


@dataclass(frozen=True)
class _Read:
    packed: PackedAdapter
    digest: str
    seconds: float


@dataclass
class _Resident:
    digest: str
    size_bytes: int
    pins: int = 0


class ResidentAdapters:
    """Adapters by version id under a byte budget. All methods are for the thread that owns the model.

    What a request needs, one adapter or a mix, is pinned whole or not at all, so that two mixes never wait for each
    other's parts. `locate` says where the files are and is called on a loader's thread, as everything is that takes
    time; what it raises is the answer of the requests that wait for this adapter. `on_read` is called, on either
    thread, once asking again will tell. A version id names the same weights forever: nothing is read again to see.
    Beside the budget there are at most `READ_AHEAD` adapters, or one mix, that are read and not attached yet.
    """

    def __init__(
        self,
        bank: AdapterBank,
        *,
        locate: Locate,
        budget_bytes: int,
        on_read: Callable[[], None],
        meter: LoadMeter | None = None,
    ) -> None:
        self._bank = bank
        self._locate = locate
        self._budget_bytes = budget_bytes
        self._on_read = on_read
        self._meter = meter
        self._resident: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._size_bytes = 0
        self._reading: dict[str, Future[_Read]] = {}
        self._first: frozenset[str] = frozenset()  # what the first that waits needs: evicted for nobody else
        self._soon: frozenset[str] = frozenset()  # what is needed near the front: evicted last
        self._lacked_room = False  # since `prefetch` was last called
        self._loaders = _loaders()

    @property
    def resident(self) -> tuple[str, ...]:
        """Version ids in memory, least recently used first."""
        return tuple(self._resident)

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def num_pins(self) -> int:
        """How often adapters were acquired and not released yet."""
        return sum(one.pins for one in self._resident.values())

    def acquire(self, shares: Shares) -> Readiness:
        """READY: all of them are attached, and stay until `release`. Else they are on their way; ask again.

        Raises what went wrong if one could not be read, does not fit, or if all together exceed the budget. Asking
        again then starts anew.
        """
        absent = [share.version_id for share in shares if share.version_id not in self._resident]
        if absent and (readiness := self._bring(shares, absent)) is not Readiness.READY:
            return readiness
        for share in shares:
            self._resident[share.version_id].pins += 1
            self._resident.move_to_end(share.version_id)
        return Readiness.READY

    def release(self, shares: Shares) -> None:
        """Undo one `acquire` of the same."""
        for share in shares:
            one = self._resident[share.version_id]
            assert one.pins, f"{share.version_id} is not in use"
            one.pins -= 1
            self._resident.move_to_end(share.version_id)

    def digests(self, shares: Shares) -> list[tuple[str, float]]:
        """Digest of the files and weight of each of the adapters, which are acquired."""
        return [(self._resident[share.version_id].digest, share.weight) for share in shares]

    def prefetch(self, waiting: Iterable[Shares]) -> None:
        """Read ahead for the requests that wait, given in queue order, and drop what was read for others.

        Whole requests at a time, the first always: there is never a part of a mix read without place for the rest.
        """
        window: dict[str, None] = {}
        soon: set[str] = set()
        first: frozenset[str] = frozenset()
        for shares in waiting:
            if len(window) >= READ_AHEAD:
                break
            needed = [share.version_id for share in shares]
            first = first or frozenset(needed)
            absent = [name for name in needed if name not in self._resident and name not in window]
            if window and len(window) + len(absent) > READ_AHEAD:
                continue  # as `acquire` decides too: what one of them starts the other must not drop
            window.update(dict.fromkeys(absent))
            soon.update(needed)
        if self._lacked_room and first != self._first:
            self._on_read()  # what was kept for another may now make way
        self._lacked_room = False
        self._first, self._soon = first, frozenset(soon)
        for name in [name for name in self._reading if name not in window]:
            if self._reading[name].done() or self._reading[name].cancel():
                del self._reading[name]
        self._start(window)

    def close(self) -> None:
        """Start no more loads; does not wait for one that runs."""
        self._loaders.shutdown(wait=False, cancel_futures=True)

    # -- on their way

    def _start(self, names: Iterable[str]) -> None:
        for name in names:
            if name not in self._reading:
                self._reading[name] = future = self._loaders.submit(self._read, name)
                future.add_done_callback(lambda _: self._on_read())

    def _bring(self, shares: Shares, absent: Sequence[str]) -> Readiness:
        """Attach the absent ones if all of them are read and there is room."""
        unread = [name for name in absent if name not in self._reading]
        if unread and (not self._reading or len(self._reading) + len(unread) <= READ_AHEAD):
            self._start(unread)
        for name in absent:
            future = self._reading.get(name)
            if future is not None and future.done() and (error := future.exception()) is not None:
                self._give_up([name])
                raise error
        if any(name not in self._reading or not self._reading[name].done() for name in absent):
            return Readiness.LOADING
        reads = {name: self._reading[name].result() for name in absent}
        try:
            if not self._make_room(shares, sum(read.packed.size_bytes for read in reads.values())):
                self._lacked_room = True
                return Readiness.NO_ROOM
            for name, read in reads.items():
                self._attach(name, read)
        except BaseException:
            self._give_up(absent)
            raise
        for name in absent:
            del self._reading[name]
        return Readiness.READY

    def _give_up(self, names: Sequence[str]) -> None:
        """Forget these reads, and have everyone asked again: others may now have the places."""
        for name in names:
            self._reading.pop(name, None)
        self._on_read()

    def _attach(self, name: str, read: _Read) -> None:
        started_s = time.monotonic()
        self._bank.attach(name, read.packed)
        self._resident[name] = _Resident(read.digest, read.packed.size_bytes)
        self._size_bytes += read.packed.size_bytes
        if self._meter is not None:
            self._meter.adapter_loaded(name, read.seconds + time.monotonic() - started_s, read.packed.size_bytes)

    def _make_room(self, shares: Shares, size_bytes: int) -> bool:
        """Remove unused adapters, oldest use first, until `size_bytes` more fit; False, removing none, if that cannot
        do. What the same request needs stays, and so does what the first in the queue needs."""
        own = {share.version_id for share in shares}
        total_bytes = size_bytes + sum(self._resident[name].size_bytes for name in own if name in self._resident)
        if total_bytes > self._budget_bytes:
            raise IncompatibleAdapter(
                f"{_called(shares)} {total_bytes} bytes; this server holds {self._budget_bytes} bytes of adapters"
            )
        excess = self._size_bytes + size_bytes - self._budget_bytes
        victims = []
        for name in self._unused(own | self._first):
            if excess <= 0:
                break
            victims.append(name)
            excess -= self._resident[name].size_bytes
        if excess > 0:
            return False
        for name in victims:
            self._evict(name)
        return True

    def _unused(self, kept: set[str]) -> Iterator[str]:
        """Adapters that nobody uses, in the order in which they should go."""
        later = []
        for name, one in self._resident.items():
            if one.pins or name in kept:
                continue
            if name in self._soon:
                later.append(name)
            else:
                yield name
        yield from later

    def _evict(self, name: str) -> None:
        self._bank.detach(name)
        self._size_bytes -= self._resident.pop(name).size_bytes
        if self._meter is not None:
            self._meter.adapter_evicted(name)

    # -- on a loader's thread

    def _read(self, name: str) -> _Read:
        started_s = time.monotonic()
        stored = self._located(name)
        try:
            files = AdapterFiles(stored)
            try:
                packed = self._bank.pack(files.parse(), name=name)
            finally:  # that the bytes are not what was stored is the better reason
                digest = files.digest()
        except Exception:
            self._locate(name)  # a version that was deleted while it was read is not damaged, but not found
            raise
        return _Read(packed, digest, time.monotonic() - started_s)

    def _located(self, name: str) -> StoredAdapter:
        found = self._locate(name)
        return found if isinstance(found, StoredAdapter) else StoredAdapter(found)


def _called(shares: Shares) -> str:
    names = [share.version_id for share in shares]
    return f"adapter {names[0]} has" if len(names) == 1 else f"the adapters {', '.join(names)} together have"


def _loaders() -> ThreadPoolExecutor:
    """Threads on which every torch operation uses one core, so that decoding keeps the others.

    torch keeps the number that a thread uses by thread, but also as the default for threads that compute for the first
    time later; so the loaders start now, and the default is put back before anyone else can meet it.
    """
    num_threads = torch.get_num_threads()
    capped = threading.Barrier(NUM_LOADERS + 1)

    def cap() -> None:
        torch.get_num_threads()  # what a thread asks for first sets the default, which must not come later
        torch.set_num_threads(1)
        capped.wait()

    loaders = ThreadPoolExecutor(NUM_LOADERS, thread_name_prefix="adapter-loader", initializer=cap)
    for _ in range(NUM_LOADERS):
        loaders.submit(lambda: None)
    capped.wait()
    torch.set_num_threads(num_threads)
    return loaders
