"""A model that DeepSpeed has sharded, worked on before it has an engine: parts made whole, and forward passes.

Everything here goes through the methods that DeepSpeed gives a sharded parameter, so that nothing has to import it where
nothing is sharded. All of it is collective: every process of the job must call it, in the same order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed keeps a share of this parameter on each process; `ds_shape` is then its shape."""
    return hasattr(parameter, "ds_id")


def any_sharded(model: nn.Module) -> bool:
    return any(is_sharded(parameter) for parameter in model.parameters())


def make_whole(module: nn.Module) -> None:
    """Put ordinary parameters, the same on all processes, in the place of a module's sharded ones, to be worked on.

    The engine shards what it finds whole when it starts.
    """
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if is_sharded(parameter):
                _gather([parameter])
                setattr(owner, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))
                _release([parameter])


def shard_like(model: nn.Module, module: nn.Module) -> None:
    """Shard what is whole in `module` as the rest of `model` is, where it is."""
    sharded: Any = next(filter(is_sharded, model.parameters()), None)
    if sharded is not None:
        sharded.convert_to_zero_parameters([p for p in module.parameters() if not is_sharded(p)])


@contextmanager
def gathered_at_work(model: nn.Module) -> Iterator[None]:
    """Let a sharded model compute before it has an engine: each module's own weights are whole while it runs.

    For forward and backward passes. A model that is not sharded is left as it is.
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
