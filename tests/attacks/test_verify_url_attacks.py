"""Hostile servers: endless answers, decompression bombs, redirects, invalid numbers, terminal escape codes."""

import gzip
import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from qlora_rm.cli import main
from qlora_rm.console import printable
from qlora_rm.output import as_json, json_line
from qlora_rm.verification import bounded_client
from qlora_rm.verification.checks import Check
from qlora_rm.verification.server import verify_endpoint
from tests.reward_models_for_tests import llama_adapter

CATEGORY = "verify --url: hostile servers"
COMMANDS = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\x00\x7f\u202e\u2028\U000e0041"
HARMFUL = {character for character in COMMANDS if not (character.isascii() and character.isprintable())}

Serve = Callable[[socket.socket, bytes], None]


@contextmanager
def answering(serve: Serve) -> Iterator[str]:
    """Run a server that answers each connection with `serve`, which gets the request's head. Yields its URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def one(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            serve(connection, connection.recv(65_536))

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=one, args=(listener.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def answer(body: bytes, status: str = "200 OK", *headers: str) -> Serve:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers, "", ""]
    return lambda connection, head: connection.sendall("\r\n".join(lines).encode("latin-1") + body)


def dripping(head: bytes, part: bytes) -> Serve:
    def serve(connection: socket.socket, asked: bytes) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(part)
            time.sleep(0.05)

    return serve


def endless(connection: socket.socket, head: bytes) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(b"[" * 65_536)


def checked(serve: Serve, protocol: Any = "get_reward") -> list[Check]:
    with answering(serve) as url:
        return verify_endpoint(str(llama_adapter()), url, protocol=protocol)


def reason(serve: Serve, protocol: Any = "get_reward") -> str:
    """Return the reason why the server gives no scores."""
    return next(check.detail for check in checked(serve, protocol) if check.name == "server answers" and not check.ok)


@pytest.mark.slow
@pytest.mark.parametrize(
    "serve",
    [
        dripping(b"", b"H"),
        dripping(b"HTTP/1.1 200 OK\r\n", b"X-A: a\r\n"),
        dripping(b"HTTP/1.1 200 OK\r\n\r\n", b" "),
        dripping(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        dripping(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
        lambda connection, head: time.sleep(5),
    ],
    ids=["status line", "headers", "body", "chunks", "100 Continue", "nothing"],
)
def test_no_answer_lasts_for_ever(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_client, "ANSWER_SECONDS", 0.7)
    began = time.monotonic()
    assert "no answer in time" in reason(serve)
    assert time.monotonic() - began < 10


@pytest.mark.slow
def test_all_answers_together_have_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_client, "ALL_SECONDS", 1.0)

    def serve(connection: socket.socket, head: bytes) -> None:
        time.sleep(0.4)
        answer(b"{}")(connection, head)

    assert "too slow to check" in reason(serve) or "no answer in time" in reason(serve)


def test_large_answers_are_not_read_to_their_end() -> None:
    assert "larger than 8000000 bytes" in reason(endless)
    bomb = gzip.compress(b" " * 30_000_000)
    assert "larger than 8000000 bytes" in reason(answer(bomb, "200 OK", "Content-Encoding: gzip"))
    nested = gzip.compress(gzip.compress(b" " * 30_000_000))
    assert "larger than" in reason(answer(nested, "200 OK", "Content-Encoding: gzip, gzip"))


def test_redirects_are_told_and_not_followed() -> None:
    asked: list[bytes] = []

    def other(connection: socket.socket, head: bytes) -> None:
        asked.append(head)

    with answering(other) as elsewhere:
        for status in ("301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"):
            said = reason(answer(b"", status, f"Location: {elsewhere}/get_reward"))
            assert f"a redirect to '{elsewhere}/get_reward', which is not followed" in said
    assert not asked


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400, "9" * 5000, '"1"', "null", "true", "[1]"])  # fmt: skip
def test_what_is_no_number_is_no_score(number: str) -> None:
    found = reason(answer(f'{{"rewards": [{number}]}}'.encode()))
    assert "not finite" in found or "something else than numbers" in found or "answers no JSON" in found


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"rewards": ' * 50_000, b"\xff\xfe", b"", b"[]", b'{"rewards": 1}', b'{"rewards": {}}', "﻿{}".encode(), b'{"rewards": []}'])  # fmt: skip
def test_what_is_no_answer_is_told(body: bytes) -> None:
    assert reason(answer(body))


@pytest.mark.slow
def test_answers_of_any_json(tries: Any) -> None:
    """For every path and protocol, checks fail and nothing is raised."""
    draw = random.Random(14)
    leaves = [None, True, 0, -1.5, "", "qlora_rm 1", [], {}, [1.0], ["a"], {"id": 5}, [{"id": []}], COMMANDS, "banana", {"probs": [1], "index": "x"}, {"probs": {}, "index": 0}]  # fmt: skip
    keys = ["server", "computes_in", "data", "rewards", "scores", "model", "status", "error"]
    count = 60
    for number in range(count):
        body = {
            key: draw.choice(leaves) if draw.random() < 0.6 else [draw.choice(leaves)] for key in draw.sample(keys, 5)
        }
        checks = checked(answer(json.dumps(body).encode()), draw.choice(["get_reward", "classify", "score", None]))
        assert not all(check.ok for check in checks), number
    tries(count)


class TestWordsForTheTerminal:
    @pytest.mark.parametrize(
        "serve",
        [
            answer(COMMANDS.encode(), "500 Error"),
            answer(b"x", "500 \x1b[2JError"),
            answer(json.dumps({"rewards": COMMANDS}).encode()),
            answer(json.dumps({"rewards": [COMMANDS]}, ensure_ascii=False).encode()),
            answer(b"", "302 Found", "Location: http://x/\x1b[2J"),
            answer(json.dumps({"server": f"qlora_rm {COMMANDS}", "computes_in": COMMANDS, "scores": COMMANDS}, ensure_ascii=False).encode()),
            lambda connection, head: connection.sendall(b"\x1b[2J\x07\r\n\r\n"),
        ],
    )  # fmt: skip
    @pytest.mark.parametrize("form", [(), ("--json",)])
    def test_are_escaped(self, serve: Serve, form: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
        with answering(serve) as url:
            assert main(["verify", str(llama_adapter()), "--url", f"{url}/get_reward", *form]) == 1
        said = capsys.readouterr()
        for text in (said.out, said.err):
            assert not any(character in text for character in HARMFUL)

    def test_one_function_for_all_such_text(self) -> None:
        assert printable("a\x1b[2J\nb\u202e\ud800é漢😀") == "a\\x1b[2J\\nb\\u202e\\ud800é漢😀"
        assert printable("a\n\tb\r", lines=True) == "a\n\tb\\r"
        for write in (as_json, json_line):
            assert json.loads(write([COMMANDS])) == [COMMANDS]
            assert not any(character in write([COMMANDS]) for character in HARMFUL)

    def test_errors_and_notes_too(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["verify", f"./none{COMMANDS.replace(chr(0), '')}"]) == 2
        assert not any(character in capsys.readouterr().err for character in HARMFUL)
