"""Run servers on loopback, in a thread of the test process or as a user starts them."""

import faulthandler
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from qlora_rm.artifacts.load import RewardModel
from qlora_rm.config import ServeConfig
from qlora_rm.serving.app import Service
from qlora_rm.serving.connections import protocol_for
from qlora_rm.serving.run import make_service

ROOT = Path(__file__).resolve().parents[2]
LOCAL = "http://localhost"
PATIENCE = 60
"""Timeout in seconds for steps that take a moment on an idle machine."""


@contextmanager
def running(app: ASGIApp, connections: int = 1000) -> Iterator[str]:
    """Serve `app` on a free port with the protocol class of `qlora-rm serve`, and yield its URL."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(
        app, http=protocol_for(connections), log_level="error", lifespan="off", timeout_graceful_shutdown=5
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        require_ended(thread)


@contextmanager
def served(model: RewardModel, folder: Path, token: str | None = None, **settings: Any) -> Iterator[Service]:
    """Yield a service around `model`, and end its threads afterwards."""
    service = make_service(model, str(folder), ServeConfig(**settings), token)
    try:
        yield service
    finally:
        service.batcher.close(PATIENCE)
        require_ended(service.batcher._thread)
        service.lanes.close()


def require_ended(thread: threading.Thread) -> None:
    """Fail if a thread has not ended in time, and dump the stack of every thread."""
    if thread.is_alive():
        faulthandler.dump_traceback(all_threads=True)
        raise AssertionError(f"thread {thread.name} has not ended")


class Door:
    """`qlora-rm serve` in its own process, on a free port.

    Arguments:
        code: a program to run in place of the command, with the same arguments.
    """

    def __init__(self, folder: Path, *words: str, log: Path, code: str | None = None) -> None:
        self.log = log
        program = ["-m", "qlora_rm.cli"] if code is None else ["-c", code]
        command = [sys.executable, *program, "serve", str(folder), "--port", "0", *words]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, stderr=file)

    def url(self) -> str:
        """Wait until it listens, and return its URL."""
        wait_until(lambda: "listening on" in self.said() or self.process.poll() is not None)
        found = re.search(r"listening on (\S+)", self.said())
        assert found, self.said()
        return found[1]

    def said(self) -> str:
        return self.log.read_text()

    def ends(self) -> int:
        """Wait for its end, and return its exit status."""
        return self.process.wait(PATIENCE)


def wait_until(holds: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
