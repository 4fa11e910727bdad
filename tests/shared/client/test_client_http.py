"""The client's connection: what is sent again, what is not, and what a failure reads like."""

import socket
import threading
import time

import pytest

from shared.cli.http import Service, ServiceError, path_of
from tests.shared.client.server import ContractServer

BUSY = (503, {"error": {"message": "busy", "code": "unavailable"}})


@pytest.fixture
def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_get_is_repeated_until_the_service_is_back(server: ContractServer) -> None:
    """A GET that meets 503 is sent again and answers as if nothing had been."""
    server.refuse_next = [BUSY, BUSY]

    with Service(server.url) as service:
        jobs = service.get("/fine_tuning/jobs")

    assert jobs["data"] == []
    assert len(server.requests("GET", "/fine_tuning/jobs")) == 3


def test_post_without_key_is_sent_once(server: ContractServer) -> None:
    """A POST that carries no Idempotency-Key may have had its effect, so it is never sent again."""
    server.refuse_next = [BUSY]

    with Service(server.url) as service, pytest.raises(ServiceError, match="busy"):
        service.post("/fine_tuning/jobs", {"model": "m"})

    assert len(server.requests("POST", "/fine_tuning/jobs")) == 1


def test_post_with_key_is_repeated_with_the_same_key(server: ContractServer) -> None:
    """A POST with an Idempotency-Key is sent again, with that key, and creates one job."""
    server.refuse_next = [BUSY]

    with Service(server.url) as service:
        service.post("/fine_tuning/jobs", {"model": "m"}, idempotency_key="k1")

    keys = [request.headers["idempotency-key"] for request in server.requests("POST", "/fine_tuning/jobs")]
    assert keys == ["k1", "k1"]
    assert len(server.jobs) == 1


def test_refused_connection_is_tried_again(free_port: int) -> None:
    """A service that starts listening a moment later is reached by a GET that began before."""
    asked = threading.Event()

    def listen_late() -> None:
        asked.wait()
        with socket.create_server(("127.0.0.1", free_port)) as listener:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b'HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{"up":true}')

    late = threading.Thread(target=listen_late)
    late.start()
    with Service(f"http://127.0.0.1:{free_port}/v1", patience_s=30) as service:
        threading.Timer(0.05, asked.set).start()
        answer = service.get("/anything")
    late.join()

    assert answer == {"up": True}


def test_no_service_is_one_line_that_says_what_to_do(free_port: int) -> None:
    """Nothing listening ends soon, in one line that names the address and the remedy."""
    began = time.monotonic()

    with Service(f"http://127.0.0.1:{free_port}/v1", patience_s=0.3) as service, pytest.raises(ServiceError) as caught:
        service.get("/fine_tuning/jobs")

    assert str(free_port) in caught.value.message
    assert "lorad up" in caught.value.message
    assert "\n" not in caught.value.message
    assert time.monotonic() - began < 5


def test_permanent_error_is_not_repeated(server: ContractServer) -> None:
    """400 is final, and the message, parameter and code arrive."""
    server.refuse_next = [(400, {"error": {"message": "too big", "code": "invalid_value", "param": "lora.r"}})]

    with Service(server.url) as service, pytest.raises(ServiceError) as caught:
        service.get("/fine_tuning/jobs")

    assert (caught.value.message, caught.value.param, caught.value.error_code) == ("too big", "lora.r", "invalid_value")
    assert len(server.seen) == 1


def test_pages_are_joined(server: ContractServer) -> None:
    """A list longer than a page comes whole and in order, by the cursor."""
    for number in range(5):
        server.create_job({"n": number}, None)

    with Service(server.url) as service:
        numbers = [job["n"] for job in service.every("/fine_tuning/jobs", {"limit": 2})]

    assert numbers == [4, 3, 2, 1, 0]
    assert len(server.seen) == 3


def test_at_most_stops_the_paging(server: ContractServer) -> None:
    """A bounded list asks for no page beyond the bound."""
    for number in range(5):
        server.create_job({"n": number}, None)

    with Service(server.url) as service:
        numbers = [job["n"] for job in service.every("/fine_tuning/jobs", {"limit": 2}, at_most=3)]

    assert numbers == [4, 3, 2]
    assert len(server.seen) == 2


def test_api_key_is_sent(server: ContractServer) -> None:
    """The key rides as a bearer token."""
    with Service(server.url, "lorad_a_b") as service:
        service.get("/fine_tuning/jobs")

    assert server.seen[0].headers["authorization"] == "Bearer lorad_a_b"


def test_no_key_sends_no_authorization(server: ContractServer) -> None:
    """Without a key there is no Authorization header."""
    with Service(server.url) as service:
        service.get("/fine_tuning/jobs")

    assert "authorization" not in server.seen[0].headers


def test_typed_names_stay_in_their_segment() -> None:
    """A name with a slash or dots cannot reach another URL."""
    assert path_of("adapters", "../jobs?x=1", "a@3") == "/adapters/..%2Fjobs%3Fx%3D1/a@3"


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_names_that_would_move_the_path_are_refused(name: str) -> None:
    """What no quoting can keep in its segment is an error."""
    with pytest.raises(ServiceError, match="not a name"):
        path_of("adapters", name)


def test_strange_answer_is_explained(server: ContractServer) -> None:
    """A server that is not lorad gives a line that asks whether the URL is right."""
    server.refuse_next = [(200, [])]  # type: ignore[list-item]  # the wrong shape on purpose

    with Service(server.url) as service, pytest.raises(ServiceError, match="LORAD_BASE_URL"):
        service.get("/fine_tuning/jobs")
