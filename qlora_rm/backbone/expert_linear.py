"""The experts of a layer, computed one expert at a time from weights that may be packed in 4 bit.

transformers accepts any registered function for its fused experts (`transformers.integrations.moe`). This one
dequantizes an expert when its tokens are multiplied, and again in the backward pass, so that no copy of all experts
exists.

Shapes: E experts, T tokens, k experts a token, S = T k rows sorted by expert, H hidden size, r rank of an adapter.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

ONE_BY_ONE = "one_by_one"
"""Name of this implementation in transformers' registry."""


def one_by_one(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward pass of an experts module: [T, H], each token's experts [T, k] and their weights [T, k] -> [T, H].

    `self.lora` holds the adapters active during this pass: weight name -> A, B and their scale.
    """
    tokens, k = top_k_index.shape
    chosen = top_k_index.reshape(-1)
    order = chosen.argsort(stable=True)
    rows = torch.bincount(chosen, minlength=self.num_experts).tolist()[: self.num_experts]
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype

    def linear(name: str, x: Tensor) -> Tensor:
        bias = getattr(self, f"{name}_bias") if self.has_bias else None
        A, B, scale = self.lora.get(name, (None, None, 0.0))
        return ExpertLinear.apply(x.to(dtype), rows, getattr(self, name), bias, self.is_transposed, A, B, scale)

    x = hidden_states[order // k]
    inner = self._apply_gate(linear("gate_up_proj", x)) if self.has_gate else self.act_fn(linear("up_proj", x))
    out = linear("down_proj", inner)
    if self.has_post_expert_norm:
        out = self.post_expert_norm(out)
    weighted = out * top_k_weights.reshape(-1)[order, None]
    return weighted[order.argsort()].view(tokens, k, -1).sum(1).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(ONE_BY_ONE, one_by_one)


class ExpertLinear(torch.autograd.Function):
    """A linear layer of each expert on its own rows: x [S, in] -> [S, out], by frozen weights and an adapter's A and B.

    For the backward pass it keeps the parameter instead of its bytes, which ZeRO-3 releases in between and gathers
    again. It keeps x only where there is an adapter to train.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Sequence[int],
        weight: nn.Parameter,
        bias: Tensor | None,
        transposed: bool,
        A: Tensor | None,
        B: Tensor | None,
        scale: float,
    ) -> Tensor:
        ctx.rows, ctx.weight, ctx.transposed, ctx.scale = rows, weight, transposed, scale
        matrices = _Matrices(weight, transposed, x.dtype)
        out = x.new_zeros(len(x), matrices.out_features)
        for e, span in _spans(rows):
            out[span] = x[span] @ matrices[e].T
            if bias is not None:
                out[span] += bias[e]
        if A is not None and B is not None:
            ctx.save_for_backward(x, A, B)
            for e, span in _spans(rows):
                a, b = (factor.to(x.dtype) for factor in _of_expert(A, B, e, len(rows)))
                out[span] += scale * (x[span] @ a.T) @ b.T
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: under checkpointing each read recomputes them
        grad_x = grad_A = grad_B = None
        if ctx.needs_input_grad[0]:
            matrices = _Matrices(ctx.weight, ctx.transposed, grad.dtype)
            grad_x = grad.new_zeros(len(grad), matrices.in_features)
            for e, span in _spans(ctx.rows):
                grad_x[span] = grad[span] @ matrices[e]
        if saved:
            x, A, B = saved
            grad_A, grad_B = torch.zeros_like(A), torch.zeros_like(B)
            for e, span in _spans(ctx.rows):
                a, b = (factor.to(grad.dtype) for factor in _of_expert(A, B, e, len(ctx.rows)))
                inner = ctx.scale * grad[span] @ b
                if grad_x is not None:
                    grad_x[span] += inner @ a
                into_A, into_B = _of_expert(grad_A, grad_B, e, len(ctx.rows))
                into_A.copy_(inner.T @ x[span])
                into_B.copy_(ctx.scale * grad[span].T @ (x[span] @ a.T))
        return grad_x, None, None, None, None, grad_A, grad_B, None


class _Matrices:
    """The experts' matrices [out, in] one at a time, dequantized if they are packed.

    This object holds views of the packed bytes: none may outlast the module's forward or backward pass.
    """

    def __init__(self, weight: nn.Parameter, transposed: bool, dtype: torch.dtype):
        self.state: Any = weight.quant_state if isinstance(weight, Params4bit) else None
        self.shape, self.transposed, self.dtype = logical_shape(weight), transposed, dtype
        self.out_features, self.in_features = self.shape[:0:-1] if transposed else self.shape[1:]
        self.stored = weight.data.view(self.shape[0], -1)
        if self.state:
            absmax = self.state.absmax
            if self.state.nested:
                absmax = dequantize_blockwise(absmax, self.state.state2) + self.state.offset
            self.absmax = absmax.view(self.shape[0], -1)

    def __getitem__(self, e: int) -> Tensor:
        matrix = self.stored[e].view(self.shape[1:]) if self.state is None else self._dequantized(e)
        return (matrix.T if self.transposed else matrix).to(self.dtype)

    def _dequantized(self, e: int) -> Tensor:
        """Dequantize in rows of a block: bitsandbytes 0.50's CPU kernel uses wrong scales if blocks straddle rows."""
        part = QuantState(
            absmax=self.absmax[e],
            shape=torch.Size((self.absmax.shape[1], self.state.blocksize)),
            dtype=self.state.dtype,
            blocksize=self.state.blocksize,
            quant_type=self.state.quant_type,
        )
        return dequantize_4bit(self.stored[e], part).view(self.shape[1:])


def unpacked(weight: Params4bit) -> Tensor:
    """Dequantize all experts' weights to fp32 on the CPU, one after the other."""
    matrices = _Matrices(weight, False, torch.float32)
    return torch.stack([matrices[e].cpu() for e in range(len(matrices.stored))])


def logical_shape(weight: nn.Parameter) -> torch.Size:
    """Shape [E, out, in] or [E, in, out] of a fused weight, even when it is packed, or sharded by ZeRO-3."""
    if isinstance(weight, Params4bit):
        return torch.Size(weight.quant_state.shape)
    return torch.Size(getattr(weight, "ds_shape", weight.shape))


def _spans(rows: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, and their slice. Rows after the last expert's belong to no expert."""
    start = 0
    for e, count in enumerate(rows):
        if count:
            yield e, slice(start, start + count)
        start += count


def _of_expert(A: Tensor, B: Tensor, e: int, experts: int) -> tuple[Tensor, Tensor]:
    """Views of expert e's A [r, in] and B [out, r]. PEFT lays out A as [E r, in] and B as [out, r E], E fastest."""
    return A.view(experts, -1, A.shape[1])[e], B.view(len(B), -1, experts)[..., e]
