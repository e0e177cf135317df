"""Rotary scaling that depends on length, replaced by one fixed rule for the life of a model.

longrope (Phi-3) and dynamic NTK choose the rotation of all sequences in a batch by the longest one (transformers 5.23,
`modeling_rope_utils.dynamic_rope_update`). A long neighbour thus changes the scores of short sequences. Dynamic NTK
also keeps the longest length it has seen (Qwen #401). vLLM chooses once, at its start.

A reward model therefore rotates all sequences as its longest one. Its configuration states this in a form that leaves
no choice: longrope with the same factors twice, dynamic NTK as plain rotation with the resulting theta. Every consumer
then agrees.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

Parameters = dict[str, Any]

ORIGINAL = "original_inv_freq"
"""Suffix of the name of the buffer that holds a rotary layer's first frequencies."""


def depends_on_length(config: PretrainedConfig) -> bool:
    """Whether sequences are rotated by the length of the longest one in their batch."""
    text = config.get_text_config()
    return any(_is_longrope(p) or _is_dynamic(p) for p in _parameters(text))


def longest_reach(config: PretrainedConfig) -> int:
    """The length in tokens that the scaling was made for."""
    text = config.get_text_config()
    factors = [p["factor"] if _is_dynamic(p) else 1.0 for p in _parameters(text) if _is_longrope(p) or _is_dynamic(p)]
    return int(text.max_position_embeddings * max(factors, default=1.0))


def rotary_length(config: PretrainedConfig, max_length: int | None) -> int | None:
    """The length whose rotation all sequences of a model get; None where rotation does not depend on length.

    It is the `max_length` of training, or without a limit the length the scaling was made for.
    """
    if not depends_on_length(config):
        return None
    return max_length or longest_reach(config)


def pinned(config: PretrainedConfig, length: int | None) -> PretrainedConfig:
    """A configuration that rotates every sequence as one of `length` tokens.

    It is `config` itself where rotation does not depend on length, or `length` is None.
    """
    if length is None or not depends_on_length(config):
        return config
    config = deepcopy(config)
    text = config.get_text_config()
    made_for = text.max_position_embeddings
    for parameters in _parameters(text):
        if _is_longrope(parameters):
            _pin_longrope(parameters, length, made_for)
        elif _is_dynamic(parameters):
            _pin_dynamic(parameters, length, text)
            # plain rotation allows only this many positions, where dynamic NTK allowed a multiple (vLLM)
            made_for = max(made_for, length)
    text.max_position_embeddings = made_for
    return config


def rotates_as_short(config: PretrainedConfig, length: int) -> bool:
    """Whether a sequence of `length` tokens is rotated as the shortest are, so that all lengths up to it are alike."""
    long, short = (list(_parameters(pinned(config, n).get_text_config())) for n in (length, 1))
    return long == short


def rotation_of(model: nn.Module) -> Callable[[int], int] | None:
    """A function from a length to a number that is equal for lengths a loaded model rotates alike.

    An unpinned model (another project's) is defined by its output for a sequence alone; only sequences that it rotates
    alike may share a batch. None for a model that rotates all lengths alike.
    """
    inner = next((module for module in model.modules() if isinstance(module, PreTrainedModel)), None)
    if inner is None or not depends_on_length(inner.config):
        return None
    text = inner.config.get_text_config()
    switches = [_switch(p, text.max_position_embeddings) for p in _parameters(text) if _is_longrope(p)]
    grows = [text.max_position_embeddings for p in _parameters(text) if _is_dynamic(p)]

    def rotation(length: int) -> int:
        if grows and length > min(grows):
            return length
        return sum(length > switch for switch in switches)

    return rotation


def forget_lengths(model: nn.Module) -> None:
    """Reset dynamic NTK to its first frequencies.

    transformers 5.23 keeps the frequencies of the longest sequence so far, for shorter ones above the original length
    too (transformers #25306). Remove once it computes them for each batch.
    """
    for module in model.modules():
        for name, original in [(n, b) for n, b in module.named_buffers(recurse=False) if n.endswith(ORIGINAL)]:
            kind = name.removesuffix(ORIGINAL)  # empty, or the kind of layer
            if hasattr(module, f"{kind}max_seq_len_cached"):
                setattr(module, f"{kind}max_seq_len_cached", module.original_max_seq_len)
                module.get_buffer(f"{kind}inv_freq").data = original.clone()


def _parameters(config: PretrainedConfig) -> Iterator[Parameters]:
    """The rotary parameters of a configuration, or those of each kind of layer; in place."""
    found = getattr(config, "rope_parameters", None)
    if not isinstance(found, dict):
        return
    nested = [value for value in found.values() if isinstance(value, dict) and "rope_type" in value]
    yield from nested or [found]


def _is_longrope(parameters: Parameters) -> bool:
    """Whether short and long sequences are rotated by different factors."""
    pairs = (("short_factor", "long_factor"), ("short_mscale", "long_mscale"))
    return parameters.get("rope_type") == "longrope" and any(parameters.get(a) != parameters.get(b) for a, b in pairs)


def _is_dynamic(parameters: Parameters) -> bool:
    """Whether theta grows with length; HunYuan's `alpha` makes it a constant."""
    return parameters.get("rope_type") == "dynamic" and not parameters.get("alpha") and parameters.get("factor", 1) != 1


def _switch(parameters: Parameters, max_positions: int) -> int:
    return int(parameters.get("original_max_position_embeddings") or max_positions)


def _pin_longrope(parameters: Parameters, length: int, max_positions: int) -> None:
    kept = "long" if length > _switch(parameters, max_positions) else "short"
    for name in ("factor", "mscale"):
        if f"{kept}_{name}" in parameters:
            for kind in ("short", "long"):
                parameters[f"{kind}_{name}"] = deepcopy(parameters[f"{kept}_{name}"])


def _pin_dynamic(parameters: Parameters, length: int, config: PretrainedConfig) -> None:
    """As `_compute_dynamic_ntk_parameters` of transformers, for one length."""
    factor, positions = parameters.pop("factor"), config.max_position_embeddings
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head * parameters.get("partial_rotary_factor", 1.0))
    grown = factor * max(length, positions) / positions - (factor - 1)
    parameters["rope_theta"] = parameters["rope_theta"] * grown ** (dim / (dim - 2))
    parameters["rope_type"] = "default"
    parameters.pop("type", None)
