"""A training step without numbers: the model's own code over tensors that have shapes but no storage.

Forward and backward pass run for real (attention, adapters, checkpointing, autocast, whatever the architecture does) on
torch's fake tensors. A meter counts the storages alive after every operation. A formula would need facts about each
architecture; here they come from the architecture's code. Three kernels have stand-ins (`stand_ins.py`), since they do
not run on fake tensors or differ by device: the quantized product, FlexAttention, and fused experts.

Layers of one kind cost the same. The step is rehearsed on two layers of each kind and on three, and the difference is
multiplied for the rest.
"""

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from qlora_rm.planning.skeleton import backbone_of
from qlora_rm.planning.stand_ins import kernels_stood_in, materialize


@dataclass(frozen=True)
class Batch:
    """Shape of a micro-batch: R rows of L tokens that S scores are read from; packed as a forest, or padded."""

    rows: int
    length: int
    sequences: int
    packed: bool = True


@dataclass(frozen=True)
class Step:
    """Bytes that a step takes in addition to the weights.

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
        """The point at fraction `part` of the straight line to `other`."""
        return Step(*(math.ceil(a + (b - a) * part) for a, b in zip(astuple(self), astuple(other), strict=True)))

    def minus(self, other: "Step") -> "Step":
        return self + other.times(-1)


class Meter(TorchDispatchMode):
    """Counts the bytes of live storages made since it was entered; `peak` is their maximum."""

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
    """Runs steps of a model skeleton, which it modifies.

    Arguments:
        model: from `skeleton.build`.
        dtype: compute dtype; 16-bit ones run under autocast, as in the trainer.
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
            accumulates: gradients of earlier micro-batches exist, and are not counted again.
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
        """Run the step on the given number of layers of each kind."""
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
        """Reduce the model to the first `counts[kind]` layers of each kind."""
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
    """The forward pass's inputs in the shapes of `batch`: a forest's, or a padded batch's with its full 4-D mask."""
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
    """The list of transformer layers, with its owner and its name there; None if there is none."""
    found = [
        (sum(p.numel() for p in child.parameters()), owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == model.config.get_text_config().num_hidden_layers
    ]
    return max(found, key=lambda entry: entry[0])[1:] if found else None


def kinds_of_layers(model: PreTrainedModel, layers: Any) -> list[Any]:
    """What distinguishes layers, for each layer: the kind of attention, the class and the shapes."""
    if layers is None:
        return []
    types = getattr(model.config.get_text_config(), "layer_types", None) or [""] * len(layers[2])
    return [
        (kind, type(layer), tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()))
        for kind, layer in zip(types, layers[2], strict=True)
    ]
