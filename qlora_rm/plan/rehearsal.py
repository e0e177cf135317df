"""A training step without numbers: the model's own code over tensors that have shapes and no storage, and what it keeps.

Forward and backward pass run for real (attention, adapters, checkpointing, autocast, whatever the architecture does) on
torch's fake tensors, and a meter counts the storages alive after every operation. What a formula must be told for each
architecture is read off the architecture itself. Three things are stood in for, since their kernels do not run on fake
tensors or differ by device: the quantized product (`frozen_product`), FlexAttention, and fused experts.

Layers of one kind cost the same, so the step is rehearsed on two of each kind and on three, and the difference counted
for the rest.
"""

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_rm.plan.skeleton import BLOCK, backbone_of, quantized_bytes


@dataclass(frozen=True)
class Batch:
    """Shape of a micro-batch: R rows of L tokens that S scores are read from; packed as a forest, or padded."""

    rows: int
    length: int
    sequences: int
    packed: bool = True


@dataclass(frozen=True)
class Step:
    """Bytes that a step takes beside the weights.

    Attributes:
        kept: alive when the forward pass ends: what backward will need.
        peak: the most that is alive at one time.
        gradients: of the trained weights, alive at that time (part of `peak`).
    """

    kept: int
    peak: int
    gradients: int

    def __add__(self, other: "Step") -> "Step":
        return Step(self.kept + other.kept, self.peak + other.peak, self.gradients + other.gradients)

    def times(self, n: int) -> "Step":
        return Step(self.kept * n, self.peak * n, self.gradients * n)

    def towards(self, other: "Step", part: float) -> "Step":
        """On the straight line to `other`."""
        return Step(*(math.ceil(a + (b - a) * part) for a, b in zip(astuple(self), astuple(other), strict=True)))

    def minus(self, other: "Step") -> "Step":
        return self + other.times(-1)


