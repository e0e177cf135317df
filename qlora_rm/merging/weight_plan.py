"""Plan which tensors on disk become which weights of the model, and under which names these are saved."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from qlora_rm.artifacts.safetensors_writer import Wanted
from qlora_rm.backbone.safetensors_reader import Checkpoint
from qlora_rm.backbone.skeleton import Skeleton
from qlora_rm.errors import UserError


class NotStreamable(Exception):
    """Raised for a model that cannot be merged tensor by tensor. The message says why."""


@dataclass
class Group:
    """Tensors on disk that are converted together, usually just one.

    Attributes:
        sources: their names, each with its pattern in the conversion; empty for weights from the adapter.
        transform: transformers' conversion, without data.
        targets: names of the resulting weights in the model.
        saved: the tensors to write for them; where `straight`, one of the same layout.
    """

    sources: list[tuple[str, str]]
    transform: WeightConverter | WeightRenaming | None
    targets: list[str]
    saved: list[Wanted]
    straight: bool

    def convert(self, read: Callable[[str], Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """Convert the sources. Return target -> value."""
        if self.transform is None:
            return {}
        transform = deepcopy(self.transform)
        name = self.targets[0]
        for source, pattern in self.sources:
            # synchronous loading passes callables, despite the annotation
            transform.add_tensor(name, source, pattern, partial(read, source))  # type: ignore[arg-type]
        realized = transform.convert(name, model=model, config=model.config)
        return {target: value[0] if isinstance(value, list) else value for target, value in realized.items()}


def plan(skeleton: Skeleton, stored: Checkpoint, brought: set[str], dtype: torch.dtype) -> list[Group]:
    """Return all groups, in the order of their tensors in the files.

    Arguments:
        brought: names of weights that the adapter replaces in full, including the head's.
        dtype: dtype of the saved weights.

    Raises:
        NotStreamable: transformers' conversion of this architecture cannot be reversed tensor by tensor.
        UserError: the checkpoint lacks a weight.
    """
    model, names = skeleton.model, skeleton.model.state_dict()
    # the conversions that `save_pretrained` uses for a model not loaded from files with a prefix
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    model._weight_conversions = [c for c in conversions if not isinstance(c, PrefixChange)]  # type: ignore[assignment]
    groups = _grouped(skeleton, stored, names)
    try:
        for group in groups:
            found = group.convert(lambda name: stored[name].like(), model) if _has_layout(group) else {}
            group.targets = [name for name in found if name in names] or group.targets
            _name_saved(group, model, names, dtype)
    except (AttributeError, KeyError, RuntimeError, ValueError) as error:
        raise NotStreamable(f"transformers' conversion of {groups[0].sources[0][0]} and its like: {error}") from error
    covered = {target for group in groups for target in group.targets}
    for name in sorted(brought - covered):
        group = Group([], None, [name], [], straight=True)
        _name_saved(group, model, names, dtype)
        groups.append(group)
    lost = [name for name, _ in model.named_parameters() if name not in covered | brought]
    if lost:
        raise UserError(f"The base lacks {len(lost)} weights, first {lost[0]}. Fetch or save it again.")
    whole = revert_weight_conversion(model, {name: names[name] for name in sorted(covered | brought)})
    if {wanted.name for group in groups for wanted in group.saved} != whole.keys():
        raise NotStreamable("transformers renames this architecture's weights by what else the files hold")
    return groups


def _grouped(skeleton: Skeleton, stored: Checkpoint, names: dict[str, Tensor]) -> list[Group]:
    """Group tensors as transformers' loader does. Tensors that the model lacks, such as an `lm_head`, are skipped."""
    renamings = [c for c in skeleton.conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in skeleton.conversions if isinstance(c, WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    prefix = skeleton.model.base_model_prefix
    groups: dict[str, Group] = {}
    for key in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, names)
        if target not in names and key in names:
            target, pattern = rename_source_key(key, [], [], prefix, names)
        if target not in names:
            continue
        transform = WeightRenaming(key, target) if pattern is None else by_pattern[pattern]
        group = groups.setdefault(target, Group([], deepcopy(transform), [target], [], straight=False))
        group.sources.append((key, pattern or key))
    return sorted(groups.values(), key=lambda g: min((str(stored[k].file), stored[k].start) for k, _ in g.sources))


def _has_layout(group: Group) -> bool:
    """Return whether a conversion can run without data. A packed weight of a 4-bit checkpoint keeps its name anyway."""
    return isinstance(group.transform, WeightConverter) and not any(
        "quant_state" in pattern for pattern in group.transform.source_patterns
    )


def _name_saved(group: Group, model: PreTrainedModel, names: dict[str, Tensor], dtype: torch.dtype) -> None:
    stand_ins = {target: names[target] for target in group.targets}
    saved = revert_weight_conversion(model, dict(stand_ins))
    group.straight = len(saved) == len(stand_ins) == 1 and next(iter(saved.values())) is stand_ins[group.targets[0]]
    group.saved = [
        Wanted(name, dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))
        for name, tensor in saved.items()
    ]
