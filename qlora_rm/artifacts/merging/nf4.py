"""What NF4 made of a weight in training, computed again piece by piece.

Quantization in blocks of 64 with absmax quantized in blocks of 256 (Dettmers et al. 2023, "QLoRA", section 3) loses
what cannot be merged back: an adapter trained beside quantized weights belongs on those very weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import bitsandbytes as bnb
import torch
from bitsandbytes import functional as F
from torch import Tensor

BLOCK = 64
NESTED_BLOCK = 256
PIECE = 1 << 17
"""Weights worked on at a time: a multiple of `BLOCK`, and small enough for a core's cache."""


@dataclass(frozen=True)
class Packed:
    """A quantized weight of N values: two codes a byte, uint8 [N / 2], and the scale of each block, fp32 [N / block].

    Attributes:
        dtype: what dequantizing gives.
    """

    codes: Tensor
    absmax: Tensor
    dtype: torch.dtype
    block: int
    quant_type: str

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype) -> Self:
        """`weight`, cast to `dtype` and quantized as bitsandbytes does on loading, bit for bit."""
        flat, device = weight.reshape(-1), torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if flat.numel() % BLOCK:
            packed, state = F.quantize_4bit(flat.to(device, dtype), blocksize=BLOCK, quant_type="nf4")
            return cls(packed.view(-1).cpu(), _nested(state.absmax).cpu(), dtype, BLOCK, "nf4")
        codes, absmax = torch.empty(flat.numel() // 2, dtype=torch.uint8), torch.empty(flat.numel() // BLOCK)
        for start in range(0, flat.numel(), PIECE):
            piece = flat[start : start + PIECE].to(device, dtype)
            some, scales = _quantize(piece)
            codes[start // 2 :][: some.numel()] = some
            absmax[start // BLOCK :][: scales.numel()] = scales
        return cls(codes, _nested(absmax.to(device)).cpu(), dtype, BLOCK, "nf4")

    @classmethod
    def from_parameter(cls, weight: bnb.nn.Params4bit) -> Self:
        """A weight that was stored in 4 bit."""
        state = weight.quant_state
        absmax = state.absmax
        if state.nested:
            absmax = F.dequantize_blockwise(absmax, state.state2) + state.offset
        codes = weight.data.view(torch.uint8).reshape(-1)
        return cls(codes, absmax.float(), state.dtype, state.blocksize, state.quant_type)

    def values(self, start: int, stop: int) -> Tensor:
        """Values `start` to `stop` of the flattened weight, in `dtype`; `start` is a multiple of the block."""
        state = F.QuantState(
            absmax=self.absmax[start // self.block : -(-stop // self.block)],
            shape=torch.Size([stop - start]),
            dtype=self.dtype,
            blocksize=self.block,
            quant_type=self.quant_type,
        )
        return F.dequantize_4bit(self.codes[start // 2 : -(-stop // 2)], state).reshape(-1)


def _nested(absmax: Tensor) -> Tensor:
    """The scales after their own quantization ("double quantization")."""
    offset = absmax.mean()
    codes, state = F.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
    return F.dequantize_blockwise(codes, state) + offset


def _quantize(piece: Tensor) -> tuple[Tensor, Tensor]:
    """Packed codes and scales of a whole number of blocks.

    bitsandbytes 0.50 has no CPU kernel for this: its `torch.bucketize` takes 25 ns a weight on one core, five times as
    long as copying the weight's file. Counting the bounds below each value gives the same codes in about 3 ns.
    """
    if piece.device.type != "cpu":
        packed, state = F.quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4")
        return packed.view(-1).cpu(), state.absmax.cpu()
    blocks = piece.float().view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    # bitsandbytes' own order of operations: the last bit decides at a bound
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38)).view(-1, 1)).view(-1)
    count, above = torch.zeros_like(scaled), torch.empty_like(scaled)
    for bound in _bounds():
        count += torch.gt(scaled, bound, out=above)  # floats: a comparison into bool is not vectorized
    pairs = count.to(torch.uint8).view(torch.int16)  # little-endian: the first of two codes in the low byte
    return ((pairs << 4) | (pairs >> 8)).to(torch.uint8), absmax


def _bounds() -> Iterator[Tensor]:
    """The 15 bounds between the 16 codes, midpoints in fp32 as bitsandbytes computes them."""
    code = F.get_4bit_type("nf4", device="cpu")
    yield from (code[1:] + code[:-1]) / 2
