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

PIECE = 1 << 18
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

    bitsandbytes 0.50 has no CPU kernel for this: its `torch.bucketize` takes 25 ns a weight on one core, many times as
    long as copying the weight's file. Here bf16 weights are looked up, others counted through the bounds.
    """
    if piece.device.type != "cpu":
        packed, state = F.quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4")
        return packed.view(-1).cpu(), state.absmax.cpu()
    found = _look_up(piece) if piece.dtype is torch.bfloat16 else None
    codes, absmax = found or _count(piece)
    pairs = codes.view(torch.int16)  # little-endian: the first of two codes in the low byte
    return ((pairs << 4) | (pairs >> 8)).to(torch.uint8), absmax


def _count(values: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 [N] and scales fp32 [N / 64]: a value's code is the number of bounds below it."""
    blocks = values.float().view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    # bitsandbytes' own order of operations: the last bit decides at a bound
    scaled = (blocks * (1.0 / absmax.clamp(min=1e-38)).view(-1, 1)).view(-1)
    count, above = torch.zeros_like(scaled), torch.empty_like(scaled)
    for bound in _bounds():
        count += torch.gt(scaled, bound, out=above)  # floats: a comparison into bool is not vectorized
    return count.to(torch.uint8), absmax


MANTISSA, LOW = 1 << 7, 7
"""Mantissas of a bf16 number; exponents below a block's largest, from which on every value has the code of 0."""

SMALLEST, LARGEST = 8 << 7, 250 << 7
"""Bits of the scales whose reciprocals, and products with them, are ordinary numbers; others are counted."""


def _look_up(values: Tensor) -> tuple[Tensor, Tensor] | None:
    """As `_count`, for bf16 values; None where a block's scale is zero, tiny or huge.

    A code depends on no more than the mantissas of value and scale, the value's sign, and how many powers of two they
    are apart, since scaling by these is exact: 2^18 cases, in a table made by `_count`.
    """
    bits = values.view(torch.int16).view(-1, BLOCK)
    magnitude = bits & 0x7FFF
    largest = magnitude.amax(1, keepdim=True)
    low, high = largest.aminmax()
    if low < SMALLEST or high > LARGEST:
        return None
    scale = largest.int()
    below = (magnitude - (largest & -MANTISSA)).clamp_(min=-LOW * MANTISSA)  # [-7 * 128, 128)
    place = ((bits >> 5) & 1024) + below
    place = place.int() + ((scale & (MANTISSA - 1)) * 2048 + LOW * MANTISSA)
    codes = _table().index_select(0, place.view(-1))
    return codes, largest.view(torch.bfloat16).float().view(-1)


@cache
def _table() -> Tensor:
    """uint8 [128 scales' mantissas, 2 signs, 8 exponents, 128 mantissas], flattened."""
    mantissas = torch.arange(MANTISSA, dtype=torch.int16)
    one = 127 << 7
    scales = (mantissas + one).view(torch.bfloat16)
    exponents = torch.arange(-LOW, 1, dtype=torch.int16) * MANTISSA
    values = (exponents[:, None] + mantissas + one).view(-1).view(torch.bfloat16)
    values = torch.cat([values, -values])

    def codes(scale: Tensor) -> Tensor:
        blocks = torch.zeros(len(values), BLOCK, dtype=torch.bfloat16)
        blocks[:, 0], blocks[:, 1] = scale, values.clamp(-scale, scale)  # none is larger than its scale
        return _count(blocks.view(-1))[0].view(-1, BLOCK)[:, 1]

    return torch.cat([codes(scale) for scale in scales])


def _bounds() -> Iterator[Tensor]:
    """The 15 bounds between the 16 codes, midpoints in fp32 as bitsandbytes computes them."""
    code = F.get_4bit_type("nf4", device="cpu")
    yield from (code[1:] + code[:-1]) / 2
