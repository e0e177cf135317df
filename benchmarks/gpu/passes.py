"""A forward and backward pass through an adapted model, and how far two of them lie apart.

The tolerance in fp32 is a constant: only the order of summation differs. In bf16 it is measured: a pass may lie `TIMES` as
far from the plain fp32 pass as the plain bf16 pass does.
"""

import gc
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

EXACT = {"scores": 5e-5, "gradients": 2e-4}
"""Relative distances (L2) that fp32 rounding explains; 1e-6 was measured on a CPU."""
TIMES = 3.0
"""Of two samples of rounding the ratio spreads: up to 1.9 was measured, on a mixture of experts in bf16 on a CPU."""

Distances = dict[str, float]


@dataclass(frozen=True)
class Pass:
    """Scores [S], and the gradient of every trained weight by name; fp32 on the CPU."""

    scores: Tensor
    gradients: dict[str, Tensor]


def one_pass(model: nn.Module, inputs: Mapping[str, Tensor], dtype: torch.dtype) -> Pass:
    """Scores in training mode, and the gradient of a sum that weighs them unequally; under autocast in 16 bit."""
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
    """Relative distances of scores and of all gradients taken together, measured by `other`."""
    assert one.gradients.keys() == other.gradients.keys(), one.gradients.keys() ^ other.gradients.keys()
    gradients, others = (torch.cat([p.gradients[name].flatten() for name in p.gradients]) for p in (one, other))
    return {
        "scores": float((one.scores - other.scores).norm() / other.scores.norm()),
        "gradients": float((gradients - others).norm() / others.norm()),
    }


def measured_tolerance(noise: Distances) -> Distances:
    """What is allowed in 16 bit, given the distance of the plain 16-bit pass from the plain fp32 one."""
    return {name: TIMES * distance for name, distance in noise.items()}


def within(found: Distances, allowed: Distances) -> bool:
    return all(found[name] <= allowed[name] for name in allowed)


def randomize(model: nn.Module) -> None:
    """Adapter and head weights that matter, the same on every device."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise * (0.02 if "lora_B" in name else 0.1))


def sequences(prompt: int, vocabulary: int) -> list[list[int]]:
    """Three prompts with four responses each; two of a prompt's responses share a beginning of their own."""
    draw = torch.Generator().manual_seed(2)

    def ids(count: int) -> list[int]:
        return torch.randint(5, vocabulary, (count,), generator=draw).tolist()

    made = []
    for _ in range(3):
        shared, turn = ids(prompt), ids(prompt // 4)
        made += [shared + ids(prompt // 3), shared + turn + ids(5), shared + turn + ids(prompt // 5), shared + ids(2)]
    return made


def free() -> None:
    """What is not referred to any more; and dynamo's compiled code, of which it keeps eight versions a function."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
