"""Recompute, piece by piece, the values that a weight had in training after NF4 quantization.

Quantization in blocks of 64 with absmax quantized in blocks of 256 (Dettmers et al. 2023, "QLoRA", section 3) is lossy.
An adapter was trained with the quantized weights, so it must be added to those.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Self

import bitsandbytes as bnb
import torch
from bitsandbytes import functional as F
from torch import Tensor

from qlora_rm.backbone.precision import BLOCK, NESTED_BLOCK
from qlora_rm.merging import kernel

PIECE = 1 << 20
"""Weights processed at a time, a multiple of `BLOCK`: few enough for the cache, and enough that threads rarely wait for
Python's lock."""


@dataclass(frozen=True)
class Rounded:
    """A weight of N values in 16 or 32 bit, read as bitsandbytes' quantization on loading would give it, bit for bit.

    Attributes:
        weight: [N], as stored.
        dtype: the dtype that it is quantized from and dequantized to.
        scales: each block's largest magnitude, used to quantize, fp32 [ceil(N / 64)].
        stored: the scales after their own quantization, used to dequantize.
    """

    weight: Tensor
    dtype: torch.dtype
    scales: Tensor
    stored: Tensor
    block: int = BLOCK

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype) -> Self:
        flat = weight.reshape(-1)
        scales = torch.cat([_scales(_numbers(flat[start:stop], dtype)) for start, stop in pieces(flat.numel())])
        return cls(flat, dtype, scales, _nested(scales.to(_device())).cpu())

    @property
    def numel(self) -> int:
        return self.weight.numel()

    def values(self, start: int, stop: int) -> Tensor:
        """Return values `start` to `stop`, fp32. `start` is a multiple of the block."""
        assert start % BLOCK == 0, start
        piece = _numbers(self.weight[start:stop], self.dtype)
        scales, stored = (s[start // BLOCK : -(-stop // BLOCK)] for s in (self.scales, self.stored))
        if _device().type != "cpu" or is_slow():
            return _by_bitsandbytes(piece.to(self.dtype), stored)
        whole, (codes, bounds) = len(piece) // BLOCK, _code()
        levels = (stored[:whole, None] * codes).to(self.dtype).float()
        values = kernel.there_and_back(piece[: whole * BLOCK], scales[:whole], levels, bounds)
        if whole == len(scales):
            return values
        return torch.cat([values, _by_bitsandbytes(piece[whole * BLOCK :].to(self.dtype), stored[whole:])])


@dataclass(frozen=True)
class Packed:
    """A weight of N values stored in 4 bit: two codes per byte, uint8 [N / 2], and one fp32 scale per block."""

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype
    block: int
    quant_type: str
    numel: int

    @classmethod
    def of(cls, weight: bnb.nn.Params4bit, dtype: torch.dtype) -> Self:
        """Wrap the stored weight, which dequantizes to `dtype` as in training."""
        state = weight.quant_state
        scales = state.absmax
        if state.nested:
            scales = F.dequantize_blockwise(scales, state.state2) + state.offset
        codes = weight.data.view(torch.uint8).reshape(-1)
        return cls(codes, scales.float(), dtype, state.blocksize, state.quant_type, state.shape.numel())

    def values(self, start: int, stop: int) -> Tensor:
        """Return values `start` to `stop`, fp32. `start` is a multiple of the block."""
        assert start % self.block == 0, start
        state = F.QuantState(
            absmax=self.scales[start // self.block : -(-stop // self.block)],
            shape=torch.Size([stop - start]),
            dtype=self.dtype,
            blocksize=self.block,
            quant_type=self.quant_type,
        )
        return F.dequantize_4bit(self.codes[start // 2 : -(-stop // 2)], state).reshape(-1).float()


def pieces(numel: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of each piece of `numel` values."""
    for start in range(0, numel, PIECE):
        yield start, min(start + PIECE, numel)


def is_slow() -> bool:
    """Return whether quantizing is many times slower here than with the compiled kernel."""
    return _device().type == "cpu" and not kernel.is_built()


def _device() -> torch.device:
    """Return the device on which training most likely quantized. A GPU kernel may differ from a CPU's for a value at a bound."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _numbers(piece: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast as bitsandbytes sees the values: to `dtype`, and fp16 to fp32."""
    return piece.to(dtype).float() if dtype is torch.float16 else piece.to(dtype)


def _scales(piece: Tensor) -> Tensor:
    """Return the largest magnitude of each block. The last block may be incomplete."""
    if not kernel.is_built() or len(piece) % BLOCK:
        blocks = torch.nn.functional.pad(piece, (0, -len(piece) % BLOCK)).view(-1, BLOCK)
        return blocks.abs().amax(1).float()
    return kernel.block_scales(piece)


def _by_bitsandbytes(piece: Tensor, stored: Tensor) -> Tensor:
    """Quantize `piece` and dequantize it by the `stored` scales, to fp32. Runs on the GPU where there is one."""
    packed, state = F.quantize_4bit(piece.to(_device()), blocksize=BLOCK, quant_type="nf4")
    state.absmax = stored.to(_device())
    return F.dequantize_4bit(packed.view(-1), state).view(-1).cpu().float()


def _nested(scales: Tensor) -> Tensor:
    """Return the scales after their own quantization ("double quantization")."""
    offset = scales.mean()
    codes, state = F.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
    return F.dequantize_blockwise(codes, state) + offset


@cache
def _code() -> tuple[Tensor, Tensor]:
    """Return the values of the 16 codes, and the 15 bounds between them: fp32 midpoints, as bitsandbytes computes them."""
    code = F.get_4bit_type("nf4", device="cpu")
    return code, (code[1:] + code[:-1]) / 2
