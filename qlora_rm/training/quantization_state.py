"""Checkpoints without the quantization constants, which follow from the base's own files."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bitsandbytes.nn import Linear4bit
from torch import nn


@contextmanager
def without_quantization_state(model: nn.Module) -> Iterator[None]:
    """Leave the quantization constants of 4-bit layers out of the state dicts made inside the block.

    DeepSpeed saves no frozen parameters, but bitsandbytes adds their constants as extra keys (`weight.absmax`, ...),
    and under ZeRO-3 every rank saves all of them: 72 GB in each checkpoint of a 70B backbone on 64 ranks. Nothing reads
    them: a resumed run quantizes its base again. Remove once DeepSpeed's `exclude_frozen_parameters` covers them.
    """
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    hooks = [layer.register_state_dict_post_hook(_drop_constants) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _drop_constants(layer: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}weight.")]:
        del state[key]
