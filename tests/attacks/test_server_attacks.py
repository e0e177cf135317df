"""Hostile clients: held connections, texts that are too large, foreign hosts, malformed requests."""

import json
import random
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest

from qlora_rm.artifacts.load import RewardModel
from qlora_rm.bearer import is_authorized
from qlora_rm.config import ServeConfig
from qlora_rm.errors import UserError
from qlora_rm.serving import bodies, connections
from qlora_rm.serving.app import Service
from qlora_rm.serving.fair import FairQueue, client_of
from qlora_rm.serving.hosts import AllowedHosts
from qlora_rm.serving.lanes import SHORT, Lanes
from tests.attacks.raw_requests import connected, exchanged, reason_of, request_of, status_of, until_closed
from tests.reward_models_for_tests import copy_of, llama_adapter
from tests.serving.servers_for_tests import Door, running, served, wait_until

CATEGORY = "Server: hostile clients"
PATIENCE = 60
SHORT_BODY = {"prompt": "What is the capital of France?", "responses": ["Paris."]}
ASKED = request_of(SHORT_BODY)


@pytest.fixture(scope="module")
def model() -> RewardModel:
    return RewardModel.load(str(llama_adapter()))


@pytest.fixture(scope="module")
def service(model: RewardModel) -> Iterator[Service]:
    with served(model, llama_adapter()) as service:
        yield service


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with running(service.app()) as url:
        yield url


@pytest.fixture(scope="module")
def right(url: str) -> list[float]:
    return httpx2.post(f"{url}/score", json=SHORT_BODY, timeout=PATIENCE).json()["scores"]


def flood(connection: socket.socket, sent: bytes) -> None:
    """Send forever and never read."""
    while True:
        connection.sendall(sent)


