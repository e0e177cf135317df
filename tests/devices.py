"""The device that tests see: the CPU, also on a host with a GPU; `-m gpu` selects the tests of the GPU."""

import os
import re

VISIBLE = "CUDA_VISIBLE_DEVICES"
_before = os.environ.get(VISIBLE)


def asks_for_gpu(expression: str | None) -> bool:
    """Return whether pytest's `-m` expression selects the tests marked `gpu` rather than excluding them."""
    return bool(re.search(r"(?<!\bnot )\bgpu\b", expression or ""))


def hide_gpu() -> None:
    """Hide GPUs from this process and its children; call this before anything asks CUDA for its devices."""
    os.environ[VISIBLE] = ""


def show_gpu() -> None:
    """Restore the GPUs that were visible before."""
    if _before is None:
        os.environ.pop(VISIBLE, None)
    else:
        os.environ[VISIBLE] = _before


def why_no_gpu() -> str | None:
    """Return the reason why a GPU test cannot run here, or None."""
    import torch

    if torch.cuda.is_available():
        return None
    return (
        "no GPU here" if os.environ.get(VISIBLE) != "" else "the GPU is hidden from this run; `make test-gpu` shows it"
    )
