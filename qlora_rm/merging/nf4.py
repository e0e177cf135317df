"""What NF4 made of a weight in training, computed again piece by piece.

Quantization in blocks of 64 with absmax quantized in blocks of 256 (Dettmers et al. 2023, "QLoRA", section 3) loses
what cannot be merged back: an adapter trained beside quantized weights belongs on those very weights.
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
"""Weights worked on at a time, a multiple of `BLOCK`: few enough for a cache, and enough for threads that take turns in
Python to spend their time elsewhere."""


@dataclass(frozen=True)
class Rounded:
    """A weight of N values in 16 or 32 bit, to be seen as bitsandbytes' quantization on loading leaves it, bit for bit.

    Attributes:
        weight: [N], as it was stored.
        dtype: it is quantized from, and dequantized to.
        scales: each block's largest magnitude, by which it is quantized, fp32 [ceil(N / 64)].
        stored: the same after their own quantization, by which it is dequantized.
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
        """Values `start` to `stop`, fp32; `start` is a multiple of the block."""
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
    """A weight of N values that was stored in 4 bit: two codes a byte, uint8 [N / 2], and a scale for each block, fp32."""

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype
    block: int
    quant_type: str
    numel: int

    @classmethod
    def of(cls, weight: bnb.nn.Params4bit, dtype: torch.dtype) -> Self:
        """The stored weight, to be dequantized to `dtype`, as training computed it."""
        state = weight.quant_state
        scales = state.absmax
        if state.nested:
            scales = F.dequantize_blockwise(scales, state.state2) + state.offset
        codes = weight.data.view(torch.uint8).reshape(-1)
        return cls(codes, scales.float(), dtype, state.blocksize, state.quant_type, state.shape.numel())

    def values(self, start: int, stop: int) -> Tensor:
        """Values `start` to `stop`, fp32; `start` is a multiple of the block."""
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
    """(start, stop) of each piece of so many values."""
    for start in range(0, numel, PIECE):
        yield start, min(start + PIECE, numel)


def is_slow() -> bool:
    """Whether quantizing takes many times as long here as it might."""
    return _device().type == "cpu" and not kernel.is_built()


def _device() -> torch.device:
    """Where training quantized, most likely: a GPU's kernel need not agree with a CPU's about a value at a bound."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _numbers(piece: Tensor, dtype: torch.dtype) -> Tensor:
    """As bitsandbytes would see them: of `dtype`, fp16 as fp32."""
    return piece.to(dtype).float() if dtype is torch.float16 else piece.to(dtype)


def _scales(piece: Tensor) -> Tensor:
    """The largest magnitude of each block, of which the last may be incomplete."""
    if not kernel.is_built() or len(piece) % BLOCK:
        blocks = torch.nn.functional.pad(piece, (0, -len(piece) % BLOCK)).view(-1, BLOCK)
        return blocks.abs().amax(1).float()
    return kernel.block_scales(piece)


def _by_bitsandbytes(piece: Tensor, stored: Tensor) -> Tensor:
    """`piece` quantized, and dequantized by the `stored` scales, fp32; where there is a GPU, there."""
    packed, state = F.quantize_4bit(piece.to(_device()), blocksize=BLOCK, quant_type="nf4")
    state.absmax = stored.to(_device())
    return F.dequantize_4bit(packed.view(-1), state).view(-1).cpu().float()


def _nested(scales: Tensor) -> Tensor:
    """The scales after their own quantization ("double quantization")."""
    offset = scales.mean()
    codes, state = F.quantize_blockwise(scales - offset, blocksize=NESTED_BLOCK)
    return F.dequantize_blockwise(codes, state) + offset


@cache
def _code() -> tuple[Tensor, Tensor]:
    """The 16 codes' values, and the 15 bounds between them: midpoints in fp32 as bitsandbytes computes them."""
    code = F.get_4bit_type("nf4", device="cpu")
    return code, (code[1:] + code[:-1]) / 2
