"""Contents of memory: parameters and bytes by dtype, which are quantized, which are trained."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_rm.backbone.head import head_modules
from qlora_rm.backbone.in_force import settings_in_force
from qlora_rm.backbone.reach import is_below, unreached
from qlora_rm.backbone.zero3_gather import any_sharded
from qlora_rm.console import table


def inventory(model: nn.Module) -> list[str]:
    """Lines of a table: part x dtype, with parameters, bytes and whether it is trained, as if unsharded.

    Lines above the table report what the layers compute with (`settings_in_force`).

    Sharded models get an extra line: the bytes this process holds. The engine shards the rest when it starts.
    """
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    towers = [] if inner is None else unreached(inner)
    count: dict[tuple[str, str, bool], list[int]] = defaultdict(lambda: [0, 0])
    for name, parameter in model.named_parameters():
        entry = count[_part(name, parameter, towers), dtype_name(parameter), parameter.requires_grad]
        entry[0] += logical_size(parameter)
        entry[1] += stored_bytes(parameter)
    rows = [
        (part, dtype, f"{n:,}", human_bytes(size), "yes" if trained else "no")
        for (part, dtype, trained), (n, size) in sorted(count.items())
    ]
    total, trained = (sum(v[0] for k, v in count.items() if k[2] or not only) for only in (False, True))
    rows.append(("total", "", f"{total:,}", human_bytes(sum(v[1] for v in count.values())), f"{trained:,}"))
    lines = table(("part", "dtype", "parameters", "bytes", "trained"), rows)
    if any_sharded(model):
        lines.append(f"sharded: {human_bytes(sum(map(held_bytes, model.parameters())))} of it on this process")
    return [*settings_in_force(model), *lines]


def unquantized_share(model: PreTrainedModel) -> tuple[float, str]:
    """Share of the backbone's matrix weights outside 4 or 8 bit, and the name of the largest such weight.

    Embeddings and vectors (norms, biases) are never quantized and do not count; neither do parts that text never passes
    through. Expert weights fused into 3-D parameters count: transformers 5 leaves them in 16 bit without a warning.
    """
    quantized = 0
    plain: dict[str, int] = {}
    for name, parameter in _matrices(model):
        if isinstance(parameter, (bnb.nn.Params4bit, bnb.nn.Int8Params)):
            quantized += logical_size(parameter)
        else:
            plain[name] = logical_size(parameter)
    if not plain:
        return 0.0, ""
    return sum(plain.values()) / (quantized + sum(plain.values())), max(plain, key=plain.__getitem__)


def _matrices(model: PreTrainedModel) -> Iterator[tuple[str, nn.Parameter]]:
    apart = [*head_modules(model), *unreached(model)]
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or is_below(module_name, apart):
            continue
        for name, parameter in module.named_parameters(module_name, recurse=False):
            if isinstance(parameter, bnb.nn.Params4bit) or logical_dim(parameter) >= 2:
                yield name, parameter


def logical_dim(parameter: nn.Parameter) -> int:
    """Dimensions of the weight, even where DeepSpeed's zero.Init has left an empty placeholder."""
    return len(getattr(parameter, "ds_shape", parameter.shape))


def logical_size(parameter: nn.Parameter) -> int:
    """Number of weights a parameter represents, however they are packed."""
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(torch.Size(state.shape).numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def stored_bytes(parameter: nn.Parameter) -> int:
    """Bytes of the unsharded parameter, including its quantization constants."""
    return int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size() + _constants(parameter)


def held_bytes(parameter: nn.Parameter) -> int:
    """Bytes on this process: its shard where DeepSpeed has sharded the parameter, and all its constants."""
    here: torch.Tensor = getattr(parameter, "ds_tensor", parameter)
    return here.nbytes + _constants(parameter)


def _constants(parameter: nn.Parameter) -> int:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return 0
    size = state.absmax.nbytes + state.code.nbytes
    return size + (state.state2.absmax.nbytes + state.state2.code.nbytes if state.nested else 0)


def dtype_name(parameter: nn.Parameter) -> str:
    if isinstance(parameter, bnb.nn.Params4bit):
        return parameter.quant_type
    return str(parameter.dtype).removeprefix("torch.")


def _part(name: str, parameter: nn.Parameter, towers: Sequence[str]) -> str:
    if is_below(name.removeprefix("base_model.model."), towers):
        return "not reached by text"
    if "lora_" in name:
        return "adapter"
    if parameter.requires_grad:
        return "head" if "modules_to_save" in name or "score" in name or "classifier" in name else "backbone"
    return "backbone"


def human_bytes(size: float) -> str:
    """Format a size for people, in powers of ten: 35.3 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
