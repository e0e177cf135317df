"""4-bit weights under ZeRO-3: sharded while they load, and freed after use.

DeepSpeed's own way, a model built inside `zero.Init`, does not work for quantized models. transformers skips it for
them, since a weight is quantized only after it is read, and every process would load the full model. Here each weight
is sharded as soon as it is read and quantized. The engine shards what is made later (adapter, new head) when it starts.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import bitsandbytes as bnb
from deepspeed import zero
from torch import Tensor, nn
from transformers import PreTrainedModel, core_model_loading, modeling_utils
from transformers.integrations import deepspeed_config

from qlora_rm.backbone.head import is_in_head
from qlora_rm.backbone.zero3_gather import is_sharded
from qlora_rm.errors import UserError

KNOWN = {"bitsandbytes": "0.50", "deepspeed": "0.19", "transformers": "5.23"}
"""Versions whose internals this module relies on; with others it would shard wrongly, or silently not at all."""


@contextmanager
def sharded_loading(whole: list[str]) -> Iterator[None]:
    """Let each process keep only its shard of every weight that `from_pretrained` sets inside the block.

    transformers sets all loaded parameters through one function. The wrapper shards all parameters that the module then
    holds, quantized or not, including experts that an inner wrapper has quantized there. Every process reads and
    quantizes every weight, one at a time and in step with the others (a broadcast each). A host thus reads its file
    once and keeps no copy. Threaded loading is off, because it would read full weights ahead; so is the memory
    reservation for the full model.

    Remove once transformers shards quantized models under ZeRO-3 itself.

    Arguments:
        whole: names of modules left unsharded: the score head.

    Raises:
        UserError: a library has another version than those in `KNOWN`.
    """
    _require_known_libraries()
    free_weights_after_forward()
    # an empty module: partitioning and DeepSpeed's memory-saving linear function work, and no context is entered
    init = zero.Init(module=nn.Module(), config_dict_or_path=deepspeed_config())
    set_parameter = core_model_loading.set_param_for_module

    def set_and_shard(model: PreTrainedModel, target_name: str, *rest: Any, **more: Any) -> None:
        set_parameter(model, target_name, *rest, **more)
        path = target_name.rpartition(".")[0]
        for name, parameter in model.get_submodule(path).named_parameters(prefix=path):
            if not is_in_head(name, whole):
                _shard(parameter, init)

    with (
        _replaced(core_model_loading, "set_param_for_module", set_and_shard),
        _replaced(modeling_utils, "caching_allocator_warmup", lambda *_: None),
        _in_environment("HF_DEACTIVATE_ASYNC_LOAD", "1"),
    ):
        yield


def _shard(parameter: nn.Parameter, init: zero.Init) -> None:
    """Shard a parameter that is loaded and not yet sharded."""
    if is_sharded(parameter) or parameter.device.type == "meta":
        return
    if parameter.device.type == "cpu":
        # it may be a view of the mapped file; the broadcast would turn its pages into memory held until the end
        parameter.data = parameter.data.clone()
    init._convert_to_zero_parameters([parameter])


def free_weights_after_forward() -> None:
    """Let ZeRO-3 free a gathered 4-bit weight once its layer has run.

    bitsandbytes keeps `weight.view(-1, 1)` for backward: a second tensor over the gathered bytes, which outlives
    DeepSpeed's release. After a forward pass every process would then hold the full model. A packed weight is already
    such a column; if the weight itself is kept, it is empty after the release and gathered again for backward.

    Remove once bitsandbytes keeps the parameter, or saves it through autograd's `save_for_backward`.
    """
    bnb.nn.Params4bit.view = _view_or_itself  # type: ignore[method-assign, assignment]


def _view_or_itself(self: Tensor, *shape: Any) -> Tensor:
    if shape == (-1, 1) and self.dim() == 2 and self.shape[1] == 1:
        return self
    return Tensor.view(self, *shape)


def _require_known_libraries() -> None:
    other = {name: version(name) for name, known in KNOWN.items() if not version(name).startswith(f"{known}.")}
    if other:
        found = ", ".join(f"{name} {number}" for name, number in other.items())
        known = ", ".join(f"{name} {KNOWN[name]}" for name in other)
        raise UserError(
            f"Sharding 4-bit weights under ZeRO-3 reaches into libraries, and knows {known}, not {found}. Install the "
            "versions of constraints.txt, or train under ZeRO-2, where each process holds the whole 4-bit model."
        )


@contextmanager
def _replaced(holder: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(holder, name)
    setattr(holder, name, value)
    try:
        yield
    finally:
        setattr(holder, name, before)


@contextmanager
def _in_environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
