"""Loading of checkpoints without running code in them.

A pickle may name any function to call. torch's `weights_only` builds tensors, plain containers and allow-listed
classes, and refuses everything else. transformers uses it. DeepSpeed 0.19 loads every file of its checkpoints with
`weights_only=False`, which is overridden here while a checkpoint is read.
"""

import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors import SafetensorError

from qlora_rm.errors import UserError, first_line

NEEDED = [
    # in DeepSpeed's optimizer states: plain numbers and names, none of which runs code when it is built
    *(LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address),
    # in numpy's random state in rng_state*.pth, as transformers lists them
    *(np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))),  # type: ignore[attr-defined]
]
"""The classes, besides torch's own, that a checkpoint of this project holds."""
NAMED = re.compile(r"(?:GLOBAL|[Uu]nsupported class|[Uu]nsupported function) ([\w.]+\.\w+)")
"""Pattern of the class or function that torch's error names."""


@contextmanager
def loading_safely() -> Iterator[None]:
    """Make every `torch.load` inside the block build only tensors, plain containers and `NEEDED` classes.

    Raises:
        UserError: a file, which the message names, asks for another class or is damaged.
    """
    real = torch.load

    def load(f: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            with torch.serialization.safe_globals(NEEDED):
                return real(f, *args, **{**kwargs, "weights_only": True})
        except (OSError, torch.OutOfMemoryError):
            raise
        except pickle.UnpicklingError as error:
            raise UserError(_refusal(f, error)) from error
        except Exception as error:
            raise UserError(
                f"{_name(f)} cannot be read ({type(error).__name__}: {first_line(error)}). Go on from another checkpoint."
            ) from error

    with patch.object(torch, "load", load):
        yield


@contextmanager
def reading(checkpoint: Path | str) -> Iterator[None]:
    """Apply `loading_safely`, and turn errors of libraries about a checkpoint's contents into messages too."""
    try:
        with loading_safely():
            yield
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        AssertionError,
        IndexError,
        RuntimeError,
        SafetensorError,
    ) as error:
        of_contents = isinstance(error, (RecursionError, NotImplementedError)) or "state_dict" in str(error)
        if isinstance(error, RuntimeError) and not of_contents:
            raise  # out of memory, collectives
        raise UserError(
            f"{checkpoint} cannot be resumed: its contents are not those of a checkpoint of this run "
            f"({type(error).__name__}: {first_line(error)}). Go on from another checkpoint."
        ) from error


def _refusal(file: Any, error: Exception) -> str:
    named = NAMED.search(str(error))
    if named is None:
        return f"{_name(file)} cannot be read: it is damaged, or not a file that torch.save wrote. Go on from another checkpoint."
    return (
        f"{_name(file)} asks for {named[1]}, which a checkpoint of this project does not hold and which may run code. It was not "
        "loaded. Go on from a checkpoint that you made."
    )


def _name(file: Any) -> str:
    return os.fspath(file) if isinstance(file, (str, os.PathLike)) else str(getattr(file, "name", "a file"))
