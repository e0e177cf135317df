"""Work on a model that DeepSpeed has sharded, before it has an engine: unshard parts, and run forward passes.

This module uses only methods that DeepSpeed adds to a sharded parameter, so that unsharded models need no import of it.
All of it is collective: every process of the job must call it, in the same order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed keeps a shard of this parameter on each process; `ds_shape` is then its full shape."""
    return hasattr(parameter, "ds_id")


def any_sharded(model: nn.Module) -> bool:
    return any(is_sharded(parameter) for parameter in model.parameters())


def make_whole(module: nn.Module) -> None:
    """Replace a module's sharded parameters by ordinary ones, equal on all processes, so that they can be changed.

    The engine shards unsharded parameters when it starts.
    """
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if is_sharded(parameter):
                _gather([parameter])
                setattr(owner, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
                _release([parameter])


def shard_like(model: nn.Module, module: nn.Module) -> None:
    """Shard the unsharded parameters of `module` if `model` is sharded."""
    sharded: Any = next(filter(is_sharded, model.parameters()), None)
    if sharded is not None:
        sharded.convert_to_zero_parameters([p for p in module.parameters() if not is_sharded(p)])


@contextmanager
def gathered_at_work(model: nn.Module) -> Iterator[None]:
    """Let a sharded model compute before it has an engine: each module's own weights are gathered while it runs.

    This serves forward and backward passes. A model that is not sharded is left as it is.
    """
    whole: dict[nn.Module, list[nn.Parameter]] = {}

    def gather(module: nn.Module, *_: Any) -> None:
        whole[module] = [p for p in _own_shards(module) if p.ds_status.name == "NOT_AVAILABLE"]
        _gather(whole[module])

    def release(module: nn.Module, *_: Any) -> None:
        _release(whole.pop(module, []))

    hooks = []
    for module in filter(_own_shards, model.modules()):
        hooks += [
            module.register_forward_pre_hook(gather),
            module.register_forward_hook(release, always_call=True),
            module.register_full_backward_pre_hook(gather),
            module.register_full_backward_hook(release),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in list(whole):
            release(module)


def _own_shards(module: nn.Module) -> list[Any]:
    return [p for p in module.parameters(recurse=False) if is_sharded(p)]


def _gather(parameters: list[Any]) -> None:
    if parameters:
        parameters[0].all_gather(param_list=parameters)


def _release(parameters: list[Any]) -> None:
    if parameters:
        parameters[0].partition(param_list=parameters)
