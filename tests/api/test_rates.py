"""Limits by the minute: tokens and their refill, what a key may ask, and how often an address may guess."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import httpx2
import openai
import pytest
from flask.testing import FlaskClient
from openai import OpenAI
from werkzeug.test import TestResponse

from api.app import create_app
from api.auth import Gate
from api.rates import Buckets, network_of
from shared.config import Settings
from tests.api.conftest import Api
from tests.api.test_auth import bearer

FILES = "/v1/files"
WRONG = f"lorad_{'0' * 16}_{'0' * 64}"


@dataclass
class Clock:
    """Stands still until a test moves it."""

    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def door(api: Api, settings: Settings, clock: Clock) -> Iterator[Callable[..., FlaskClient]]:
    """Makes the same API with limits, whose minutes are the clock's."""
    engines = []

    def make(**limits: int) -> FlaskClient:
        app = create_app(settings)
        _, services, refusals = app.extensions["lorad"]
        engines.append(services.engine)
        app.extensions["lorad"] = (Gate(services.engine, clock=clock, **limits), services, refusals)
        return app.test_client()

    yield make
    for engine in engines:
        engine.dispose()


def ask(client: FlaskClient, key: str | None = None, address: str = "127.0.0.1") -> TestResponse:
    return client.get(
        FILES, headers={"Host": "localhost"} | (bearer(key) if key else {}), environ_base={"REMOTE_ADDR": address}
    )


def test_a_full_bucket_gives_its_tokens_at_once(clock: Clock) -> None:
    """Three of three, and the fourth must wait for a third of a minute; being refused does not make it longer."""
    buckets = Buckets(3, clock=clock)

    standings = [buckets.take("a") for _ in range(5)]

    assert [one.remaining for one in standings] == [2, 1, 0, 0, 0]
    assert [one.retry_after_s for one in standings] == pytest.approx([0, 0, 0, 20, 20])
    assert standings[-1].full_in_s == pytest.approx(60)


@pytest.mark.parametrize(("pause_s", "tokens"), [(19.9, 0), (20.0, 1), (39.9, 1), (40.0, 2), (60.0, 3), (9999.0, 3)])
def test_tokens_come_back_evenly(clock: Clock, pause_s: float, tokens: int) -> None:
    """One in each third of a minute, and never more than the bucket holds."""
    buckets = Buckets(3, clock=clock)
    for _ in range(3):
        buckets.take("a")

    clock.now_s += pause_s

    assert [buckets.take("a").retry_after_s == 0 for _ in range(4)] == [True] * tokens + [False] * (4 - tokens)


def test_one_name_does_not_spend_another_s_tokens(clock: Clock) -> None:
    """Whoever has asked too much is alone with it."""
    buckets = Buckets(1, clock=clock)
    buckets.take("a")

    assert buckets.take("a").retry_after_s > 0
    assert buckets.take("b").retry_after_s == 0


def test_any_number_of_names_fits_in_bounded_memory(clock: Clock) -> None:
    """A thousand names never fill more than a hundred places, and the busiest is not the one that is forgotten."""
    buckets = Buckets(3, clock=clock, max_names=100)
    for number in range(1000):
        clock.now_s += 0.001
        for _ in range(3):
            buckets.take("busy")
        buckets.take(str(number))
        assert len(buckets) <= 100

    assert buckets.take("busy").retry_after_s > 0


def test_idle_names_make_room_first(clock: Clock) -> None:
    """A bucket that is full again needs no place."""
    buckets = Buckets(3, clock=clock, max_names=100)
    for number in range(100):
        buckets.take(str(number))

    clock.now_s += 60
    buckets.take("new")

    assert len(buckets) == 1


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        (None, "unknown"),
        ("not an address", "unknown"),
    ],
)
def test_addresses_that_one_guesser_has_are_one(address: str | None, network: str) -> None:
    """An IPv4 address is itself; of IPv6 anybody has a whole /64."""
    assert network_of(address) == network


