"""What every test stands on: no hub, one thread, no deadlines, and the real data where there is any."""

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Set before any test imports torch or transformers, and inherited by the processes that tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# torch looks up ninja on PATH when DeepSpeed compiles for the CPU; it stands beside the interpreter, activated or not.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

settings.register_profile("qlora_rm", deadline=None)
settings.load_profile("qlora_rm")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real preference rows, kept beside the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"real data: no folder {os.path.relpath(folder, ROOT)} beside the repository")
    return folder
