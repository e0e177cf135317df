"""The score head: how it is found, computes in its own precision, and is initialized small."""

import math
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class OwnPrecision:
    """Mixin: compute this module in the dtype of its own weights, even under autocast.

    Autocast would otherwise run an fp32 head in bf16, and round scores and losses to 8 bits of mantissa (losses of
    exactly 0.6875).
    """

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        weight = next(self.parameters())  # type: ignore[attr-defined]

        def own(x: Any) -> Any:
            return x.to(weight.dtype) if torch.is_tensor(x) and x.is_floating_point() else x

        with torch.autocast(weight.device.type, enabled=False):
            return super().forward(*map(own, inputs), **{k: own(v) for k, v in kwargs.items()})  # type: ignore[misc]


_own_precision_classes: dict[type, type] = {}


def compute_in_own_precision(module: nn.Module) -> None:
    """Give `module` the mixin in place: its class changes, its parameters and their names do not."""
    cls = type(module)
    if not issubclass(cls, OwnPrecision):
        if cls not in _own_precision_classes:
            _own_precision_classes[cls] = type(f"OwnPrecision{cls.__name__}", (OwnPrecision, cls), {})
        module.__class__ = _own_precision_classes[cls]


def head_modules(model: PreTrainedModel) -> list[str]:
    """Names of the modules that form the head: all with weights outside the backbone, and a pooler inside it.

    An encoder's pooler is inside its backbone, but language-model checkpoints do not hold it. Frozen with the backbone,
    it would stay random and not be saved.
    """
    prefix = model.base_model_prefix
    outside = [n for n, child in model.named_children() if n != prefix and any(True for _ in child.parameters())]
    poolers = [n for n, _ in model.named_modules() if n.startswith(f"{prefix}.") and n.endswith(".pooler")]
    return outside + poolers


def is_in_head(name: str, head: list[str]) -> bool:
    """Whether the module or parameter `name` belongs to one of the modules named in `head`."""
    return any(name == module or name.startswith(f"{module}.") for module in head)


def initialize(head: nn.Linear, std: float | None, seed: int) -> None:
    """Draw a new head's weights from N(0, std), reproducibly. std None means 1/sqrt(H + 1); 0 gives exact zeros.

    Source: Stiennon et al. 2020, "Learning to summarize from human feedback", appendix B.
    """
    std = 1 / math.sqrt(head.in_features + 1) if std is None else std
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * std)
        if head.bias is not None:
            head.bias.zero_()
