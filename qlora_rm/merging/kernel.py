"""Call the compiled part of `nf4` on tensors: nf4.c, which installing this package builds where there is a compiler."""

import ctypes
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from qlora_rm.backbone.precision import BLOCK

NAME = "qlora_rm.merging._nf4"


@cache
def _library() -> ctypes.CDLL | None:
    spec = find_spec(NAME)
    if spec is None or spec.origin is None:
        return None
    tensor, flag, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    try:
        library = ctypes.CDLL(spec.origin)
        library.block_scales_1.argtypes = [tensor, flag, count, tensor]
        library.there_and_back_1.argtypes = [tensor, flag, count, tensor, tensor, tensor, tensor]
    except (OSError, AttributeError):  # built for another machine, or from an older nf4.c
        return None
    library.block_scales_1.restype = library.there_and_back_1.restype = None
    return library


def is_built() -> bool:
    """Return whether the functions below can be called."""
    return _library() is not None


def block_scales(weights: Tensor) -> Tensor:
    """Return the largest magnitude of each block, fp32 [N / 64], of bf16 or fp32 weights [N]."""
    scales = torch.empty(len(weights) // BLOCK)
    _call("block_scales_1", weights, scales)
    return scales


def there_and_back(weights: Tensor, scales: Tensor, levels: Tensor, bounds: Tensor) -> Tensor:
    """Quantize `weights` to NF4 and return their dequantized values, fp32 [N].

    Arguments:
        weights: bf16 or fp32 [N].
        scales: the largest magnitude of each block, fp32 [N / 64].
        levels: the value of each code in each block, fp32 [N / 64, 16], in the order of the codes.
        bounds: the limits between codes, for weights divided by their scale, fp32 [15].
    """
    assert levels.shape == (len(scales), 16) and len(weights) == len(scales) * BLOCK and len(bounds) == 15
    values = torch.empty(len(weights))
    _call("there_and_back_1", weights, scales, levels, bounds, values)
    return values


def _call(function: str, weights: Tensor, *others: Tensor) -> None:
    assert len(weights) % BLOCK == 0
    is_bf16 = weights.dtype is torch.bfloat16
    assert is_bf16 or weights.dtype is torch.float32
    assert all(tensor.dtype is torch.float32 for tensor in others)
    assert all(tensor.is_contiguous() for tensor in (weights, *others))
    getattr(_library(), function)(
        weights.data_ptr(), is_bf16, len(weights) // BLOCK, *(tensor.data_ptr() for tensor in others)
    )
