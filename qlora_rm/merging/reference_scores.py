"""Compute golden scores of models that may not fit into memory: loaded in full, or layer by layer from disk."""

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from qlora_rm.artifacts.arithmetic import lacks_16_bit_units
from qlora_rm.artifacts.golden import GoldenItem, scores_of
from qlora_rm.artifacts.stock import load_stock
from qlora_rm.backbone.adapter import load_adapter
from qlora_rm.backbone.head import compute_in_own_precision, head_modules
from qlora_rm.backbone.host import free_memory
from qlora_rm.backbone.load import Backbone, read_model_config, skeleton
from qlora_rm.backbone.precision import NAMES, DtypeName
from qlora_rm.backbone.rotary import pinned
from qlora_rm.backbone.safetensors_reader import Checkpoint
from qlora_rm.backbone.scoring import score_sequences
from qlora_rm.console import say

SHARE = 0.8
"""The share of free memory that a model may take while it is verified."""


@dataclass(frozen=True)
class ReadBack:
    """Scores of the golden items' token ids, and the name of the dtype in which they were computed."""

    scores: list[list[float]]
    computed_in: DtypeName


def read_back(folder: str, items: Sequence[GoldenItem], pad: int, trust_remote_code: bool = False) -> ReadBack:
    """Load the written model in `folder` with transformers' Auto class alone, and score `items` with it.

    Layers that do not fit into memory are read from disk for each batch, one at a time (accelerate's offloading).
    """
    if fits(folder):
        return _scored(load_stock(folder, trust_remote_code)[0], items, pad)
    with _offloaded(folder, Path(folder).parent, trust_remote_code) as model:
        return _scored(model.eval(), items, pad)


def read_adapter(
    folder: str,
    base: str,
    revision: str | None,
    beside: Path,
    items: Sequence[GoldenItem],
    pad: int,
    trust_remote_code: bool = False,
    rotary_length: int | None = None,
) -> ReadBack:
    """Score `items` by the adapter in `folder` on its unquantized `base`, offloaded to the folder `beside` layer by layer.

    The adapter must be LoRA on linear layers and a head. DoRA and adapters on experts read weights that are offloaded.
    On offloaded layers PEFT 0.21 creates factors on the meta device, and it fails on an offloaded head. So the head is created
    again, and the factors are allocated before they are read. Remove once PEFT loads an adapter on offloaded layers.
    """
    config = pinned(read_model_config(base, revision, trust_remote_code), rotary_length)
    config.num_labels = 1
    with _offloaded(base, beside, trust_remote_code, revision=revision, config=config) as model:
        head = head_modules(model)
        del model.hf_device_map  # PEFT would place all layers again
        bones = skeleton(model.config, trust_remote_code)
        for name in head:
            model.set_submodule(name, bones.get_submodule(name).to_empty(device="cpu"))
            compute_in_own_precision(model.get_submodule(name))
        model.config.pad_token_id = pad
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # it could not fill the factors
            peft = load_adapter(Backbone(model, head, has_new_head=True), folder, trainable=False)
        for layer in peft.modules():
            if isinstance(layer, LoraLayer):
                for factors in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
                    factors.to_empty(device="cpu")
        set_peft_model_state_dict(peft, load_peft_weights(folder, device="cpu"))
        return _scored(peft.eval(), items, pad)


def fits(name_or_path: str, revision: str | None = None) -> bool:
    """Return whether a model takes no more than its share of free memory, or its size is unknown."""
    stored = Checkpoint.of_model(name_or_path, revision)
    return stored is None or loaded_bytes(stored) <= _room()


def _room() -> int:
    return int(SHARE * free_memory())


@contextmanager
def _offloaded(name: str, beside: Path, trust_remote_code: bool, **how: Any) -> Iterator[PreTrainedModel]:
    say(f"the model does not fit into memory: its golden scores are computed layer by layer from {beside}")
    with tempfile.TemporaryDirectory(dir=beside, prefix=".offload.") as offload:
        yield AutoModelForSequenceClassification.from_pretrained(
            name,
            dtype=torch.float32 if lacks_16_bit_units() else "auto",
            device_map="auto",
            max_memory={"cpu": _room()},
            offload_folder=offload,
            trust_remote_code=trust_remote_code,
            **how,
        )


def loaded_bytes(stored: Checkpoint) -> int:
    """Return the bytes that the tensors take once loaded on this machine."""
    width = 4 if lacks_16_bit_units() else 0
    return sum(
        torch.Size(place.shape).numel() * max(width, place.dtype.itemsize)
        if place.dtype.is_floating_point
        else place.nbytes
        for place in stored.values()
    )


def _scored(model: nn.Module, items: Sequence[GoldenItem], pad: int) -> ReadBack:
    scores = scores_of(items, lambda ids: score_sequences(model, ids, pad_token_id=pad))
    return ReadBack(scores, NAMES[model.dtype])  # type: ignore[index]
