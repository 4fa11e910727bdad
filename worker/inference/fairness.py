"""FairQueue: whose turn it is. Tenants share the model evenly by tokens, and a tenant's adapters share its part so.

The virtual token counter of Sheng et al. 2024, "Fairness in Serving Large Language Models", arXiv:2401.00588, at two
levels. A client's counter grows by what was computed for it, 1 per input token and 2 per output token, and whoever has
the least counter is served next. A client that comes back after a pause is lifted to the least counter of those that
wait, so that pauses save up nothing; one that has had more than the others keeps its debt. Two clients that wait all
the time differ by at most the price of what one may have running, whatever each of them sends.
"""

import heapq
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

from shared.specs import AdapterShare, GenerationRequest

INPUT_PRICE: Final = 1.0
OUTPUT_PRICE: Final = 2.0
MAX_WAIT_S: Final = 10.0
OVERDUE_EVERY: Final = 4
"""Of so many that leave the queue one may be overdue: with more, overload would turn fairness into arrival order."""
MAX_IDLE: Final = 1024
"""Counters kept of clients that do not wait. The lowest are forgotten first: they would be lifted anyway."""


class _Prompt(Protocol):
    @property
    def ids(self) -> Sequence[int]: ...


class Waiting(Protocol):
    """What the queue reads of a choice. Choices are told apart by identity."""

    @property
    def request(self) -> GenerationRequest: ...
    @property
    def adapters(self) -> tuple[AdapterShare, ...]: ...
    @property
    def prompt(self) -> _Prompt: ...
    @property
    def is_gone(self) -> bool: ...


C = TypeVar("C", bound=Waiting)
Adapters = tuple[AdapterShare, ...]


@dataclass(frozen=True, eq=False)
class _Place(Generic[C]):
    choice: C
    tenant: str
    adapters: Adapters
    arrived_s: float
    number: int

    @property
    def input_price(self) -> float:
        return INPUT_PRICE * len(self.choice.prompt.ids)


class FairQueue(Generic[C]):
    """The choices that wait. One thread at a time; `clock` counts seconds.

    Iterating gives them in the order in which they should be served, as if each had been served when the next is asked
    for; a loop over it may add and remove. First come first served within one adapter (or mix) of one tenant. The
    prompt is paid for when a choice leaves the queue, unless it is gone then: say first that it failed.
    """

    def __init__(self, *, max_wait_s: float = MAX_WAIT_S, clock: Callable[[], float] = time.monotonic) -> None:
        """A choice that waited longer than `max_wait_s` goes first, at least each OVERDUE_EVERY-th time."""
        self._max_wait_s = max_wait_s
        self._clock = clock
        self._places: dict[int, _Place[C]] = {}  # by id of the choice, in order of arrival
        self._lines: dict[str, dict[Adapters, dict[int, _Place[C]]]] = {}
        self._tenants = _Counters()
        self._adapters: dict[str, _Counters] = {}
        self._prepaid: WeakKeyDictionary[C, int] = WeakKeyDictionary()
        self._arrivals = 0
        self._departures = 0

    def add(self, choice: C) -> None:
        """Let it wait, behind those of its tenant and adapter."""
        assert id(choice) not in self._places, "a choice waits once"
        tenant, adapters = choice.request.tenant, tuple(choice.adapters)
        place = _Place(choice, tenant, adapters, self._clock(), self._arrivals)
        self._arrivals += 1
        self._prepaid.pop(choice, None)
        self._places[id(choice)] = place
        if tenant not in self._lines:
            self._lines[tenant] = {}
            self._tenants.enter(tenant)
        lines = self._lines[tenant]
        if adapters not in lines:
            lines[adapters] = {}
            self._adapters_of(tenant).enter(adapters)
        lines[adapters][place.number] = place

    def remove(self, choice: C) -> None:
        """Let it wait no more: it is served now, or it is gone. KeyError if it does not wait."""
        place = self._places.pop(id(choice))
        self._departures += 1
        if not choice.is_gone:
            self._prepaid[choice] = len(choice.prompt.ids)
            self._pay(place.tenant, place.adapters, place.input_price)
        lines = self._lines[place.tenant]
        del lines[place.adapters][place.number]
        if not lines[place.adapters]:
            del lines[place.adapters]
            self._adapters_of(place.tenant).leave(place.adapters)
        if not lines:
            del self._lines[place.tenant]
            for forgotten in self._tenants.leave(place.tenant):
                self._adapters.pop(str(forgotten), None)

    def charge(self, choice: C, num_input_tokens: int = 0, num_output_tokens: int = 0) -> None:
        """Tokens were computed for a choice. Input that was paid for when it left the queue costs nothing again."""
        if num_input_tokens:
            prepaid = self._prepaid.pop(choice, 0)
            if prepaid > num_input_tokens:
                self._prepaid[choice] = prepaid - num_input_tokens
            num_input_tokens = max(0, num_input_tokens - prepaid)
        price = INPUT_PRICE * num_input_tokens + OUTPUT_PRICE * num_output_tokens
        if price:
            self._pay(choice.request.tenant, tuple(choice.adapters), price)

    def __len__(self) -> int:
        return len(self._places)

    def everyone(self) -> list[C]:
        """The choices that wait, in order of arrival: cheaper than in the order in which they should be served."""
        return [place.choice for place in self._places.values()]

    def __contains__(self, choice: object) -> bool:
        return id(choice) in self._places

    def __iter__(self) -> Iterator[C]:
        fair, by_age = self._in_turn(), iter(list(self._places.values()))
        given: set[int] = set()
        for turn in range(self._departures, self._departures + len(self._places)):
            place = None
            if turn % OVERDUE_EVERY == 0:
                place = next((p for p in by_age if self._still_waits(p, given)), None)
                if place is not None and self._clock() - place.arrived_s <= self._max_wait_s:
                    place, by_age = None, iter(())
            if place is None:
                place = next((p for p in fair if self._still_waits(p, given)), None)
            if place is None:
                return
            given.add(place.number)
            yield place.choice

    def counter(self, tenant: str, adapters: Adapters | None = None) -> float:
        """What the tenant, or one adapter within it, has been charged, lifts included."""
        return self._tenants[tenant] if adapters is None else self._adapters_of(tenant)[adapters]

    def _still_waits(self, place: _Place[C], given: set[int]) -> bool:
        return place.number not in given and self._places.get(id(place.choice)) is place

    def _in_turn(self) -> Iterator[_Place[C]]:
        """By counters alone; those who wait now, whoever comes or goes meanwhile."""
        tenants: list[tuple[float, Iterator[_Place[C]]]] = []
        for tenant, lines in self._lines.items():
            counters = self._adapters_of(tenant)
            of_adapters = [(counters[adapters], iter(list(line.values()))) for adapters, line in lines.items()]
            tenants.append((self._tenants[tenant], _by_counter(of_adapters)))
        return _by_counter(tenants)

    def _pay(self, tenant: str, adapters: Adapters, price: float) -> None:
        self._tenants.charge(tenant, price)
        self._adapters_of(tenant).charge(adapters, price)

    def _adapters_of(self, tenant: str) -> "_Counters":
        return self._adapters.setdefault(tenant, _Counters())


