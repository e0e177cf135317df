"""The adapter's part in a merge: PEFT's own layers, without a base, applied to pieces of a weight."""

import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from threading import Lock
from typing import Any, Self

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Embedding, Linear, LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_rm.backbone.head import head_modules, is_in_head
from qlora_rm.backbone.safetensors_reader import Checkpoint
from qlora_rm.backbone.skeleton import Skeleton
from qlora_rm.errors import UserError
from qlora_rm.merging.nf4 import PIECE, pieces
from qlora_rm.merging.weight_plan import NotStreamable

PREFIX = "base_model.model."
ADAPTER = "default"


class Adapter:
    """An adapter's file and the layers that PEFT makes for it on a skeleton. Factors are read on demand.

    Attributes:
        brought: names of weights that its file holds in full: the head, and an embedding that was resized or has an adapter.
        is_plain: whether it is LoRA on linear layers and a head, and nothing else.
    """

    def __init__(self, folder: str, skeleton: Skeleton):
        """Raise `UserError` where the file does not fit the skeleton, so belongs to another base."""
        names = skeleton.model.state_dict()
        self._folder = folder
        self._stored = Checkpoint.of_files([Path(folder) / "adapter_model.safetensors"])
        config = LoraConfig.from_pretrained(folder)
        config.inference_mode = True
        try:
            peft = get_peft_model(deepcopy(skeleton.model), config, low_cpu_mem_usage=True)
        except ValueError as error:
            raise UserError(f"The adapter {folder} does not fit its base: {error}") from error
        wanted = get_peft_model_state_dict(peft, save_embedding_layers=False)
        self._require_fit({name: tuple(t.shape) for name, t in wanted.items()}, names)
        self._keys = {_name_in_base(key): key for key in self._stored}
        self.brought = self._keys.keys() & names.keys()
        self._layers = dict(_layers(peft))
        head = head_modules(skeleton.model)
        self.is_plain = all(is_in_head(name, head) for name in self.brought) and not any(
            isinstance(layer, (Embedding, ParamWrapper)) or layer.lora_variant for _, layer in self._layers.values()
        )

    def on(self, name: str, shape: torch.Size) -> "Nothing | LowRank | DoRA":
        """Return what the adapter adds to the weight `name`, with its factors read."""
        if name not in self._layers:
            return Nothing()
        path, layer = self._layers[name][0], deepcopy(self._layers[name][1])
        if isinstance(layer, Embedding):
            A, B = (self._read(f"{path}.lora_embedding_{factor}") for factor in "AB")
            return LowRank(A.T, B.T, layer.scaling[ADAPTER], shape)
        layer.lora_A[ADAPTER].weight = nn.Parameter(self._read(f"{path}.lora_A.weight"), requires_grad=False)
        layer.lora_B[ADAPTER].weight = nn.Parameter(self._read(f"{path}.lora_B.weight"), requires_grad=False)
        if f"{path}.lora_magnitude_vector" not in self._stored:
            return LowRank.of(layer, shape)
        magnitude = self._read(f"{path}.lora_magnitude_vector")
        layer.lora_magnitude_vector[ADAPTER].weight = nn.Parameter(magnitude, requires_grad=False)
        assert isinstance(layer, Linear), "PEFT has no DoRA on parameters"
        return DoRA.of(layer, shape)

    def weight(self, name: str) -> Tensor:
        """Return a weight that the adapter replaces."""
        return self._read(self._keys[name])

    def _read(self, key: str) -> Tensor:
        tensor = self._stored[key].read().float()
        if not tensor.isfinite().all():
            raise UserError(f"The adapter {self._folder} holds values that are no numbers, in {key}.")
        return tensor

    def _require_fit(self, wanted: dict[str, tuple[int, ...]], names: dict[str, Tensor]) -> None:
        stored = {name: place.shape for name, place in self._stored.items()}
        lost = sorted(wanted.keys() - stored.keys())
        foreign = sorted(k for k in stored.keys() - wanted.keys() if _name_in_base(k) not in names)
        other = sorted(k for k in wanted.keys() & stored.keys() if wanted[k] != stored[k])
        headless = [key for key in lost if "lora_" not in key]
        if headless:
            raise UserError(
                f"The adapter {self._folder} was saved without its head ({headless[0]}): its scores would be random."
            )
        for found, what in (
            (lost, "lacks"),
            (foreign, "holds what the base has no place for:"),
            (other, "is of another shape in"),
        ):
            if found:
                raise UserError(f"The adapter {self._folder} does not fit its base: it {what} {found[0]}.")


