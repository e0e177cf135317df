"""Resolve `--lora_target_modules` and `--lora_layers` to layers: each word and each index must match a layer."""

import difflib
import re
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from qlora_rm.backbone.experts import PROJECTIONS, expert_weights, fused_experts
from qlora_rm.backbone.head import is_in_head
from qlora_rm.backbone.targets import LINEAR
from qlora_rm.config import AdapterConfig, require
from qlora_rm.errors import UserError

ADAPTABLE = (*LINEAR, nn.Embedding)
"""Modules whose LoRA layers every later command can merge."""
PLAIN_NAME = re.compile(r"[\w\-]+(\.[\w\-]+)*")
"""A module's name, or the last parts of one; anything else is a regular expression."""
LAYER_INDEX = re.compile(r".*?\.[^.]*\.(?P<index>\d+)\.")
"""PEFT's rule for the layer that a module belongs to: the first number in its name (`layers_to_transform`)."""


def named_modules(model: PreTrainedModel, head: list[str], config: AdapterConfig) -> list[str] | None:
    """The modules that `--lora_target_modules` names, in PEFT's form; None where the option is not given.

    A plain name selects all modules whose name ends with it. A regular expression cannot be combined with other words.
    It selects the modules whose full names match it (`re.fullmatch`, as in PEFT), in the layers that `--lora_layers`
    chooses; their full names are returned.

    Raises:
        UserError: a word or a layer index matches nothing that can be adapted.
    """
    words = config.lora_target_modules
    adaptable = [n for n, m in model.named_modules() if isinstance(m, ADAPTABLE) and not is_in_head(n, head)]
    layers = config.lora_layers
    _require_layers(adaptable, layers)
    if words is None:
        return None
    if is_expression(words):
        return _matching(words, adaptable, layers)
    matched = [name for word in words for name in _named(word, model, head, adaptable, layers)]
    for layer in layers or []:
        require(
            any(_layer_of(name) == layer for name in matched),
            f"--lora_layers {layer}: that layer has no {' or '.join(words)}. It has {_listed(_in_layer(adaptable, layer))}.",
        )
    return words


def is_expression(words: list[str] | None) -> bool:
    """Whether `--lora_target_modules` is a regular expression."""
    return any(not PLAIN_NAME.fullmatch(word) for word in words or [])


def _require_layers(adaptable: Iterable[str], layers: list[int] | None) -> None:
    if layers is None:
        return
    there = sorted({index for name in adaptable if (index := _layer_of(name)) is not None})
    wrong = [layer for layer in layers if layer not in there]
    if wrong:
        has = f"layers {there[0]} to {there[-1]}" if there else "no numbered layers"
        raise UserError(f"--lora_layers {wrong[0]}: there is no such layer. The backbone has {has}.")


def _named(
    word: str, model: PreTrainedModel, head: list[str], adaptable: list[str], layers: list[int] | None
) -> list[str]:
    """The modules that a plain name selects, in the chosen layers."""
    matched = [name for name in adaptable if _ends_with(name, word)]
    if matched:
        chosen = [name for name in matched if _is_chosen(name, word, layers)]
        require(
            bool(chosen),
            f"--lora_target_modules {word}: the layers {_listed(map(str, layers or []))} of --lora_layers have none. "
            f"{matched[0]} is the first.",
        )
        return chosen
    others = [name for name, _ in model.named_modules() if _ends_with(name, word)]
    if any(is_in_head(name, head) for name in others):
        raise UserError(
            f"--lora_target_modules {word} names the score head, which is trained in any case. Leave it out."
        )
    if others:
        kind = type(model.get_submodule(others[0])).__name__
        raise UserError(
            f"--lora_target_modules {word}: {others[0]} is a {kind}, which LoRA cannot adapt. Choose from "
            f"{_choices(adaptable)}."
        )
    experts = fused_experts(model)
    if experts and (word in PROJECTIONS or any(word in expert_weights(module) for module in experts.values())):
        raise UserError(
            f"--lora_target_modules {word} names no linear layer here. For the experts pass --lora_experts."
        )
    hint = difflib.get_close_matches(word, _last_parts(adaptable), 1)
    raise UserError(
        f"--lora_target_modules {word}: the backbone has no layer of that name. "
        f"{f'Did you mean {hint[0]}? ' if hint else ''}Choose from {_choices(adaptable)}."
    )


def _matching(words: list[str], adaptable: list[str], layers: list[int] | None) -> list[str]:
    """The modules that a regular expression matches, in the chosen layers."""
    expression = next(word for word in words if not PLAIN_NAME.fullmatch(word))
    if "," in expression and all(PLAIN_NAME.fullmatch(part.strip()) for part in expression.split(",") if part.strip()):
        raise UserError(f"--lora_target_modules {expression}: separate names by spaces (in YAML, write a list).")
    if len(words) > 1:
        raise UserError(
            f"--lora_target_modules {expression} is no module's name. A regular expression stands alone: join what it is to "
            "match by |."
        )
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise UserError(f"--lora_target_modules {expression} is no regular expression: {error}.") from error
    matched = [name for name in adaptable if compiled.fullmatch(name)]
    if not matched:
        raise UserError(
            f"--lora_target_modules {expression} matches no layer. It is matched with full names, such as {adaptable[0]} "
            f"(re.fullmatch). Layers end in {_choices(adaptable)}."
        )
    for layer in layers or []:
        require(
            any(_layer_of(name) == layer for name in matched),
            f"--lora_layers {layer}: --lora_target_modules {expression} matches nothing in that layer.",
        )
    return [name for name in matched if layers is None or _layer_of(name) in layers]


def _ends_with(name: str, word: str) -> bool:
    return name == word or name.endswith(f".{word}")


def _is_chosen(name: str, word: str, layers: list[int] | None) -> bool:
    """Whether `--lora_layers` keeps a module. As in PEFT, one outside the layers is kept only by its full name."""
    layer = _layer_of(name)
    return layers is None or layer in layers or (layer is None and name == word)


def _layer_of(name: str) -> int | None:
    match = LAYER_INDEX.match(name)
    return int(match["index"]) if match else None


def _in_layer(names: Iterable[str], layer: int) -> list[str]:
    return _last_parts(name for name in names if _layer_of(name) == layer)


def _last_parts(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _choices(adaptable: list[str]) -> str:
    return f"{_listed(_last_parts(adaptable))}; all-linear takes every linear layer"


def _listed(words: Iterable[str]) -> str:
    return ", ".join(words)
