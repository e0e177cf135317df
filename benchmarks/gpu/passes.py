"""Run a forward and backward pass through an adapted model, and measure the distance of two passes.

The tolerance in fp32 is a constant, because only the order of summation differs. In bf16 it is measured: the distance of a pass
from the plain fp32 pass may be `TIMES` that of the plain bf16 pass.
"""

import gc
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EXACT = {"scores": 5e-5, "gradients": 2e-4}
"""Relative distances (L2) that fp32 rounding explains. On a CPU, 1e-6 was measured."""
TIMES = 3.0
"""The ratio of two samples of rounding varies: up to 1.9 was measured, on a mixture of experts in bf16 on a CPU."""

Distances = dict[str, float]


@dataclass(frozen=True)
class Pass:
    """Scores [S], and the gradient of every trained weight by name, in fp32 on the CPU."""

    scores: Tensor
    gradients: dict[str, Tensor]


def one_pass(model: nn.Module, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> Pass:
    """Compute scores in training mode, and the gradient of their unequally weighted sum. Uses autocast in 16 bit."""
    device = next(model.parameters()).device
    autocast = nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype)
    model.train()
    model.zero_grad()
    with autocast:
        scores = model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits[:, 0].float()
    (scores * torch.linspace(-1, 2, len(scores), device=device)).sum().backward()
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return Pass(scores.detach().cpu(), gradients)


def apart(one: Pass, other: Pass) -> Distances:
    """Return the distances of scores and of all gradients together, relative to `other`."""
    assert one.gradients.keys() == other.gradients.keys(), one.gradients.keys() ^ other.gradients.keys()
    gradients, others = (torch.cat([p.gradients[name].flatten() for name in p.gradients]) for p in (one, other))
    return {
        "scores": float((one.scores - other.scores).norm() / other.scores.norm()),
        "gradients": float((gradients - others).norm() / others.norm()),
    }


def measured_tolerance(noise: Distances) -> Distances:
    """Return the tolerance in 16 bit, given the distance of the plain 16-bit pass from the plain fp32 one."""
    return {name: TIMES * distance for name, distance in noise.items()}


def within(found: Distances, allowed: Distances) -> bool:
    return all(found[name] <= allowed[name] for name in allowed)


def randomize(model: nn.Module) -> None:
    """Set adapter and head weights to values that affect scores, the same on every device."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise * (0.02 if "lora_B" in name else 0.1))


def sequences(prompt: int, vocabulary: int) -> list[list[int]]:
    """Make three prompts with four responses each. Two responses of each prompt also share a prefix of their own."""
    draw = torch.Generator().manual_seed(2)

    def ids(count: int) -> list[int]:
        return torch.randint(5, vocabulary, (count,), generator=draw).tolist()

    made = []
    for _ in range(3):
        shared, turn = ids(prompt), ids(prompt // 4)
        made += [shared + ids(prompt // 3), shared + turn + ids(5), shared + turn + ids(prompt // 5), shared + ids(2)]
    return made


def free() -> None:
    """Free unreferenced memory and dynamo's compiled code, of which it keeps eight versions per function."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
