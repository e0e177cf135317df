"""Rounding noise of a model's scores: its measurement after training, and the tolerance that follows from it."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from qlora_rm.artifacts.golden import ROUNDED, SAME, GoldenItem, Tolerance
from qlora_rm.backbone.head import OwnPrecision
from qlora_rm.backbone.layouts import layouts_of
from qlora_rm.backbone.precision import NAMES, DtypeName
from qlora_rm.backbone.scoring import Layout, score_sequences
from qlora_rm.console import say
from qlora_rm.errors import UserError, first_line

LARGEST, TYPICAL = 4.0, 3.0
"""Factors on the measured noise that bound a copy's scores: for the largest difference, and for the root mean square.

Measured on five architectures with random adapters, trained in fp32 and in bf16. Merging, storing and computing in bf16
moved the largest difference and the root mean square by at most 1.9 times the noise. The exception is a mixture of
experts trained in bf16: its router chose another expert for one sequence. That score moved by 12 times the noise and is
refused.
"""

WIDEST = 0.5
"""Share of the golden scores' standard deviation that a tolerance never exceeds, unless that is below `ROUNDED`."""

NARROWER = {"bf16", "fp16", "8bit"}
"""Dtypes and quantization that round more than fp32."""

FP32_WIDEST = 100 * SAME.absolute
"""Upper bound on the tolerance of fp32 arithmetic."""


@dataclass(frozen=True)
class Noise:
    """How far rounding alone moves a model's golden scores in one dtype of weights and arithmetic.

    Each sequence is scored alone and in every batch layout in which the model gives the same score: padded on the
    right, on the left, and as a forest of shared prompts.

    Attributes:
        largest: largest distance of these scores from the golden ones.
        typical: root mean square of these distances.
        layouts: largest distance between two of these scores of one sequence.
    """

    largest: float
    typical: float
    layouts: float


def measure_noise(
    model: nn.Module, items: Sequence[GoldenItem], pad_token_id: int, trained_in: torch.dtype
) -> dict[DtypeName, Noise]:
    """Measure the noise of `model` by dtype name: fp32, bf16, and on a GPU or after training in fp16 also fp16.

    Arguments:
        model: the trained model with all its weights, outside of any autocast.
        items: its golden items, with the scores it gave in training's own arithmetic.
    """
    wanted = [torch.float32, torch.bfloat16]
    if trained_in is torch.float16 or torch.cuda.is_available():
        wanted.append(torch.float16)
    noise: dict[DtypeName, Noise] = {}
    if not items:
        return noise
    layouts = layouts_of(model)
    for dtype in wanted:
        try:
            with computing_in(model, dtype):
                measured = _noise(items, _all_ways(model, items, pad_token_id, layouts))
        except RuntimeError as error:  # out of memory, or an operation that this device lacks in this dtype
            say(f"noise in {NAMES[dtype]}: not measured, {first_line(error)}")
            continue
        if measured is None:
            say(f"warning: some golden scores are not finite in {NAMES[dtype]}; do not serve this model in it")
        else:
            noise[NAMES[dtype]] = measured
    return noise


def _all_ways(model: nn.Module, items: Sequence[GoldenItem], pad: int, layouts: Sequence[Layout]) -> Tensor:
    """Scores [W, S] of the golden sequences in W ways that must agree up to rounding: every layout, and alone."""
    sequences = [ids for item in items for ids in item.token_ids]
    ways = [score_sequences(model, sequences, pad_token_id=pad, layout=layout) for layout in layouts]
    ways.append(score_sequences(model, sequences, pad_token_id=pad, layout="right", tokens_per_batch=1))
    return torch.stack(ways)


def _noise(items: Sequence[GoldenItem], ways: Tensor) -> Noise | None:
    """The noise statistics over all ways; None if a score is not finite."""
    if not ways.isfinite().all():
        return None
    distances = (ways - torch.tensor([score for item in items for score in item.scores])).abs()
    apart = ways.amax(0) - ways.amin(0)
    return Noise(float(distances.max()), float(distances.square().mean().sqrt()), float(apart.max()))


