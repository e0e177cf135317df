"""Merge weight by weight: read the base's files, quantize as training did, add the adapter, write new files."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from qlora_rm.artifacts.safetensors_writer import Shards
from qlora_rm.backbone.load import embedding_rows, read_model_config
from qlora_rm.backbone.rotary import pinned
from qlora_rm.backbone.safetensors_reader import Checkpoint
from qlora_rm.backbone.skeleton import Skeleton
from qlora_rm.config import Quantization
from qlora_rm.console import say
from qlora_rm.errors import UserError
from qlora_rm.merging.adapter import Adapter
from qlora_rm.merging.nf4 import Packed, Rounded, is_slow, pieces
from qlora_rm.merging.weight_plan import Group, NotStreamable, plan
from qlora_rm.merging.workers import Workers
from qlora_rm.progress import Phase


@dataclass(frozen=True)
class Source:
    """An adapter and the base it was trained on, as training loaded it.

    Attributes:
        dequantized: whether each weight goes through training's quantization, as the same scores require.
        dtype: the dtype in which training computed, and from which it quantized.
        pad, tokens: the tokenizer's pad id and number of tokens.
        trusted: whether the base's own code may run.
        rotary_length: the sequence length for which rotation is pinned; None leaves rotation as it is.
    """

    adapter: str
    base: str
    revision: str | None
    quantization: Quantization
    dtype: torch.dtype
    dequantized: bool
    pad: int
    tokens: int
    trusted: bool = False
    rotary_length: int | None = None


def require_room(folder: Path, nbytes: int) -> None:
    """Raise `UserError` if the disk of `folder` has no room for `nbytes`."""
    free = shutil.disk_usage(folder).free
    if nbytes * 1.02 > free:
        raise UserError(f"The merged model takes {nbytes / 1e9:.1f} GB, {folder.parent} has {free / 1e9:.1f} GB free.")


class Stream:
    """One merge: the skeleton, the base's and the adapter's files, and the plan."""

    def __init__(self, source: Source, dtype: torch.dtype):
        """Read headers and plan, for weights saved in `dtype`.

        Raises:
            NotStreamable: the base has no safetensors, or its architecture or quantization is not supported here.
            UserError: a file is broken, or the adapter belongs to another base.
        """
        try:
            config = pinned(read_model_config(source.base, source.revision, source.trusted), source.rotary_length)
        except UserError as error:
            raise UserError(
                f"The base of the adapter {source.adapter} is not there: {error} Pass --base_model FOLDER_OR_HUB_ID."
            ) from error
        if not type(config).__module__.startswith("transformers."):
            raise NotStreamable("its architecture is not one of transformers' own")
        stored = Checkpoint.of_model(source.base, source.revision)
        if stored is None:
            raise NotStreamable(f"{source.base} has no safetensors files")
        if source.quantization == "8bit":
            raise NotStreamable("its base was trained on in 8 bit")
        self.skeleton = Skeleton.of(config, source.quantization, source.dtype)
        if source.tokens > embedding_rows(self.skeleton.model):
            self.skeleton.model.resize_token_embeddings(source.tokens, mean_resizing=False)
        self.adapter = Adapter(source.adapter, self.skeleton)
        self.stored, self.dtype, self.pad = stored, dtype, source.pad
        self.shapes = {name: tensor.shape for name, tensor in self.skeleton.model.state_dict().items()}
        self.quantized = self.skeleton.quantized if source.dequantized else frozenset[str]()
        self.groups = plan(self.skeleton, stored, self.adapter.brought, dtype)

    def run(self, output: Path) -> dict[str, str]:
        """Write the merged model's weights and config into the folder `output`.

        Returns: file name -> sha256 of each weight file.

        Raises:
            UserError: the disk is too full.
        """
        wanted = [tensor for group in self.groups for tensor in group.saved]
        require_room(output, sum(tensor.nbytes for tensor in wanted))
        if self.quantized and is_slow():
            say(
                "nf4.c was not built when this package was installed: quantizing takes some fifty times as long. To build it, "
                "install qlora_rm again from its checkout or sdist with a C compiler on PATH."
            )
        merging = Phase("merging", sum(tensor.nbytes for tensor in wanted) / 1e6, "MB")
        with merging, Workers() as workers, Shards(output, wanted) as shards:
            for group in self.groups:
                self._write(group, shards, workers)
                merging.advance(sum(tensor.nbytes for tensor in group.saved) / 1e6)
        self._save_config(output)
        return shards.sha256

    def _write(self, group: Group, shards: Shards, workers: Workers) -> None:
        """Read, convert, merge and write one group, in pieces where nothing must be converted back."""
        values = {} if self.adapter.brought.issuperset(group.targets) else self._values(group)
        if group.straight:
            shards.write(group.saved[0].name, self._merged(group.targets[0], values, workers))
            return
        merged = {name: self._whole(name, values, workers) for name in group.targets}
        back = revert_weight_conversion(self.skeleton.model, merged)
        merged.clear()
        for tensor in group.saved:
            shards.write(tensor.name, [back.pop(tensor.name).contiguous()])

    def _values(self, group: Group) -> dict[str, Tensor]:
        return group.convert(lambda name: self.stored[name].read(), self.skeleton.model)

    def _whole(self, name: str, values: dict[str, Tensor], workers: Workers) -> Tensor:
        shape = self.shapes[name]
        whole, end = torch.empty(shape.numel(), dtype=self.dtype), 0
        for piece in self._merged(name, values, workers):
            start, end = end, end + piece.numel()
            whole[start:end] = piece.view(-1)
        return whole.view(shape)

    def _merged(self, name: str, values: dict[str, Tensor], workers: Workers) -> Iterator[Tensor]:
        """Yield the merged weight `name` in pieces, in the dtype in which it is saved. Removes its value from `values`."""
        shape = self.shapes[name]
        base: Rounded | Packed | _Plain
        if name in self.adapter.brought:
            base = _Plain(self.adapter.weight(name), torch.float32)
        else:
            base = _as_trained(name, values.pop(name), self.skeleton, self.quantized)
        adapter = self.adapter.on(name, shape)

        def merged(start: int, stop: int) -> Tensor:
            piece = adapter.add(base.values(start, stop), start)
            return piece.to(self.dtype) if piece.is_floating_point() else piece

        yield from workers.map(merged, adapter.spans(base.numel, base.block))
        if base.numel < shape.numel():  # a resized embedding's pad token, which no sequence contains
            yield torch.zeros(shape.numel() - base.numel, dtype=self.dtype)

    def _save_config(self, folder: Path) -> None:
        """Save the config of a stock classifier with one label, whose score pipelines and vLLM do not squash to (0, 1)."""
        model = self.skeleton.model
        model.config.architectures = [type(model).__name__]
        model.config.dtype = self.dtype
        as_scalar(model.config, self.pad)
        model.config.save_pretrained(folder)


def as_scalar(config: PretrainedConfig, pad: int) -> None:
    """Set up a config for a scalar model: one label named score, no activation on it, and the tokenizer's pad id."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        part.pad_token_id = pad
    config.problem_type = "regression"
    config.id2label, config.label2id = {0: "score"}, {"score": 0}