class Meter(TorchDispatchMode):
    """Bytes of the storages made since it was entered and still alive; `peak` is the most there were."""

    def __init__(self, known: nn.Module):
        super().__init__()
        self.live = self.peak = self.gradients = self.gradients_at_peak = 0
        self.seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        for tensor in [*known.parameters(), *known.buffers()]:
            self.seen[tensor.untyped_storage()] = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self.seen:
            return
        self.seen[storage] = size = storage.nbytes()
        self.live += size
        if self.live > self.peak:
            self.peak, self.gradients_at_peak = self.live, self.gradients
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size

    def gradient_made(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.gradients += parameter.grad.nbytes


class Rehearsal:
    """Steps of the model whose skeleton it is given, which it takes over.

    Arguments:
        model: of `skeleton.build`.
        dtype: compute dtype; 16-bit ones run under autocast, as the trainer runs them.
        kernel: attention kernel: `sdpa` or `eager` as a CPU runs them, or `flex_attention`.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, dtype: torch.dtype, kernel: str):
        self.model, self.dtype, self.kernel = model, dtype, kernel
        self.inner = backbone_of(model)
        self.inner.set_attn_implementation(kernel)
        self.inner.set_experts_implementation("eager")
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.fake:
            materialize(model)
        self.model.train()
        self.layers = layer_list(self.inner)
        self.kinds = kinds_of_layers(self.inner, self.layers)
        self._steps: dict[Any, Step] = {}

    def step(self, batch: Batch, *, checkpointing: bool, accumulates: bool = False) -> Step:
        """Bytes of one forward and backward pass.

        Arguments:
            accumulates: gradients of earlier micro-batches stand, and are not counted again.
        """
        key = (batch, checkpointing, accumulates)
        if key not in self._steps:
            self._steps[key] = self._step(batch, checkpointing, accumulates)
        return self._steps[key]

    def _step(self, batch: Batch, checkpointing: bool, accumulates: bool) -> Step:
        count = {kind: self.kinds.count(kind) for kind in dict.fromkeys(self.kinds)}
        few = {kind: min(n, 2) for kind, n in count.items()}
        total = base = self._run(few, batch, checkpointing, accumulates)
        for kind, n in count.items():
            if n > few[kind]:
                one_more = self._run(few | {kind: few[kind] + 1}, batch, checkpointing, accumulates)
                total = total + one_more.minus(base).times(n - few[kind])
        return total

    def _run(self, counts: dict[Any, int], batch: Batch, checkpointing: bool, accumulates: bool) -> Step:
        """The step on so many layers of each kind."""
        with self._only(counts), self.fake, kernels_stood_in(), Meter(self.model) as meter:
            switch_checkpointing(self.inner, checkpointing)
            trained = [p for p in self.model.parameters() if p.requires_grad]
            for parameter in trained:
                parameter.grad = None
            if accumulates:
                for parameter in trained:
                    parameter.grad = torch.zeros_like(parameter)
            start = meter.live
            hooks = [p.register_post_accumulate_grad_hook(meter.gradient_made) for p in trained if not accumulates]
            with torch.autocast("cpu", self.dtype) if self.dtype != torch.float32 else nullcontext():
                scores = self.model(**inputs(batch)).logits
            kept = meter.live - start
            scores.float().sum().backward()
            for hook in hooks:
                hook.remove()
            for parameter in trained:
                parameter.grad = None
        return Step(kept, meter.peak - start, meter.gradients_at_peak)

    @contextmanager
    def _only(self, counts: dict[Any, int]) -> Iterator[None]:
        """Take all but the first so many layers of each kind out of the model."""
        if self.layers is None:
            yield
            return
        owner, name, layers = self.layers
        left, chosen = dict(counts), []
        for i, kind in enumerate(self.kinds):
            if left[kind] > 0:
                left[kind] -= 1
                chosen.append(i)
        config = self.inner.config.get_text_config()
        types = getattr(config, "layer_types", None)
        number = config.num_hidden_layers
        setattr(owner, name, nn.ModuleList(layers[i] for i in chosen))
        config.num_hidden_layers = len(chosen)
        if types:
            config.layer_types = [types[i] for i in chosen]
        try:
            yield
        finally:
            setattr(owner, name, layers)
            config.num_hidden_layers = number
            if types:
                config.layer_types = types


def inputs(batch: Batch) -> dict[str, Tensor]:
    """The forward pass's inputs in the shapes of `batch`: a forest's, or a padded batch's with its mask laid out."""
    ids = torch.zeros(batch.rows, batch.length, dtype=torch.long)
    if batch.packed:
        leaves = torch.zeros(batch.sequences, 2, dtype=torch.long)
        return {"input_ids": ids, "position_ids": ids.clone(), "subtree_end": ids.clone(), "leaves": leaves}
    mask = torch.ones(batch.rows, 1, batch.length, batch.length, dtype=torch.bool)
    return {"input_ids": ids, "attention_mask": mask}


def switch_checkpointing(model: PreTrainedModel, on: bool) -> None:
    if on:
        model.activation_checkpointing_enable({"use_reentrant": False})
    elif model.is_activation_checkpointing:
        model.activation_checkpointing_disable()


def layer_list(model: PreTrainedModel) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """The list of transformer layers, with the module and the name it stands under; None where there is none."""
    found = [
        (sum(p.numel() for p in child.parameters()), owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == model.config.get_text_config().num_hidden_layers
    ]
    return max(found, key=lambda entry: entry[0])[1:] if found else None


def kinds_of_layers(model: PreTrainedModel, layers: Any) -> list[Any]:
    """What tells layers apart, for each of them: class, shapes, and the kind of attention."""
    if layers is None:
        return []
    types = getattr(model.config.get_text_config(), "layer_types", None) or [""] * len(layers[2])
    return [
        (kind, type(layer), tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()))
        for kind, layer in zip(types, layers[2], strict=True)
    ]


# ---- stand-ins ---------------------------------------------------------------------------------------------------------


def materialize(model: nn.Module) -> None:
    """Give every parameter and buffer of a skeleton a fake storage; quantized layers get a stand-in's class."""
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
    """x W^T with W unpacked for the moment of the product, and again in backward; the input is not kept."""

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
    """A matrix in the dtype of `like`; its scales, once out of their own 8 bit, are fp32, and are made twice over (one
    more time where their mean is added)."""
    scales = torch.empty(shape[0] * shape[1] // BLOCK)
    scales = scales + 1
    return torch.empty(shape, dtype=like.dtype)


class FrozenLinear4bit(bnb.nn.Linear4bit):
    """Takes the place of a `Linear4bit` with storage."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return FrozenProduct.apply(x.to(self.compute_dtype), self.out_features, bias, False).to(x.dtype)


class FrozenLinear8bit(bnb.nn.Linear8bitLt):
    """Takes the place of a `Linear8bitLt`, whose product keeps its input."""

    def forward(self, x: Tensor) -> Tensor:
        return FrozenProduct.apply(x, self.out_features, self.bias, True)


class Flex(torch.autograd.Function):
    """What FlexAttention keeps: query, key, value, its output and a log-sum-exp per query; no mask, no scores."""

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
    """transformers' `flex_attention` on a card: keys and values are repeated only where the number of heads is no power
    of two."""
    heads = query.shape[1]
    if heads & (heads - 1):
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    return Flex.apply(query, key, value).transpose(1, 2).contiguous(), None


def experts(module: Any, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """All chosen experts of all tokens at once, over one unpacked expert: what the loop over experts keeps in sum.

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
    """FlexAttention and the experts' loop replaced in transformers' tables of kernels, for the length of a step."""
    tables = ((ALL_ATTENTION_FUNCTIONS, "flex_attention", flex_attention), (ALL_EXPERTS_FUNCTIONS, "eager", experts))
    for table, name, stand_in in tables:
        table[name] = stand_in
    try:
        yield
    finally:
        for table, name, _ in tables:
            del table[name]
