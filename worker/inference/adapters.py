"""The adapters in the model's memory: read on another thread, attached between steps, least recently used out."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Final

from shared.errors import IncompatibleAdapter
from worker.lora.format import LoadedAdapter, read_adapter
from worker.lora.manager import AdapterManager

READ_AHEAD: Final = 4
"""How many adapters may be read, or lie read and waiting for room, at one time."""


class Readiness(Enum):
    READY = auto()
    LOADING = auto()
    NO_ROOM = auto()  # read, but everything that could make way is in use


@dataclass(frozen=True)
class _Read:
    adapter: LoadedAdapter
    digest: str
    size_bytes: int


@dataclass
class _Resident:
    digest: str
    size_bytes: int
    pins: int = 0


class ResidentAdapters:
    """Adapters by version id under a byte budget. All methods are for the thread that owns the model.

    `locate` gives an adapter's directory and is called on the loader's thread. `on_read` is called, on either thread,
    once a read has ended well or badly and asking again will tell. A version id names the same weights forever, so
    nothing is read again to see.
    """

    def __init__(
        self,
        manager: AdapterManager,
        *,
        locate: Callable[[str], Path],
        budget_bytes: int,
        on_read: Callable[[], None],
    ) -> None:
        self._manager = manager
        self._locate = locate
        self._budget_bytes = budget_bytes
        self._on_read = on_read
        self._resident: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._reading: dict[str, Future[_Read]] = {}
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")

    @property
    def resident(self) -> tuple[str, ...]:
        """Version ids in memory, least recently used first."""
        return tuple(self._resident)

    @property
    def size_bytes(self) -> int:
        return sum(one.size_bytes for one in self._resident.values())

    def acquire(self, version_id: str) -> Readiness:
        """READY: the adapter is attached, and stays until `release`. Else it is on its way; ask again.

        Raises what went wrong if it could not be read or does not fit; asking again then starts anew.
        """
        if version_id not in self._resident:
            readiness = self._bring(version_id)
            if readiness is not Readiness.READY:
                return readiness
        self._resident[version_id].pins += 1
        self._resident.move_to_end(version_id)
        return Readiness.READY

    def release(self, version_id: str) -> None:
        """Undo one `acquire`."""
        self._resident[version_id].pins -= 1

    def digest(self, version_id: str) -> str:
        """SHA-256 over the weights of an acquired adapter."""
        return self._resident[version_id].digest

    def forget_reads_except(self, wanted: Collection[str]) -> None:
        """Drop what was read or is being read for requests that have gone."""
        for version_id in self._reading.keys() - set(wanted):
            self._reading.pop(version_id).cancel()

    def close(self) -> None:
        """Start no more loads; does not wait for one that runs."""
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _bring(self, version_id: str) -> Readiness:
        future = self._reading.get(version_id)
        if future is None and len(self._reading) < READ_AHEAD:
            self._reading[version_id] = self._loader.submit(self._read, version_id)
            self._reading[version_id].add_done_callback(lambda _: self._on_read())
        if future is None or not future.done():
            return Readiness.LOADING
        if (error := future.exception()) is not None:
            del self._reading[version_id]
            raise error
        read = future.result()
        try:
            if not self._make_room(version_id, read.size_bytes):
                return Readiness.NO_ROOM
            self._manager.load_tensors(version_id, read.adapter)
        except BaseException:
            del self._reading[version_id]
            raise
        del self._reading[version_id]
        self._resident[version_id] = _Resident(read.digest, read.size_bytes)
        return Readiness.READY

    def _make_room(self, version_id: str, size_bytes: int) -> bool:
        """Remove unused adapters, oldest use first, until this one fits; False, removing none, if that cannot do."""
        if size_bytes > self._budget_bytes:
            raise IncompatibleAdapter(
                f"adapter {version_id} has {size_bytes} bytes; this server holds {self._budget_bytes} bytes of adapters"
            )
        excess = self.size_bytes + size_bytes - self._budget_bytes
        unused = [(name, one.size_bytes) for name, one in self._resident.items() if not one.pins]
        if sum(size for _, size in unused) < excess:
            return False
        for name, size in unused:
            if excess <= 0:
                break
            self._manager.remove(name)
            del self._resident[name]
            excess -= size
        return True

    def _read(self, version_id: str) -> _Read:
        adapter = read_adapter(self._locate(version_id))
        size_bytes = sum(half.nbytes for pair in adapter.tensors.values() for half in pair)
        return _Read(adapter, _digest(adapter), size_bytes)


def _digest(adapter: LoadedAdapter) -> str:
    """SHA-256, in hex, over each module's path, scaling, A and B, in order of path."""
    total = hashlib.sha256()
    for path, pair in sorted(adapter.tensors.items()):
        total.update(f"{path}\n{adapter.spec.scaling(path)!r}\n".encode())
        for half in pair:
            total.update(f"{tuple(half.shape)}\n".encode())
            total.update(half.contiguous().numpy().data)
    return total.hexdigest()
