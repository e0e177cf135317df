"""A GPU on a machine without one: device cuda:0 in the CPU's memory, which refuses tensors of the CPU as a GPU does.

    python -m tests.pretended_gpu MODULE ARGUMENT ...

runs a module as `python -m MODULE ARGUMENT ...` would on a host with a GPU. It shows which tensors do not follow the model,
and what code does where `torch.cuda.is_available()`; numbers are the CPU's, and kernels, speed and memory show nothing.
FlexAttention runs uncompiled. A process that pretends stays so: run it as one of its own.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "device.cpp"
NAME = "pretended GPU"
GB = 1_000_000_000
BUILD = """
import sys
from torch.utils.cpp_extension import load
load("pretended_gpu", [sys.argv[1]], extra_cflags=["-O0"], build_directory=sys.argv[2], is_python_module=False)
"""


def why_not() -> str | None:
    """Why a GPU cannot be pretended here, or None."""
    import torch

    if torch.version.cuda is not None or torch.version.hip is not None:
        return "this torch was built for real GPUs"
    if shutil.which("g++") is None or shutil.which("ninja") is None:
        return "no C++ compiler, or no ninja"
    return None


def pretend() -> None:
    """From now on this process has a GPU; to be called before torch is imported, which asks once for its devices."""
    assert "torch" not in sys.modules
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # there are no kernels to compile to
    origin = find_spec("torch")
    assert origin is not None and origin.origin is not None
    library = built()
    for name in ("libc10.so", "libtorch_cpu.so", "libtorch.so"):
        ctypes.CDLL(str(Path(origin.origin).parent / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    import bitsandbytes  # noqa: F401  (while torch.cuda has no answers, or it would look for its CUDA library)
    import torch

    _answer(torch)
    _move_storages(torch)


def built() -> Path:
    """The device's library, compiled for this torch in some 30 seconds where that was not done before."""
    folder = HERE.parents[1] / "build" / "pretended_gpu" / version("torch")
    library = folder / "pretended_gpu.so"
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-c", BUILD, str(SOURCE), str(folder)], check=True)
    return library


def _answer(torch: Any) -> None:
    """What torch.cuda says of its one device."""
    properties = types.SimpleNamespace(
        name=NAME, total_memory=24 * GB, major=9, minor=0, multi_processor_count=1, warp_size=32
    )
    answers = {
        "is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0, "get_device_name": NAME,
        "get_device_capability": (9, 0), "get_device_properties": properties, "is_bf16_supported": True,
        "mem_get_info": (20 * GB, 24 * GB), "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0,
        "max_memory_reserved": 0, "_exchange_device": 0, "_maybe_exchange_device": 0,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    for name in (
        "_lazy_init",
        "set_device",
        "synchronize",
        "empty_cache",
        "reset_peak_memory_stats",
        "manual_seed_all",
    ):
        setattr(torch.cuda, name, _nothing)
    random: dict[str, Callable[..., Any]] = {  # the CPU's generator draws for both
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": _nothing,
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": _nothing,
    }
    for name, function in random.items():
        setattr(torch.cuda, name, function)
        setattr(torch.cuda.random, name, function)
    torch.Tensor.pin_memory = lambda self, *_: self
    counted = torch.histc  # of whole numbers, as CUDA can and the CPU cannot
    torch.histc = lambda input, *more, **how: counted(input.float(), *more, **how)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _move_storages(torch: Any) -> None:
    """Storages are copied and moved by code that knows the devices torch was built for."""

    def to(storage: Any, *, device: Any, non_blocking: bool = False) -> Any:
        return storage if torch.device(device).type == storage.device.type else copied(storage, device)

    def copied(storage: Any, device: Any) -> Any:
        there = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device)
        there.copy_(torch.empty(0, dtype=torch.uint8, device=storage.device.type).set_(storage))
        return there.untyped_storage()

    torch.UntypedStorage.to = to
    torch.UntypedStorage.cpu = lambda self: to(self, device="cpu")
    torch.UntypedStorage.cuda = lambda self, *_, **__: to(self, device="cuda")
    torch.UntypedStorage.clone = lambda self: copied(self, self.device)