def _name_in_base(key: str) -> str:
    """Return the base's name of a key in the adapter's file. PEFT saves an adapted embedding's base weight in that file."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def _layers(peft: PeftModel) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Yield (weight's name in the base, (name in the adapter's file, layer)) of every adapted weight."""
    for path, layer in peft.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        is_other = ADAPTER in layer.lora_variant and ADAPTER not in layer.lora_magnitude_vector
        if is_other or not isinstance(layer, (Embedding, Linear, ParamWrapper)) or layer.lora_bias[ADAPTER]:
            raise NotStreamable(f"the adapter on {path} is a {type(layer).__name__} of another kind")
        module = path.removeprefix(PREFIX).replace(".base_layer", "")
        name = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        yield f"{module}.{name}", (path, layer)


def _is_conv(layer: LoraLayer) -> bool:
    """Return whether its weight is stored as [in, out], as in GPT-2."""
    return isinstance(layer.get_base_layer(), Conv1D)


class Nothing:
    """No adapter: the weight stays as it is."""

    def spans(self, numel: int, block: int) -> Iterator[tuple[int, int]]:
        return pieces(numel)

    def add(self, values: Tensor, start: int) -> Tensor:
        return values


class LowRank:
    """s L R: PEFT's LoRA on a linear layer, an embedding or each expert.

    A weight is [E, rows, columns], flattened. A linear layer counts as one expert.
    """

    def __init__(self, left: Tensor, right: Tensor, scale: float, shape: torch.Size):
        """`left` [rows, r] or [E, rows, r], `right` [r, columns] or [E, r, columns]."""
        *_, self._rows, self._columns = shape
        self._left, self._right = (factor if factor.dim() == 3 else factor[None] for factor in (left, right))
        self._scale = scale

    @classmethod
    def of(cls, layer: Linear | ParamWrapper, shape: torch.Size) -> Self:
        if isinstance(layer, ParamWrapper):
            left, right, scale = layer.get_delta_factors(ADAPTER)
            return cls(left, right, scale, shape)
        A: Any = layer.lora_A[ADAPTER].weight
        B: Any = layer.lora_B[ADAPTER].weight
        left, right = (A.T, B.T) if _is_conv(layer) else (B, A)
        return cls(left, right, layer.scaling[ADAPTER], shape)

    def spans(self, numel: int, block: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of pieces of such a weight, each of complete rows of one expert and complete blocks."""
        least = block // math.gcd(self._columns, block)
        step = max(PIECE // self._columns // least, 1) * least
        rows = numel // self._columns  # fewer than the weight's where an embedding was resized
        for first in range(0, rows, self._rows):
            last = min(first + self._rows, rows)
            for start in range(first, last, step):
                yield start * self._columns, min(start + step, last) * self._columns

    def add(self, values: Tensor, start: int) -> Tensor:
        """Return the merged weight's values from `start` on. Overwrites the base's values where they are fp32."""
        rows = values.float().view(-1, self._columns)
        expert, first = divmod(start // self._columns, self._rows)
        left = self._left[expert, first : first + len(rows)]
        return rows.addmm_(left, self._right[expert], alpha=self._scale)


class DoRA(LowRank):
    """PEFT's own DoRA layer, merged into some output rows of its weight at a time.

    The norm of an output row of W + s B A (Liu et al. 2024, equation 5) needs no other row. Output rows of a Conv1D are its
    columns.
    """

    @classmethod
    def of(cls, layer: Linear | ParamWrapper, shape: torch.Size) -> Self:
        made = super().of(layer, shape)
        made._keep(layer)
        return made

    def _keep(self, layer: Any) -> None:
        self._layer = layer
        self._B: Any = layer.lora_B[ADAPTER].weight
        self._magnitude: Any = layer.lora_magnitude_vector[ADAPTER].weight
        self._one_at_a_time = Lock()

    def spans(self, numel: int, block: int) -> Iterator[tuple[int, int]]:
        return iter([(0, numel)]) if _is_conv(self._layer) else super().spans(numel, block)

    def add(self, values: Tensor, start: int) -> Tensor:
        rows, layer, base = values.float().view(-1, self._columns), self._layer, self._layer.get_base_layer()
        with self._one_at_a_time:
            if not _is_conv(layer):
                here = slice(start // self._columns, start // self._columns + len(rows))
                layer.lora_B[ADAPTER].weight = nn.Parameter(self._B[here], requires_grad=False)
                magnitude = nn.Parameter(self._magnitude[here], requires_grad=False)
                layer.lora_magnitude_vector[ADAPTER].weight = magnitude
            base.weight = nn.Parameter(rows, requires_grad=False)
            layer.merge()
            layer.merged_adapters.clear()
            return base.weight.data
