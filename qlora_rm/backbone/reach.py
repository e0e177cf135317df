"""Parts of a backbone that text passes through: towers for images or sound take no part in a reward model of text."""

import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from qlora_rm.backbone.head import head_modules, is_in_head
from qlora_rm.backbone.zero3_gather import gathered_at_work
from qlora_rm.console import say
from qlora_rm.errors import first_line

PROBE = 4
"""Token ids in the forward pass that shows what text passes through."""


def unreached(model: PreTrainedModel) -> list[str]:
    """Names of the largest modules with weights that a forward pass of text alone never enters, in the model's order.

    Only backbones of several parts (a text configuration inside the outer one) are tried; the model caches the answer.
    A module in a list counts as entered where a similar one is entered, such as an expert that these few tokens did not
    reach.
    """
    known: list[str] | None = getattr(model, "_unreached_by_text", None)
    if known is None:
        several_parts = model.config.get_text_config() is not model.config
        known = _followed(model) if several_parts else []
        model._unreached_by_text = known  # type: ignore[assignment]
    return known


def freeze_unreached(model: PreTrainedModel) -> None:
    """Freeze what text never passes through: it would get no gradient, and DDP waits for one."""
    for tower in unreached(model):
        model.get_submodule(tower).requires_grad_(False)


def is_below(name: str, modules: Sequence[str]) -> bool:
    """Whether a module or parameter is one of `modules` or inside one."""
    return is_in_head(name, list(modules))


def pattern_of(modules: Sequence[str]) -> str:
    """A regular expression that matches the full names of `modules` and of everything inside them."""
    return rf"({'|'.join(map(re.escape, modules))})(\..*)?"


def _followed(model: PreTrainedModel) -> list[str]:
    try:
        return _roots(model, _entered(model))
    except Exception as error:  # the architecture's code needs more than text, or numbers on the meta device
        reason = f"{type(error).__name__}: {first_line(error)[:100]}"
        say(f"backbone: which parts text passes through was not found ({reason}); all count as reached")
        return []


def _entered(model: PreTrainedModel) -> set[str]:
    """Modules that ran in a forward pass of a few tokens, without gradients; on the meta device for a skeleton."""
    names = {module: name for name, module in model.named_modules()}
    entered: set[str] = set()

    def note(module: nn.Module, *_: object) -> None:
        entered.add(names[module])
        if isinstance(module, nn.MultiheadAttention):  # it computes with its layers' weights without calling them
            entered.update(f"{names[module]}.{name}" for name, _ in module.named_modules() if name)

    hooks = [module.register_forward_pre_hook(note) for module in names]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), gathered_at_work(model):
            model.base_model(input_ids=torch.ones((1, PROBE), dtype=torch.long, device=model.device))
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return entered


def _roots(model: PreTrainedModel, entered: set[str]) -> list[str]:
    head = head_modules(model)
    roots: list[str] = []
    for name, module in model.named_modules():
        if name in entered or not name or is_below(name, [*head, *roots]):
            continue
        inside = any(other.startswith(f"{name}.") for other in entered)
        if inside or next(module.parameters(), None) is None or _like_another(model, name, entered):
            continue
        roots.append(name)
    return roots


def _like_another(model: nn.Module, name: str, entered: set[str]) -> bool:
    """Whether the module, or one that contains it, is in a list with an entered module of the same class."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        place, holder = ".".join(parts[:end]), ".".join(parts[: end - 1])
        siblings, kind = model.get_submodule(holder), type(model.get_submodule(place))
        if (
            place not in entered
            and isinstance(siblings, nn.ModuleList)
            and any(type(other) is kind and f"{holder}.{key}" in entered for key, other in siblings.named_children())
        ):
            return True
    return False