@dataclass(frozen=True)
class _Plain:
    """A weight that was not quantized, with the interface of `Rounded` and `Packed`, in its own dtype."""

    weight: Tensor
    dtype: torch.dtype
    block: int = 1

    @property
    def numel(self) -> int:
        return self.weight.numel()

    def values(self, start: int, stop: int) -> Tensor:
        return self.weight.view(-1)[start:stop].to(self.dtype)


def _as_trained(name: str, value: Tensor, skeleton: Skeleton, quantized: frozenset[str]) -> Rounded | Packed | _Plain:
    """Return a weight of the base with the values it had in training."""
    dtype = skeleton.dtypes[name] if value.is_floating_point() else value.dtype
    if isinstance(value, bnb.nn.Params4bit):
        return Packed.of(value, skeleton.dtypes[name])
    if name not in quantized:
        return _Plain(value, dtype)
    if isinstance(skeleton.model.get_submodule(name.rpartition(".")[0]), Conv1D):
        turned = Rounded.of(value.T, dtype)  # quantized in the layout of a linear layer, [out, in]
        values = torch.empty(turned.numel, dtype=dtype)
        for start, stop in pieces(turned.numel):
            values[start:stop] = turned.values(start, stop)
        return _Plain(values.view(value.T.shape).T.contiguous(), dtype)
    return Rounded.of(value, dtype)
