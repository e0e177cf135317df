"""Layers an adapter may be put on: those that every later command can merge, verify and serve."""

from collections import defaultdict
from copy import copy

import bitsandbytes as bnb
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from qlora_rm.backbone.head import is_in_head
from qlora_rm.backbone.reach import is_below, pattern_of, unreached
from qlora_rm.console import say
from qlora_rm.errors import UserError

LINEAR = (nn.Linear, Conv1D, bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)


def narrow_to_text(model: PreTrainedModel, head: list[str], lora: LoraConfig, expression: str | None = None) -> None:
    """Exclude the targets that text never passes through from `lora`, and check the others.

    Arguments:
        expression: the regular expression, if any, whose matches the targets are.

    Raises:
        UserError: a target's kind has no adapter here, or text never passes through the target.
    """
    asked = copy(lora)
    asked.modules_to_save = None  # otherwise PEFT excludes these from the targets
    matched = {name: module for name, module in model.named_modules() if name and _is_target(asked, name)}
    towers = unreached(model)
    heads = {name for name in matched if is_in_head(name, head)}
    far = [name for name in matched if is_below(name, towers)]
    for target in _each(asked) if expression is None else [expression]:
        of_target = [name for name in matched if expression is not None or _is_target(asked, name, target)]
        if of_target and {*heads, *far}.issuperset(of_target):
            tower = next(tower for tower in towers if is_below(of_target[0], [tower]))
            raise UserError(
                f"--lora_target_modules {target}: {of_target[0]} is part of {tower}, which text never passes through; an "
                "adapter there would never be trained. Name layers of the language model."
            )
    for name in matched.keys() - heads - set(far):
        _require_adaptable(model, name, lora.use_dora)
    if not far:
        return
    around = [tower for tower in towers if any(is_below(name, [tower]) for name in far)]
    lora.exclude_modules = pattern_of(around)
    say(f"adapter: {len(far)} layers of {', '.join(around)} get none, since text never passes through them")


def linear_names(model: PreTrainedModel, without: list[str]) -> list[str]:
    """Last name parts (q_proj, ...) of all linear layers that text passes through, except the modules `without`."""
    apart = [*without, *unreached(model)]
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, LINEAR) and not is_below(name, apart) and not _is_of_multihead(model, name)
        }
    )


def _is_target(lora: LoraConfig, name: str, target: str | None = None) -> bool:
    """Apply PEFT's own rule, for all targets or for one of a list."""
    if target is None or isinstance(lora.target_modules, str):
        return bool(check_target_module_exists(lora, name))
    return (name == target or name.endswith(f".{target}")) and bool(check_target_module_exists(lora, name))


def _each(lora: LoraConfig) -> list[str]:
    targets = lora.target_modules or []
    return [targets] if isinstance(targets, str) else sorted(targets)


def _require_adaptable(model: PreTrainedModel, name: str, dora: bool | None) -> None:
    module, option = model.get_submodule(name), "--lora_target_modules"
    if _is_of_multihead(model, name):
        raise UserError(f"{option}: {name} is used by an nn.MultiheadAttention without being called. Leave it out.")
    if isinstance(module, nn.Embedding):
        if dora:
            raise UserError(f"--use_dora: no DoRA on the embedding {name}. Leave out --use_dora, or {name}.")
        if twins := _sharing_weight(model, name):
            raise UserError(
                f"{option}: {name} shares its weight with {', '.join(twins)}, so that an adapter could not be merged. Leave "
                "it out."
            )
    elif not isinstance(module, LINEAR):
        raise UserError(
            f"{option}: {name} is a {type(module).__name__}; adapters go on linear layers and embeddings. Leave it out, or "
            "name layers inside it."
        )


def _is_of_multihead(model: PreTrainedModel, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)


def _sharing_weight(model: PreTrainedModel, name: str) -> list[str]:
    holders: dict[int, list[str]] = defaultdict(list)
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)].append(parameter_name.rpartition(".")[0])
    weight = model.get_submodule(name).get_parameter("weight")
    return [holder for holder in holders[id(weight)] if holder != name]
