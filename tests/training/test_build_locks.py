"""A run does not wait forever for the build lock of a process that was killed while it compiled an extension."""

import os
import threading
import time

import pytest

from qlora_rm.training import build_locks
from qlora_rm.training.build_locks import STALE_AFTER, clearing_build_locks, stale_locks


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    file = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    file.parent.mkdir(parents=True)
    file.touch()
    return file


def age(file, seconds):
    os.utime(file, (time.time() - seconds,) * 2)


def test_an_old_lock_without_a_holder_is_removed(lock, capsys):
    age(lock, STALE_AFTER + 60)
    with clearing_build_locks():
        pass
    assert not lock.exists()
    assert str(lock) in "".join(capsys.readouterr())


def test_a_young_lock_stays(lock):
    with clearing_build_locks():
        pass
    assert lock.exists()


def test_a_lock_that_a_process_holds_stays(lock, tmp_path):
    age(lock, STALE_AFTER + 60)
    with lock.open():
        assert stale_locks(tmp_path) == []
    assert stale_locks(tmp_path) == [lock]


def test_a_lock_that_grows_old_ends_the_waiting(lock, monkeypatch):
    monkeypatch.setattr(build_locks, "LOOK_EVERY", 0.05)
    ended = threading.Event()

    def wait_as_torch_does():
        while lock.exists():
            time.sleep(0.01)
        ended.set()

    threading.Thread(target=wait_as_torch_does, daemon=True).start()
    with clearing_build_locks():
        assert not ended.wait(0.3)
        age(lock, STALE_AFTER + 60)
        assert ended.wait(5)