def test_a_key_has_so_many_requests_a_minute(door: Callable[..., FlaskClient], api: Api, clock: Clock) -> None:
    """The third of two is 429 and says when to come back; another key is served; a token later so is this one."""
    key, other = api.key(), api.key()
    client = door(requests_per_minute=2)

    answers = [ask(client, key) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200, 200, 429]
    refused = answers[-1]
    assert refused.get_json()["error"]["code"] == "rate_limit_exceeded"
    assert refused.headers["Retry-After"] == "30"
    assert ask(client, other).status_code == 200
    clock.now_s += 30
    assert ask(client, key).status_code == 200


def test_every_answer_says_how_much_is_left(door: Callable[..., FlaskClient], api: Api) -> None:
    """In the headers that OpenAI has for it, on errors too."""
    key = api.key("default", "jobs:read")
    client = door(requests_per_minute=2)

    told = [
        {name: value for name, value in ask(client, key).headers if name.startswith("x-ratelimit-")} for _ in range(3)
    ]

    assert told == [
        {"x-ratelimit-limit-requests": "2", "x-ratelimit-remaining-requests": left, "x-ratelimit-reset-requests": reset}
        for left, reset in (("1", "30s"), ("0", "60s"), ("0", "60s"))
    ]


def test_openai_s_client_waits_as_long_as_it_is_told(door: Callable[..., FlaskClient], api: Api) -> None:
    """The stock client takes the answer for a rate limit, and reads the pause from its headers."""
    key = api.key()
    client = door(requests_per_minute=7)
    for _ in range(7):
        ask(client, key)
    refused = ask(client, key)
    asked = httpx2.Request("GET", "http://127.0.0.1:1")
    answer = httpx2.Response(429, headers=list(refused.headers), content=refused.data, request=asked)

    with OpenAI(api_key=key, base_url="http://127.0.0.1:1", max_retries=0) as sdk:
        assert sdk._parse_retry_after_header(answer.headers) == pytest.approx(60 / 7, abs=0.01)
        assert sdk._should_retry(answer)
        assert isinstance(sdk._make_status_error_from_response(answer), openai.RateLimitError)


def test_without_keys_an_address_has_so_many(door: Callable[..., FlaskClient]) -> None:
    """This machine itself, while nobody has made a key."""
    client = door(requests_per_minute=2)

    assert [ask(client).status_code for _ in range(3)] == [200, 200, 429]
    assert client.get("/healthz").status_code == 200


def test_nothing_is_limited_by_default(door: Callable[..., FlaskClient], api: Api) -> None:
    """Neither requests nor the headers about them."""
    key = api.key()
    client = door()

    answers = [ask(client, key) for _ in range(100)]

    assert {answer.status_code for answer in answers} == {200}
    assert not [name for name, _ in answers[-1].headers if name.startswith("x-ratelimit")]


def test_an_address_may_guess_so_often(door: Callable[..., FlaskClient], api: Api, clock: Clock) -> None:
    """Then it hears 429 instead of 401, whatever it guesses; right keys go on working, and so do other addresses."""
    key = api.key()
    client = door(failed_logins_per_minute=3)

    guesses = [ask(client, WRONG, "192.0.2.7").status_code for _ in range(5)]

    assert guesses == [401, 401, 401, 429, 429]
    assert ask(client, "nonsense", "192.0.2.7").get_json()["error"]["code"] == "rate_limit_exceeded"
    assert ask(client, key, "192.0.2.7").status_code == 200
    assert ask(client, WRONG, "192.0.2.8").status_code == 401
    clock.now_s += 20
    assert [ask(client, WRONG, "192.0.2.7").status_code for _ in range(2)] == [401, 429]


def test_who_shows_no_key_guesses_nothing(door: Callable[..., FlaskClient], api: Api) -> None:
    """A client without a key is told that it needs one, as often as it asks."""
    api.key()
    client = door(failed_logins_per_minute=3)

    assert {ask(client, None, "192.0.2.7").status_code for _ in range(10)} == {401}


def test_ten_guesses_are_the_default(api: Api, settings: Settings) -> None:
    """The application passes its settings on."""
    api.key()
    apps = [create_app(settings), create_app(replace(settings, failed_logins_per_minute=2, requests_per_minute=1))]

    guesses = [[ask(app.test_client(), WRONG).status_code for _ in range(12)] for app in apps]

    assert [answers.count(401) for answers in guesses] == [10, 2]
    for app in apps:
        app.extensions["lorad"][1].engine.dispose()
