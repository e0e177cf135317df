"""Replacements, in a rehearsal, for kernels that cannot run on fake tensors or keep other tensors on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_rm.planning.skeleton import BLOCK, quantized_bytes


def materialize(model: nn.Module) -> None:
    """Give all parameters and buffers of a skeleton fake storage, and quantized layers a stand-in class."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if isinstance(parameter, (bnb.nn.Params4bit, bnb.nn.Int8Params)):
                stored = torch.empty(quantized_bytes(parameter)[0], dtype=torch.uint8)
                module.__class__ = FrozenLinear4bit if isinstance(module, bnb.nn.Linear4bit) else FrozenLinear8bit
                module._parameters[name] = nn.Parameter(stored, requires_grad=False)
            else:
                stored = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(stored, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class FrozenProduct(torch.autograd.Function):
    """x W^T with W dequantized for the product, and again in backward; the input is kept only if `keeps_input`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out_features: int, bias: Tensor | None, keeps_input: bool) -> Tensor:
        ctx.shape = (out_features, x.shape[-1])
        if keeps_input:
            ctx.save_for_backward(x)
        return nn.functional.linear(x, unpacked(ctx.shape, x), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad @ unpacked(ctx.shape, grad), None, None, None


def unpacked(shape: tuple[int, int], like: Tensor) -> Tensor:
    """A dequantized matrix in the dtype of `like`.

    Its scales, dequantized from 8 bit, are fp32 and exist twice for a moment (a second time when their mean is added).
    """
    scales = torch.empty(shape[0] * shape[1] // BLOCK)
    scales = scales + 1
    return torch.empty(shape, dtype=like.dtype)


class FrozenLinear4bit(bnb.nn.Linear4bit):
    """Replaces a `Linear4bit` that has storage."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return FrozenProduct.apply(x.to(self.compute_dtype), self.out_features, bias, False).to(x.dtype)


class FrozenLinear8bit(bnb.nn.Linear8bitLt):
    """Replaces a `Linear8bitLt`, whose product keeps its input."""

    def forward(self, x: Tensor) -> Tensor:
        return FrozenProduct.apply(x, self.out_features, self.bias, True)


class Flex(torch.autograd.Function):
    """Keeps what FlexAttention keeps: query, key, value, its output and a log-sum-exp per query; no mask, no scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = torch.empty_like(query[..., : value.shape[-1]])
        ctx.save_for_backward(query, key, value, out, torch.empty(query.shape[:-1]))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, logsumexp = ctx.saved_tensors
        _delta = torch.empty_like(logsumexp)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def flex_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """transformers' `flex_attention` on a GPU: it repeats keys and values if the number of heads is no power of 2."""
    heads = query.shape[1]
    if heads & (heads - 1):
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    return Flex.apply(query, key, value).transpose(1, 2).contiguous(), None


def experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Compute all chosen experts of all tokens at once over one dequantized expert; keeps as much as the loop in total.

    Arguments:
        hidden: [T, H].
        chosen, weights: [T, k], experts of each token and their shares.
    """
    first = module.gate_up_proj if module.has_gate else module.up_proj
    width = first.shape[-1 if module.is_transposed else -2]
    order = torch.zeros(chosen.numel(), dtype=torch.long)
    state = FrozenProduct.apply(hidden[order], width, None, False)
    state = module._apply_gate(state) if module.has_gate else module.act_fn(state)
    state = FrozenProduct.apply(state, hidden.shape[-1], None, False)
    state = state * weights.reshape(-1)[order, None]
    return state[order].view(*chosen.shape, -1).sum(1).to(hidden.dtype)


@contextmanager
def kernels_stood_in() -> Iterator[None]:
    """Replace FlexAttention and the experts' loop in transformers' kernel tables during a step."""
    tables = ((ALL_ATTENTION_FUNCTIONS, "flex_attention", flex_attention), (ALL_EXPERTS_FUNCTIONS, "eager", experts))
    for table, name, stand_in in tables:
        table[name] = stand_in
    try:
        yield
    finally:
        for table, name, _ in tables:
            del table[name]