def seconds_of(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class TestHeldConnections:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "sent",
        [b"", b"\r\n", b"GET /hea", request_of(SHORT_BODY)[:80], request_of(SHORT_BODY, end=False), ASKED],
        ids=["idle", "empty lines", "half a line", "half a head", "half a body", "idle after an answer"],
    )
    def test_a_new_client_is_answered(self, service: Service, right: list[float], sent: bytes, tries: Any) -> None:
        with running(service.app(), connections=500) as url, ExitStack() as held:
            for _ in range(1200):
                held.enter_context(connected(url, sent))

            def ask() -> None:
                assert httpx2.post(f"{url}/score", json=SHORT_BODY, timeout=PATIENCE).json()["scores"] == pytest.approx(right, abs=1e-5)  # fmt: skip

            assert seconds_of(ask) < 3
        tries(1200)

    @pytest.mark.parametrize(
        ("sent", "answer"),
        [
            (b"", 0),
            (b"GET /hea", 408),
            (request_of(SHORT_BODY)[:80], 408),
            (request_of(SHORT_BODY, end=False), 408),
            (ASKED, 200),
            (ASKED + b"POST", 200),
            (request_of(SHORT_BODY, path="/nowhere", end=False), 404),
            (b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n", 415),
        ],
    )  # fmt: skip
    def test_each_wait_has_an_end(self, url: str, monkeypatch: pytest.MonkeyPatch, sent: bytes, answer: int) -> None:
        for name in ("HEAD_SECONDS", "IDLE_SECONDS", "BODY_SECONDS", "END_SECONDS"):
            monkeypatch.setattr(connections, name, 0.3)
        with connected(url, sent) as connection:
            received = until_closed(connection)
        assert (status_of(received) if received else 0) == answer

    @pytest.mark.slow
    def test_dripping_bytes_gains_no_time(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("HEAD_SECONDS", "BODY_SECONDS", "END_SECONDS"):
            monkeypatch.setattr(connections, name, 0.5)
        head = request_of({"responses": ["a" * 5000]})
        for at_once in (10, head.index(b"\r\n\r\n") + 10):
            with connected(url, head[:at_once]) as connection:
                connection.settimeout(0.05)
                began, received = time.monotonic(), b""
                for byte in head[at_once:]:
                    try:
                        connection.sendall(bytes([byte]))
                        if not (part := connection.recv(1000)):
                            break
                        received += part
                    except TimeoutError:
                        continue
                    except OSError:
                        break
                assert time.monotonic() - began < 5
            assert status_of(received) == 408

    @pytest.mark.slow
    def test_a_client_that_takes_no_answers(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(connections, "WRITE_SECONDS", 0.3)
        asked = request_of(None, method="GET", path="/metrics") * 100
        with connected(url) as connection, pytest.raises((BrokenPipeError, ConnectionResetError)):
            flood(connection, asked)

    def test_as_many_are_open_as_files_may_be(self, monkeypatch: pytest.MonkeyPatch) -> None:
        limits = [256, 400]
        monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits))
        monkeypatch.setattr(resource, "setrlimit", lambda kind, wanted: limits.__setitem__(slice(None), wanted))
        assert (connections.connections_possible(), limits) == (144, [400, 400])
        limits[:] = [200, 200]
        assert connections.connections_possible() == 16
        limits[:] = [1024, 1_000_000]
        assert (connections.connections_possible(), limits) == (2048, [65_536, 1_000_000])

    def test_one_address_does_not_take_the_place_of_others(self, service: Service) -> None:
        """Connections that wait for an answer are never closed. Above the limit of its address, a client gets 503."""
        hold, begun, inner = threading.Event(), list[Any](), service.batcher._score

        def slow(sequences: Any) -> Any:
            begun.extend(sequences)
            assert hold.wait(PATIENCE)
            return inner(sequences)

        service.batcher._score = slow
        try:
            with running(service.app(), connections=20) as url, ExitStack() as held:
                place = url.removeprefix("http://").split(":")
                for _ in range(10):
                    one = socket.create_connection((place[0], int(place[1])), PATIENCE, source_address=("127.0.0.2", 0))
                    held.enter_context(one).sendall(ASKED)
                wait_until(lambda: len(begun) + service.metrics.queued_sequences._value.get() >= 10)
                refused = socket.create_connection((place[0], int(place[1])), PATIENCE, source_address=("127.0.0.2", 0))
                assert status_of(until_closed(held.enter_context(refused))) == 503
                assert httpx2.get(f"{url}/health").status_code == 200
                hold.set()
        finally:
            hold.set()
            service.batcher._score = inner


class TestLargeTexts:
    def test_beyond_the_bound_they_are_refused(self, url: str, service: Service) -> None:
        limit = service.reader.sizes.sequence
        assert limit is not None and limit < 100_000
        huge = "ab" * limit
        for path, body, place in (
            ("/score", {"prompt": huge, "responses": ["a"]}, "responses[0] with its prompt"),
            ("/score", [{"responses": ["a"]}, {"responses": ["b", huge]}], "[1].responses[1] with its prompt"),
            ("/score", {"prompt": [{"role": "user", "content": huge}], "responses": ["a"]}, "responses[0]"),
            ("/score", {"prompt": "a", "responses": ["a"], "tools": [{"x": huge}]}, "responses[0]"),
            ("/score", {"prompt": [5] * limit, "responses": [[6]]}, "responses[0]"),
            ("/score", {"prompt": [{"role": "user", "content": ""}] * limit, "responses": ["a"]}, "responses[0]"),
            ("/get_reward", {"query": ["a", huge]}, "query[1]"),
            ("/classify", {"input": huge}, "input[0]"),
        ):
            answer = httpx2.post(f"{url}{path}", json=body, timeout=PATIENCE)
            assert (answer.status_code, answer.json()["error"].startswith(place)) == (413, True), answer.text
            assert f"at most {limit} are taken" in answer.text

    def test_a_text_below_the_bound_is_cut_as_offline(self, url: str, service: Service, model: RewardModel) -> None:
        text = "Tell me again, please. " * (service.reader.sizes.sequence // 23 - 2)  # type: ignore[operator]
        from qlora_rm.preferences import Candidates

        turns = Candidates([{"role": "user", "content": text}], ([{"role": "assistant", "content": "No."}],))
        answer = httpx2.post(f"{url}/score", json={"prompt": text, "responses": ["No."]}, timeout=PATIENCE).json()
        [result] = model.tokenization.tokenize_each([turns])
        assert answer["cut"] == result.cut > 0  # type: ignore[union-attr]
        assert answer["scores"] == pytest.approx(model.score_candidates([turns])[0], abs=1e-5)

    @pytest.mark.slow
    def test_verify_asks_for_no_text_that_is_refused(self, url: str, model: RewardModel, tmp_path: Path) -> None:
        from qlora_rm.artifacts.golden import make_golden
        from qlora_rm.artifacts.manifest import Manifest
        from qlora_rm.preferences import Candidates
        from qlora_rm.verification.server import verify_endpoint

        folder = copy_of(llama_adapter(), tmp_path / "model")
        manifest = Manifest.load(folder)
        turns = [{"role": "user", "content": "word " * 50_000}], ([{"role": "assistant", "content": "No."}],)
        golden = [*manifest.golden, *make_golden([Candidates(*turns)], model.tokenization, model.score_token_ids)]
        Manifest(**{**vars(manifest), "golden": golden}).save(folder)
        checks = {check.name: check for check in verify_endpoint(str(folder), url)}
        assert all(check.ok for check in checks.values())
        assert "1 texts not asked for" in checks["golden scores are given again"].detail

    def test_a_prompt_counts_for_each_of_its_responses(self, model: RewardModel) -> None:
        with served(model, llama_adapter(), max_queue_tokens=10_000) as service, running(service.app()) as url:
            body = {"prompt": "a" * 2000, "responses": ["b"] * 100}
            answer = httpx2.post(f"{url}/score", json=body, timeout=PATIENCE)
        assert (answer.status_code, "at most 160000 are taken in one request" in answer.text) == (413, True)

    @pytest.mark.slow
    @pytest.mark.parametrize("kind", ["refused", "cut", "many"])
    def test_a_flood_does_not_keep_others_waiting(
        self, url: str, service: Service, right: list[float], kind: str
    ) -> None:
        limit = service.reader.sizes.sequence or 0
        flood = {
            "refused": {"prompt": "x" * 3_900_000, "responses": ["a"]},
            "cut": {"prompt": "word " * (limit // 5 - 20), "responses": ["a"]},
            "many": {"prompt": "word " * 1000, "responses": [f"{i}" for i in range(100)]},
        }[kind]
        sent, stop = request_of(flood), threading.Event()

        def attack() -> None:
            while not stop.is_set():
                exchanged(url, sent.replace(b"Content-Type", b"Connection: close\r\nContent-Type", 1))

        def ask() -> None:
            answer = httpx2.post(f"{url}/score", json=SHORT_BODY, timeout=PATIENCE)
            assert answer.json()["scores"] == pytest.approx(right, abs=1e-4)

        usual = sorted(seconds_of(ask) for _ in range(10))[5]
        with ThreadPoolExecutor(8) as attackers:
            for _ in range(8):
                attackers.submit(attack)
            time.sleep(1)
            try:
                under_attack = sorted(seconds_of(ask) for _ in range(10))
            finally:
                stop.set()
        print(
            f"{kind}: {usual:.3f} s alone; under attack median {under_attack[5]:.3f} s, longest {under_attack[-1]:.3f} s"
        )
        assert under_attack[5] < 20 * usual + 1

    def test_short_requests_pass_long_ones(self) -> None:
        lanes, go, order = Lanes(), threading.Event(), list[str]()
        long = [lanes.submit(lambda: go.wait(PATIENCE), "flood", SHORT + 1) for _ in range(20)]
        short = lanes.submit(lambda: order.append("short"), "other", 10)
        short.result(PATIENCE)
        assert not any(work.done() for work in long)
        go.set()
        [work.result(PATIENCE) for work in long]
        lanes.close()

    def test_the_queue_is_fair(self) -> None:
        queue = FairQueue[str](10)
        for i in range(50):
            queue.push(f"flood {i}", "flood", 100)
        for _ in range(3):
            queue.pop()
        queue.push("short of flood", "flood", 1)
        queue.push("other 1", "other", 100)
        queue.push("other 2", "other", 100)
        assert {queue.pop() for _ in range(4)} >= {"other 1", "other 2", "short of flood"}
        assert len(queue) == len(list(queue)) == 46
        while queue:
            queue.pop()

    def test_addresses_of_one_client_are_one(self) -> None:
        assert client_of("10.0.0.1") != client_of("10.0.0.2")
        assert client_of("2001:db8::1") == client_of("2001:db8::2:1") != client_of("2001:db8:0:1::1")
        assert client_of("::ffff:10.0.0.1") == client_of("10.0.0.1")
        assert client_of("fe80::1%eth0") == client_of("fe80::2")
        assert client_of("testclient") == "testclient"

    def test_a_long_entry_is_not_passed_for_ever(self) -> None:
        queue = FairQueue[str](1)
        queue.push("long", "one", 100)
        for i in range(1000):
            queue.push(f"short {i}", "one", 1)
            if queue.pop() == "long":
                break
        assert i < 300

    def test_large_bodies_are_bounded_together(self, service: Service) -> None:
        held = bodies.Bodies(1_000_000)
        with ExitStack() as stack:

            def fill(client: str) -> int:
                for count in range(1000):
                    try:
                        stack.enter_context(held.of(client)).grow(1_000_000)
                    except bodies.Refused:
                        return count
                return 1000

            assert (fill("a"), fill("b"), fill("c")) == (32, 32, 0)
            stack.enter_context(held.of("c")).grow(1000)  # short bodies are always read
        assert not held._of_clients


class TestHostAndOrigin:
    @pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "evil@localhost", "localhost:1/x", "10.0.0.5", "", "[::1]evil", "localhost:99999", "2130706433"])  # fmt: skip
    def test_other_hosts_are_refused(self, url: str, host: str) -> None:
        for method, path in (("POST", "/score"), ("GET", "/health"), ("GET", "/metrics")):
            answer = exchanged(url, request_of(SHORT_BODY, "Connection: close", method=method, path=path, host=host))
            assert status_of(answer) in (400, 403)
            assert reason_of(answer)

    @pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"])
    def test_names_of_this_machine_are_answered(self, url: str, host: str) -> None:
        assert status_of(exchanged(url, request_of(SHORT_BODY, "Connection: close", host=host))) == 200

    @pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost.evil.example", "localhost", "file://", "http://evil.example:8000", "https://[::1"])  # fmt: skip
    def test_pages_of_strangers_are_refused(self, url: str, origin: str) -> None:
        answer = exchanged(url, request_of(SHORT_BODY, f"Origin: {origin}", "Connection: close"))
        assert (status_of(answer), "--allowed_hosts" in reason_of(answer)) == (403, True)

    def test_own_pages_are_answered(self, url: str) -> None:
        for origin in ("http://localhost:3000", "https://127.0.0.1", "http://[::1]:8000"):
            assert status_of(exchanged(url, request_of(SHORT_BODY, f"Origin: {origin}", "Connection: close"))) == 200

    def test_names_that_would_never_match_are_refused(self) -> None:
        ServeConfig(allowed_hosts=["rewards.example", "10.0.0.5", "2001:db8::1", "*"])
        for name in ("http://rewards.example", "rewards.example:8000", "[::1]", "", "a b"):
            with pytest.raises(UserError, match="--allowed_hosts"):
                ServeConfig(allowed_hosts=[name])

    def test_what_is_looked_at(self) -> None:
        assert AllowedHosts.of("0.0.0.0", [], has_token=True) is None
        assert AllowedHosts.of("127.0.0.1", ["*"], has_token=False) is None
        named = AllowedHosts.of("0.0.0.0", ["Rewards.example"], has_token=True)
        assert named is not None and named.allows("rewards.example:8000") and not named.allows("10.0.0.5")
        anonymous = AllowedHosts.of("0.0.0.0", [], has_token=False)
        assert anonymous is not None and anonymous.allows("10.0.0.5:8000") and not anonymous.allows("evil.example")
        assert anonymous.allows(socket.gethostname())


class TestToken:
    def test_the_scheme_is_read_without_its_case(self) -> None:
        for given in ("Bearer secret", "bearer secret", "BEARER  secret", "bEaReR secret "):
            assert is_authorized([given], "secret")
        for wrong in ([], ["Bearer secret", "Bearer secret"], ["secret"], ["Basic secret"], ["Bearer"], ["Bearer secret x"], ["Bearer Secret"], ["Bearersecret"], [""], ["Bearer\tsecret"]):  # fmt: skip
            assert not is_authorized(wrong, "secret")


HEAD = "POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
CONTENT = json.dumps(SHORT_BODY)
CHUNKED = f"{len(CONTENT):x}\r\n{CONTENT}\r\n0\r\n\r\n"
SMUGGLED = {
    "length beside chunked": f"{HEAD}Content-Length: {len(CONTENT)}\r\nTransfer-Encoding: chunked\r\n\r\n{CHUNKED}",
    "chunked beside length": f"{HEAD}Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n{CHUNKED}",
    "two lengths": f"{HEAD}Content-Length: {len(CONTENT)}\r\nContent-Length: 5\r\n\r\n{CONTENT}",
    "two lengths in one": f"{HEAD}Content-Length: {len(CONTENT)}, 5\r\n\r\n{CONTENT}",
    "negative length": f"{HEAD}Content-Length: -1\r\n\r\n{CONTENT}",
    "length with sign": f"{HEAD}Content-Length: +{len(CONTENT)}\r\n\r\n{CONTENT}",
    "length of many digits": f"{HEAD}Content-Length: {'9' * 500}\r\n\r\n{CONTENT}",
    "length of no number": f"{HEAD}Content-Length: five\r\n\r\n{CONTENT}",
    "folded line": f"{HEAD}X-A: 1\r\n 2\r\nContent-Length: {len(CONTENT)}\r\n\r\n{CONTENT}",
    "folded by a tab": f"{HEAD}X-A: 1\n\t2\r\nContent-Length: {len(CONTENT)}\r\n\r\n{CONTENT}",
    "space before colon": f"{HEAD}Content-Length : {len(CONTENT)}\r\n\r\n{CONTENT}",
    "two hosts": f"{HEAD}Host: localhost\r\nContent-Length: {len(CONTENT)}\r\n\r\n{CONTENT}",
    "no host": f"POST /score HTTP/1.1\r\nContent-Length: {len(CONTENT)}\r\n\r\n{CONTENT}",
    "other coding": f"{HEAD}Transfer-Encoding: gzip, chunked\r\n\r\n{CHUNKED}",
    "coding twice": f"{HEAD}Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n{CHUNKED}",
    "chunked in HTTP/1.0": f"{HEAD.replace('1.1', '1.0')}Transfer-Encoding: chunked\r\n\r\n{CHUNKED}",
    "chunk size of no number": f"{HEAD}Transfer-Encoding: chunked\r\n\r\nxyz\r\n{CONTENT}\r\n0\r\n\r\n",
    "negative chunk": f"{HEAD}Transfer-Encoding: chunked\r\n\r\n-5\r\n{CONTENT}\r\n0\r\n\r\n",
    "chunk size of many digits": f"{HEAD}Transfer-Encoding: chunked\r\n\r\n{'f' * 100}\r\n{CONTENT}\r\n0\r\n\r\n",
    "chunk longer than its size": f"{HEAD}Transfer-Encoding: chunked\r\n\r\n5\r\n{CONTENT}\r\n0\r\n\r\n",
    "chunk size with 0x": f"{HEAD}Transfer-Encoding: chunked\r\n\r\n0x{CHUNKED}",
    "bad chunk after a refusal": f"{HEAD.replace('application/json', 'text/plain')}Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "NUL in a header": f"{HEAD}X-A: a\0b\r\nContent-Length: {len(CONTENT)}\r\n\r\n{CONTENT}",
    "header of 100 kB": f"{HEAD}X-A: {'a' * 100_000}\r\n\r\n",
    "10,000 headers": HEAD + "X-A: a\r\n" * 10_000 + "\r\n",
    "path of 100 kB": f"GET /{'a' * 100_000} HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "HTTP/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9": "GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "TLS": "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "method of bytes": "\x80\x81 / HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.fixture
def quiet(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Require that the test prints and logs no error."""
    yield
    said = capfd.readouterr()
    assert "Traceback" not in said.err + said.out
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HEAD_SECONDS", "IDLE_SECONDS", "BODY_SECONDS", "END_SECONDS"):
        monkeypatch.setattr(connections, name, 0.5)


@pytest.mark.usefixtures("quiet", "hasty")
class TestMalformed:
    @pytest.mark.parametrize("name", SMUGGLED)
    def test_what_others_read_differently_is_400(self, url: str, name: str) -> None:
        answer = exchanged(url, SMUGGLED[name].encode("latin-1"))
        assert 400 <= status_of(answer) < 500
        assert reason_of(answer)
        assert answer.count(b"HTTP/1.1 ") == 1  # the rest is not read as a second request

    @pytest.mark.slow
    def test_bytes_changed_at_random(self, url: str, right: list[float], tries: Any) -> None:
        draw = random.Random(12)
        valid = request_of(SHORT_BODY, "Connection: close", "Authorization: Bearer x")
        self._attack(url, [mutated(valid, draw) for _ in range(400)], right)
        tries(400)

    def test_json_changed_at_random(self, url: str, right: list[float], tries: Any) -> None:
        draw = random.Random(13)
        sent = [request_of(body, "Connection: close", path=path) for body in json_mutants(draw, 300) for path in [draw.choice(["/score", "/get_reward", "/classify"])]]  # fmt: skip
        self._attack(url, sent, right)
        tries(300)

    def _attack(self, url: str, requests: list[bytes], right: list[float]) -> None:
        with ThreadPoolExecutor(24) as clients:
            answers = list(clients.map(lambda sent: exchanged(url, sent), requests))
        for sent, answer in zip(requests, answers, strict=True):
            if not answer:
                continue  # closed
            status = status_of(answer)
            assert 400 <= status < 500 or status == 200, (sent, answer)
            if status != 200 and not sent.startswith(b"HEAD"):
                assert reason_of(answer[answer.rindex(b"HTTP/1.1 4") :]), (sent, answer)
        neighbour = httpx2.post(f"{url}/score", json=SHORT_BODY, timeout=PATIENCE)
        assert neighbour.json()["scores"] == pytest.approx(right, abs=1e-5)


def mutated(valid: bytes, draw: random.Random) -> bytes:
    """Return a request with some bytes changed, removed, doubled or inserted."""
    data = bytearray(valid)
    for _ in range(draw.randint(1, 6)):
        place, size = draw.randrange(len(data)), draw.randint(1, 8)
        way = draw.randrange(4)
        if way == 0:
            data[place] = draw.randrange(256)
        elif way == 1 and len(data) > 40:
            del data[place : place + size]
        elif way == 2:
            data[place:place] = data[place : place + size]
        else:
            data[place:place] = draw.choice(
                [b"\r\n", b"\n", b"\0", b"\r", b" ", b":", b"\xff" * size, b"\r\n\r\n", b"0" * 30]
            )
    return bytes(data)


LEAVES: list[Any] = [
    None, True, 0, -1, 10**400, 1e308, 2**63, "", "a", "\0", "\x1b[2J", "\u202e", "a" * 2000, [], {}, [[]], [5], [-1], [2**70],
    [{"role": "user", "content": "x"}], [{"role": 5}], {"role": "user"}, [None], ["\ud800"], ["a"] * 600, [1.5], [True],
]  # fmt: skip
RAW: list[bytes] = [
    b"", b"\0", b"\xff\xfe", b"\xef\xbb\xbf{}", b"nul", b"NaN", b"[NaN]", b"{" * 5000, b"[" * 100_000, b'{"a":' * 5000,
    b'{"responses": ["\\ud800"]}', b'{"responses": ["\xff"]}', b'{"responses": ["a"], "responses": [1]}',
    b'{"responses": [1e999]}', b'{"responses": [' + b"9" * 10_000 + b"]}", b'{"responses": ["a\\u0000b"]}', b"{} {}",
    b'{"prompt": ' + b"[" * 200 + b"]" * 200 + b', "responses": ["a"]}',
    b'{"prompt": "a", "responses": ["a"], "tools": [' + b'{"a":' * 150 + b"1" + b"}" * 150 + b"]}",
]  # fmt: skip


def json_mutants(draw: random.Random, count: int) -> list[Any]:
    """Make bodies close to valid ones, and raw ones."""
    bodies: list[Any] = list(RAW)
    while len(bodies) < count:
        body: Any = {"prompt": "What?", "responses": ["a", "b"], "query": ["a"], "input": "a"}
        for key in ("query", "input") if draw.random() < 0.7 else ("prompt", "responses"):
            del body[key]
        for _ in range(draw.randint(1, 3)):
            key = draw.choice([*body, "system", "tools", "chat_template_kwargs", "labels", "x" * 50])
            body[key] = draw.choice(LEAVES) if draw.random() < 0.7 else [draw.choice(LEAVES) for _ in range(3)]
        bodies.append([body, body] if draw.random() < 0.2 else body)
    return bodies


class TestStopping:
    @pytest.mark.slow
    def test_requests_that_are_not_whole_do_not_delay_the_end(self, tmp_path: Path) -> None:
        door = Door(llama_adapter(), log=tmp_path / "log")
        url = door.url()
        with ExitStack() as held:
            kinds = {
                "idle": b"",
                "half a head": ASKED[:60],
                "half a body": request_of(SHORT_BODY, end=False),
                "half a chunk": f"{HEAD}Transfer-Encoding: chunked\r\n\r\nff\r\n{{".encode(),
                "waits for 100": request_of(SHORT_BODY, "Expect: 100-continue")[: ASKED.index(b"\r\n\r\n")] + b"\r\nX: y\r\n\r\n",
            }  # fmt: skip
            open_ = {name: held.enter_context(connected(url, sent)) for name, sent in kinds.items()}
            assert httpx2.get(f"{url}/health").status_code == 200
            time.sleep(0.3)
            began = time.monotonic()
            door.process.send_signal(signal.SIGTERM)
            received = {name: until_closed(connection) for name, connection in open_.items()}
            assert door.ends() == 0
            assert time.monotonic() - began < 5
        for name in ("half a body", "half a chunk"):
            assert b"503" in received[name] and b"the server is stopping" in received[name]
        assert door.said().endswith("stopped: every request is answered\n")
        assert "Traceback" not in door.said()
