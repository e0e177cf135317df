"""Settings for all tests: no hub, one thread, no deadlines, fixed random numbers, and real data if available."""

import os
import random
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

from tests.deep import SEED
from tests.devices import asks_for_gpu, hide_gpu, show_gpu, why_no_gpu

# Set before any test imports torch or transformers, and inherited by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
hide_gpu()
# When DeepSpeed compiles for the CPU, torch looks for ninja on PATH; it is next to the interpreter, activated or not.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

# `make test` draws the same examples every day; `make test-deep` draws more new ones, and prints how to repeat a
# failure.
settings.register_profile("gate", deadline=None, derandomize=True)
settings.register_profile("deep", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("deep" if SEED else "gate")


def pytest_configure(config: pytest.Config) -> None:
    if asks_for_gpu(config.option.markexpr):
        show_gpu()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files of slow tests first (`--no-loadscope-reorder` keeps the order), so that no worker gets one last."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and (reason := why_no_gpu()):
        pytest.skip(reason)


ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real preference rows, next to the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data: no folder {os.path.relpath(folder, ROOT)} beside the repository")
    return folder


@pytest.fixture(autouse=True)
def _random_numbers_of_its_own() -> None:
    """Give each test the same random numbers, whichever tests ran before in its process."""
    random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that there is a GPU with bf16 support; computing on it still fails."""
    import torch

    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "pretended GPU",
        "is_bf16_supported": True, "mem_get_info": (20_000_000_000, 24_000_000_000),
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
