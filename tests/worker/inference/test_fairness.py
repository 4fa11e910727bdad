"""Whose turn it is: order within an adapter, equal shares, no starvation, no credit for pauses."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.specs import AdapterShare, GenerationRequest
from worker.inference.fairness import INPUT_PRICE, MAX_IDLE, OUTPUT_PRICE, OVERDUE_EVERY, FairQueue


@dataclass(eq=False)
class Prompt:
    ids: list[int]


@dataclass(eq=False)
class Choice:
    """What the queue reads of a choice, and how many tokens it will generate."""

    request: GenerationRequest
    adapters: tuple[AdapterShare, ...]
    prompt: Prompt
    num_output: int = 4
    is_gone: bool = False


def choice(tenant: str = "a", adapter: str | None = None, *, num_input: int = 8, num_output: int = 4) -> Choice:
    shares = () if adapter is None else (AdapterShare.model_construct(version_id=adapter, weight=1.0),)
    request = GenerationRequest(
        request_id="req-1", tenant=tenant, base_model_id="base-1", prompt="x", deadline_unix_s=0.0
    )  # fmt: skip
    return Choice(request, shares, Prompt([0] * num_input), num_output)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def fair_queue(max_wait_s: float = 1e9, clock: Clock | None = None) -> FairQueue[Choice]:
    return FairQueue(max_wait_s=max_wait_s, clock=clock or Clock())


@dataclass
class Server:
    """Serves `rows` choices side by side, a token each per step, as the engine does; counts what it computes."""

    queue: FairQueue[Choice]
    rows: int
    running: list[tuple[Choice, int]] = field(default_factory=list)
    served: Counter[str] = field(default_factory=Counter)
    order: list[Choice] = field(default_factory=list)

    def step(self) -> None:
        for waiting in self.queue:
            if len(self.running) == self.rows:
                break
            self.queue.remove(waiting)
            self.order.append(waiting)
            self.queue.charge(waiting, num_input_tokens=len(waiting.prompt.ids))
            self.served[waiting.request.tenant] += int(INPUT_PRICE * len(waiting.prompt.ids))
            self.running.append((waiting, waiting.num_output))
        for one, _ in self.running:
            self.queue.charge(one, num_output_tokens=1)
            self.served[one.request.tenant] += int(OUTPUT_PRICE)
        self.running = [(one, left - 1) for one, left in self.running if left > 1]


def drained(queue: FairQueue[Choice]) -> Iterator[Choice]:
    """Take the first one at a time until none is left."""
    while queue:
        first = next(iter(queue))
        queue.remove(first)
        yield first


def test_first_come_first_served_within_an_adapter() -> None:
    """Those of one tenant and one adapter keep their order, however long their prompts are."""
    queue = fair_queue()
    choices = [choice("a", "x", num_input=9 - number) for number in range(8)]
    for one in choices:
        queue.add(one)

    assert list(queue) == choices
    assert list(drained(queue)) == choices


def test_tenants_alternate() -> None:
    """One that comes behind ten of another is next after one of them, read at once or as it goes."""
    queue = fair_queue()
    many, one = [choice("a") for _ in range(10)], choice("b")
    for each in [*many, one]:
        queue.add(each)

    assert list(queue)[:3] == [many[0], one, many[1]]
    assert list(drained(queue))[:3] == [many[0], one, many[1]]


def test_adapters_of_a_tenant_alternate_and_take_nothing_from_others() -> None:
    """A tenant with nine adapters has half of the turns beside a tenant with one, and each adapter its part of them."""
    queue = fair_queue()
    for number in range(9):
        queue.add(choice("a", f"x{number}"))
        queue.add(choice("b", "y"))

    order = [(one.request.tenant, one.adapters[0].version_id) for one in queue]
    assert Counter(tenant for tenant, _ in order[:8]) == {"a": 4, "b": 4}
    assert len({name for tenant, name in order if tenant == "a"}) == 9


def test_a_mix_has_a_line_of_its_own() -> None:
    """What counts as an adapter is the whole mix: the same adapter alone waits in another line."""
    queue = fair_queue()
    mixed = choice("a", "x")
    mixed.adapters += choice("a", "y").adapters
    for one in [choice("a", "x"), choice("a", "x"), mixed]:
        queue.add(one)

    assert list(queue)[1] is mixed


def test_output_costs_twice_the_input() -> None:
    """The counters hold the prices: whoever got an output token stands behind one who got one input token."""
    queue = fair_queue()
    talks, reads = choice("a"), choice("b")
    queue.charge(talks, num_output_tokens=1)
    queue.charge(reads, num_input_tokens=1)

    assert (queue.counter("a"), queue.counter("b")) == (2.0, 1.0)


def test_a_prompt_is_paid_once() -> None:
    """Leaving the queue pays for the prompt; computing it in parts costs nothing more, computing it again does."""
    queue = fair_queue()
    one = choice("a", num_input=10)
    queue.add(one)
    queue.remove(one)
    paid = queue.counter("a")
    for part in (4, 6):
        queue.charge(one, num_input_tokens=part)
    after_reading = queue.counter("a")
    queue.charge(one, num_input_tokens=3)

    assert (paid, after_reading, queue.counter("a")) == (10.0, 10.0, 13.0)


def test_who_gives_up_waiting_pays_nothing() -> None:
    """A choice that is gone when it leaves costs its tenant nothing; one that is served does."""
    queue = fair_queue()
    gone, served = choice("a"), choice("b")
    for one in (gone, served):
        queue.add(one)
    gone.is_gone = True
    for one in (gone, served):
        queue.remove(one)

    assert (queue.counter("a"), queue.counter("b")) == (0.0, 8.0)


def test_a_pause_saves_nothing_up() -> None:
    """A tenant that comes back is lifted to the least counter of those that wait, so it has no more than its half."""
    queue = fair_queue()
    server = Server(queue, rows=1)
    for _ in range(50):
        queue.add(choice("a"))
        queue.add(choice("b"))
    for _ in range(100):
        server.step()
    queue.add(choice("late"))

    assert queue.counter("late") == min(queue.counter("a"), queue.counter("b")) > 0


def test_a_pause_of_all_saves_nothing_up() -> None:
    """Nor does it help to have been away when nobody waits: whoever waited last is the measure."""
    queue = fair_queue()
    first = choice("a")
    queue.add(first)
    queue.remove(first)
    queue.charge(first, num_output_tokens=500)
    queue.add(choice("b"))

    assert queue.counter("b") == queue.counter("a") == 1008.0


def test_a_debt_stays() -> None:
    """A tenant that has had more than the others is not let off by pausing."""
    queue = fair_queue()
    queue.charge(choice("greedy"), num_output_tokens=500)
    queue.add(choice("a"))
    queue.add(choice("greedy"))

    assert (queue.counter("greedy"), queue.counter("a")) == (1000.0, 0.0)


def test_who_waited_too_long_goes_first() -> None:
    """The oldest goes first once it is overdue, whatever its tenant owes; before that it does not."""
    clock = Clock()
    queue = fair_queue(max_wait_s=10.0, clock=clock)
    old, young = choice("greedy"), choice("a")
    queue.add(old)
    clock.now = 1.0
    queue.add(young)
    queue.charge(old, num_output_tokens=500)
    before = list(queue)
    clock.now = 10.5

    assert (before, list(queue)) == ([young, old], [old, young])


def test_overload_stays_fair() -> None:
    """When everybody is overdue, a tenant with few requests still does not wait behind all those of another."""
    clock = Clock()
    queue = fair_queue(max_wait_s=10.0, clock=clock)
    for _ in range(100):
        queue.add(choice("a"))
    few = [choice("b") for _ in range(3)]
    for one in few:
        queue.add(one)
    clock.now = 60.0

    assert set(few) <= set(list(drained(queue))[: OVERDUE_EVERY * len(few)])


def test_a_loop_may_change_the_queue() -> None:
    """What leaves while somebody iterates is not given any more, and what is given may leave at once."""
    queue = fair_queue()
    first, second, third = (choice("a", "x") for _ in range(3))
    for one in (first, second, third):
        queue.add(one)
    seen = []
    for one in queue:
        seen.append(one)
        queue.remove(one)
        if one is first:
            queue.remove(second)
            queue.add(choice("c"))

    assert seen == [first, third]
    assert [one.request.tenant for one in queue] == ["c"]


def test_what_does_not_wait_cannot_leave() -> None:
    """A choice is in the queue from add to remove; leaving twice is our own mistake and shows."""
    queue = fair_queue()
    one = choice()
    queue.add(one)
    was_in = one in queue
    queue.remove(one)

    assert (was_in, one in queue, len(queue)) == (True, False, 0)
    with pytest.raises(KeyError):
        queue.remove(one)


def test_clients_that_went_are_forgotten() -> None:
    """A hundred thousand tenants that come and go leave no more than a bounded memory; who waits is never forgotten."""
    queue = fair_queue()
    stays = choice("stays")
    queue.add(stays)
    for number in range(10 * MAX_IDLE):
        one = choice(f"t{number}")
        queue.add(one)
        queue.remove(one)

    assert list(queue) == [stays]
    assert len(queue._adapters) <= MAX_IDLE + 2


requests = st.lists(
    st.tuples(
        st.integers(0, 60), st.sampled_from("ab"), st.sampled_from("xyz"), st.integers(1, 30), st.integers(1, 20)
    ),
    max_size=60,
)


@settings(deadline=None, max_examples=60)
@given(requests, st.integers(1, 4), st.booleans())
def test_nobody_starves(arrivals: list[tuple[int, str, str, int, int]], rows: int, overdue: bool) -> None:
    """Whatever arrives when, everything is served, once, and in order within one tenant and adapter."""
    queue = fair_queue(max_wait_s=0.0 if overdue else 1e9, clock=Clock(1.0))
    server = Server(queue, rows)
    lines: dict[tuple[Any, ...], list[Choice]] = {}
    for at, tenant, adapter, num_input, num_output in sorted(arrivals, key=lambda arrival: arrival[0]):
        for _ in range(at % 3):
            server.step()
        one = choice(tenant, adapter, num_input=num_input, num_output=num_output)
        lines.setdefault((tenant, adapter), []).append(one)
        queue.add(one)
        assert len(set(map(id, queue))) == len(queue)
    for _ in range(30 * len(arrivals)):
        server.step()

    assert len(server.order) == len(arrivals)
    assert not queue
    assert not server.running
    for (tenant, adapter), line in lines.items():
        same = [c for c in server.order if (c.request.tenant, c.adapters[0].version_id) == (tenant, adapter)]
        assert same == line


sizes = st.tuples(st.integers(1, 40), st.integers(1, 20))


@settings(deadline=None, max_examples=60)
@given(sizes, sizes, st.integers(1, 8), st.integers(1, 30), st.integers(1, 6))
def test_equal_shares_between_those_that_wait(
    of_a: tuple[int, int], of_b: tuple[int, int], rows: int, steps: int, num_adapters: int
) -> None:
    """Two tenants that always have requests waiting get the same, whatever sizes and however many adapters one uses.

    The bound is the paper's (theorem 4.4) with a request's whole price: twice what all rows together may cost.
    """
    queue = fair_queue()
    server = Server(queue, rows)
    for number in range(steps * rows + 1):
        queue.add(choice("a", f"x{number % num_adapters}", num_input=of_a[0], num_output=of_a[1]))
        queue.add(choice("b", "y", num_input=of_b[0], num_output=of_b[1]))
    for _ in range(steps):
        server.step()

    dearest = max(INPUT_PRICE * num_input + OUTPUT_PRICE * num_output for num_input, num_output in (of_a, of_b))
    assert abs(server.served["a"] - server.served["b"]) <= 2 * rows * dearest


def test_without_fairness_the_shares_differ() -> None:
    """The opposite: served in order of arrival, who sends ten times as much gets ten times as much."""
    queue = fair_queue()
    server = Server(queue, rows=1)
    arrivals = [choice("b" if number % 11 == 0 else "a") for number in range(110)]
    for one in arrivals:
        queue.add(one)
    for _ in range(88):
        server.step()
    fair, in_order = server.served, Counter(one.request.tenant for one in arrivals[:22])

    assert in_order["a"] == 10 * in_order["b"]
    assert fair["a"] < 2 * fair["b"]