@contextmanager
def computing_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Make `model` compute in `dtype`, as it would for a consumer that loads it in this dtype.

    This covers unquantized weights and the arithmetic of 4-bit layers, without autocast. The score head keeps its own
    precision. Afterwards everything is restored, bit for bit.
    """
    head = {id(p) for module in model.modules() if isinstance(module, OwnPrecision) for p in module.parameters()}
    weights = [
        (p, p.data)
        for p in model.parameters()
        if p.is_floating_point() and p.dtype in NAMES and p.dtype != dtype and id(p) not in head
    ]
    layers = [(m, m.compute_dtype) for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    try:
        for parameter, own in weights:
            parameter.data = own.to(dtype)
        for layer, _ in layers:
            layer.compute_dtype = dtype
        with _outside_autocast(model):
            yield
    finally:
        for parameter, own in weights:
            parameter.data = own
        for layer, compute in layers:
            layer.compute_dtype = compute


@contextmanager
def _outside_autocast(model: nn.Module) -> Iterator[None]:
    """Remove the autocast that accelerate puts around a prepared model's forward method."""
    wrapped = vars(model).get("forward")
    if "_original_forward" not in vars(model) or wrapped is None:
        yield
        return
    model.forward = vars(model)["_original_forward"]
    try:
        yield
    finally:
        model.forward = wrapped


def tolerance(items: Sequence[GoldenItem], noise: Mapping[Any, Noise], *precisions: str) -> Tolerance:
    """How far scores may differ from those of `items`, given everything that rounds either of them.

    4-bit weights are dequantized before they are multiplied, so only the dtypes count. LLM.int8() rounds activations,
    and its noise is not measured.

    Arguments:
        noise: of the model, by dtype; an absent dtype was not measured.
        precisions: dtypes of arithmetic and storage, and quantization, by name.

    Raises:
        UserError: a name is none of these. A wrong word thus never widens the tolerance.
    """
    if unknown := set(precisions) - NARROWER - {"fp32", "4bit", "none"}:
        raise UserError(
            f"{', '.join(map(repr, sorted(unknown)))} is no dtype or quantization, so no tolerance follows."
        )
    rounding = set(precisions) & NARROWER
    exact = noise.get("fp32")
    if not rounding:
        absolute = max(SAME.absolute, LARGEST * exact.largest if exact else 0.0)
        return _no_wider(SAME, absolute, FP32_WIDEST)
    known = [noise.get(name) or noise.get("bf16") for name in rounding - {"8bit"}]  # fp16 has more digits than bf16
    measured = [one for one in (*known, exact) if one is not None]
    widest = max(ROUNDED.absolute, WIDEST * _spread(items))
    largest = LARGEST * max((one.largest for one in measured), default=0.0)
    if "8bit" in rounding:
        largest = LARGEST * max(
            (one.largest for one in known if one), default=0.0
        )  # without that of fp32, its own rounding
    if None in known or "8bit" in rounding:
        return _no_wider(ROUNDED, max(ROUNDED.absolute, largest), widest)
    typical = min(max(SAME.absolute, TYPICAL * max(one.typical for one in measured)), widest)
    return replace(_no_wider(SAME, max(SAME.absolute, largest), widest), typical=typical)


def layout_tolerance(
    items: Sequence[GoldenItem], noise: Mapping[Any, Noise], computes_in: str, quantization: str
) -> Tolerance:
    """How far two scores of one sequence, alone or in any batch, may differ when computed in one dtype."""
    if quantization == "8bit" or (computes_in not in noise and computes_in != "fp32"):
        return ROUNDED
    layouts = noise[computes_in].layouts if computes_in in noise else 0.0
    widest = FP32_WIDEST if computes_in == "fp32" else max(ROUNDED.absolute, WIDEST * _spread(items))
    return _no_wider(SAME, max(SAME.absolute, LARGEST * layouts), widest)


def _no_wider(floor: Tolerance, absolute: float, widest: float) -> Tolerance:
    absolute = min(absolute, widest)
    return replace(floor, absolute=absolute, flip_margin=2 * absolute)


def _spread(items: Sequence[GoldenItem]) -> float:
    """Standard deviation of the golden scores."""
    return statistics.pstdev([score for item in items for score in item.scores] or [0.0])
