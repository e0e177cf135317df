"""The adapter's part in a merge: PEFT's own layers, without a base, given the rows of a weight they are to change."""

from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import Linear, LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qlora_rm.artifacts.merging.checkpoint import Checkpoint
from qlora_rm.artifacts.merging.plan import NotStreamable
from qlora_rm.backbone.skeleton import Skeleton
from qlora_rm.errors import UserError

PREFIX = "base_model.model."
ADAPTER = "default"


class Adapter:
    """An adapter's file beside the layers that PEFT makes for it on a skeleton; factors are read as they are needed.

    Attributes:
        brought: names of weights that it replaces whole: the head, and an embedding that was grown.
    """

    def __init__(self, folder: str, skeleton: Skeleton):
        """Raises `UserError` where the file does not fit the skeleton: it belongs to another base."""
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
        self.brought = {key.removeprefix(PREFIX) for key in self._stored} & names.keys()
        self._layers = dict(_layers(peft))

    def layer_of(self, name: str) -> LoraLayer | None:
        """A copy of the LoRA layer on the weight `name`, its factors read; None where it has none."""
        if name not in self._layers:
            return None
        path, layer = self._layers[name][0], deepcopy(self._layers[name][1])
        layer.lora_A[ADAPTER].weight = nn.Parameter(self._read(f"{path}.lora_A.weight"), requires_grad=False)
        layer.lora_B[ADAPTER].weight = nn.Parameter(self._read(f"{path}.lora_B.weight"), requires_grad=False)
        if f"{path}.lora_magnitude_vector" in self._stored:
            magnitude = self._read(f"{path}.lora_magnitude_vector")
            layer.lora_magnitude_vector[ADAPTER].weight = nn.Parameter(magnitude, requires_grad=False)
        return layer

    def weight(self, name: str) -> Tensor:
        """A weight the adapter replaces."""
        return self._read(PREFIX + name)

    def _read(self, key: str) -> Tensor:
        tensor = self._stored[key].read().float()
        if not tensor.isfinite().all():
            raise UserError(f"The adapter {self._folder} holds values that are no numbers, in {key}.")
        return tensor

    def _require_fit(self, wanted: dict[str, tuple[int, ...]], names: dict[str, Tensor]) -> None:
        stored = {name: place.shape for name, place in self._stored.items()}
        lost = sorted(wanted.keys() - stored.keys())
        foreign = sorted(k for k in stored.keys() - wanted.keys() if k.removeprefix(PREFIX) not in names)
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


def _layers(peft: PeftModel) -> Iterator[tuple[str, tuple[str, LoraLayer]]]:
    """(weight's name in the base, (name in the adapter's file, layer)) of every adapted weight."""
    for path, layer in peft.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if not isinstance(layer, (Linear, ParamWrapper)) or layer.lora_bias[ADAPTER]:
            raise NotStreamable(f"the adapter on {path} is a {type(layer).__name__} of another kind")
        module = path.removeprefix(PREFIX).replace(".base_layer", "")
        name = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
        yield f"{module}.{name}", (path, layer)


def is_conv(layer: LoraLayer) -> bool:
    """Whether its weight is stored [in, out], GPT-2's way."""
    return isinstance(layer.get_base_layer(), Conv1D)


class LinearRows:
    """PEFT's LoRA or DoRA layer merged into some output rows of its weight at a time.

    An output row of W + s B A, and its DoRA norm (Liu et al. 2024, equation 5), need no other row.
    """

    def __init__(self, layer: Linear):
        self._layer = layer
        self._B: Any = layer.lora_B[ADAPTER].weight
        has_magnitude = ADAPTER in layer.lora_magnitude_vector
        self._magnitude: Any = layer.lora_magnitude_vector[ADAPTER].weight if has_magnitude else None

    def add(self, rows: Tensor, start: int) -> Tensor:
        """Rows `start` and on of the merged weight, from the base's; both fp32 [rows, in]. All of a Conv1D's [in, out]."""
        layer, base = self._layer, self._layer.get_base_layer()
        if not is_conv(layer):
            span = slice(start, start + len(rows))
            layer.lora_B[ADAPTER].weight = nn.Parameter(self._B[span], requires_grad=False)
            if self._magnitude is not None:
                layer.lora_magnitude_vector[ADAPTER].weight = nn.Parameter(self._magnitude[span], requires_grad=False)
        base.weight = nn.Parameter(rows, requires_grad=False)
        layer.merge()
        layer.merged_adapters.clear()
        return base.weight.data


class ExpertRows:
    """PEFT's LoRA of a fused expert weight [E, rows, columns], merged into rows of one expert at a time."""

    def __init__(self, layer: ParamWrapper):
        self._left, self._right, self._scale = layer.get_delta_factors(ADAPTER)
        self._rows = self._left.shape[1]

    def add(self, rows: Tensor, start: int) -> Tensor:
        """Rows `start` and on of all experts' rows one after the other, within one expert."""
        expert, first = divmod(start, self._rows)
        left = self._left[expert, first : first + len(rows)]
        return torch.addmm(rows, left, self._right[expert], alpha=self._scale)