def _by_counter(clients: list[tuple[float, Iterator[_Place[C]]]]) -> Iterator[_Place[C]]:
    """Each time the first of the client with the least counter, which then pays for it; of equals the oldest."""
    heap: list[tuple[float, int, _Place[C], Iterator[_Place[C]]]] = []
    for counter, line in clients:
        if (first := next(line, None)) is not None:
            heap.append((counter, first.number, first, line))
    heapq.heapify(heap)
    while heap:
        counter, _, place, line = heap[0]
        yield place
        following = next(line, None)
        if following is None:
            heapq.heappop(heap)
        else:
            heapq.heapreplace(heap, (counter + place.input_price, following.number, following, line))


class _Counters:
    """Virtual token counters of clients that compete for one thing, and who of them waits."""

    def __init__(self) -> None:
        self._counters: dict[Hashable, float] = {}
        self._waiting: set[Hashable] = set()
        self._last: Hashable = None
        self._floor = 0.0

    def __getitem__(self, client: Hashable) -> float:
        return self._counters.get(client, self._floor)

    def charge(self, client: Hashable, price: float) -> None:
        self._counters[client] = self[client] + price

    def enter(self, client: Hashable) -> None:
        """It waits from now on, lifted to the least of those that wait, or if none does, to who waited last."""
        if self._waiting:
            self._floor = max(self._floor, min(self._counters[other] for other in self._waiting))
        else:
            self._floor = max(self._floor, self._counters.get(self._last, 0.0))
        self._counters[client] = max(self[client], self._floor)
        self._waiting.add(client)

    def leave(self, client: Hashable) -> list[Hashable]:
        """It waits no more. Returns the clients that are forgotten for want of room."""
        self._waiting.remove(client)
        self._last = client
        if len(self._counters) - len(self._waiting) <= MAX_IDLE:
            return []
        idle = sorted(self._counters.keys() - self._waiting - {client}, key=self._counters.__getitem__)
        forgotten = idle[: len(idle) // 2]
        for other in forgotten:
            del self._counters[other]
        return forgotten
