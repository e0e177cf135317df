"""Refuse implausible configurations and weight files before anything of their size is allocated.

A config.json is untrusted data. One with a million layers, or with a vocabulary that no file holds, would exhaust the
memory or time of whoever builds the model.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import cached_file

from qlora_rm.backbone.json_files import read_json
from qlora_rm.backbone.paths import is_local
from qlora_rm.backbone.safetensors_reader import Checkpoint
from qlora_rm.errors import UserError, first_line

REMEDY = "Fetch or save the model again."
LARGEST = 1 << 40
"""Largest absolute value of a number in a configuration."""

LONGEST = 1_000_000
"""Entries of the longest list or object."""

COUNTS = (
    (re.compile(r"(layers?|blocks|heads|experts|groups|labels)$"), 1 << 14),
    (re.compile(r"(vocab_size|_positions?|_position_embeddings|n_ctx|_length|_window)$"), 1 << 31),
    (re.compile(r"(_size|_dim|^dim|d_model|n_embd|d_ff|d_kv|n_inner)$"), 1 << 24),
)
"""Largest value of a number, by the end of its key. The first pattern that matches decides."""

SHARED_LAYERS = 64
"""Layers that a model may have beyond the number of its tensors: ALBERT uses the weights of one layer many times."""

GROWTH, FREE = 1.5, 10_000_000
"""How many more weights a configuration may imply than the files hold: this factor, and this number for a new head."""

WEIGHTS_PER_BYTE = 4
"""For a quantized checkpoint: 2 bits a weight."""


def require_plausible_config(name: str, revision: str | None = None) -> None:
    """Check a config.json as JSON, before a library builds a configuration from it.

    Arguments:
        name: a model folder, a config.json, or a hub id, whose config.json is fetched.

    Raises:
        UserError: it is not a JSON object, or a number or list in it is larger than in any model; the message names the
            key.
    """
    path = _config_file(name, revision)
    if path is None:
        return
    content = read_json(path, REMEDY, strict=False)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold an object, not {content!r:.60}. {REMEDY}")
    for key, value in _entries(content):
        _require_bounded(path, key, value)
    _require_layers(name, path, content)


def require_held(name: str, revision: str | None, bones: PreTrainedModel) -> None:
    """Check that a configuration implies about as many weights as the files hold.

    Arguments:
        bones: the model on the meta device.

    Raises:
        UserError: it implies far more, or a file is broken.
    """
    stored = Checkpoint.of_model(name, revision)
    if not stored:
        return
    implied = sum(parameter.numel() for parameter in bones.parameters())
    if is_quantized(name, revision):
        held = WEIGHTS_PER_BYTE * sum(place.nbytes for place in stored.values())
    else:
        held = sum(_elements(place.shape) for place in stored.values())
    if implied > GROWTH * held + FREE:
        raise UserError(
            f"The config.json of {name} describes {implied:,} weights, and its files hold {held:,}. The one does not belong to "
            f"the other. {REMEDY}"
        )


def is_quantized(name: str, revision: str | None) -> bool:
    """Whether a model's config.json says that its files are quantized."""
    path = _config_file(name, revision)
    return path is not None and bool(read_json(path, REMEDY, strict=False).get("quantization_config"))


def as_user_error(name: str, error: Exception) -> UserError:
    """Turn a library's error about a configuration that it cannot read or build into a `UserError`."""
    return UserError(f"No model could be loaded from {name}: {type(error).__name__}: {first_line(error):.300}")


def _config_file(name: str, revision: str | None) -> Path | None:
    if Path(name).is_file():
        return Path(name)
    try:
        found = cached_file(name, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # loading the model reports what is missing
        return None
    return None if found is None else Path(found)


def _entries(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every value below `value`, with the nearest key above it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield name, inner
            yield from _entries(inner, name)
    elif isinstance(value, list):
        for inner in value[: LONGEST + 1]:
            yield key, inner
            yield from _entries(inner, key)


def _require_bounded(path: Path, key: str, value: Any) -> None:
    if isinstance(value, (dict, list)) and len(value) > LONGEST:
        raise UserError(f"{path}: {key} has {len(value):,} entries; the most that a model has is {LONGEST:,}. {REMEDY}")
    if type(value) is not int:
        return
    most = next((limit for pattern, limit in COUNTS if pattern.search(key)), LARGEST)
    if abs(value) > most:
        raise UserError(f"{path}: {key} is {value:,}; the most that a model has is {most:,}. {REMEDY}")


def _require_layers(name: str, path: Path, content: dict[str, Any]) -> None:
    """Check that a model has at least one tensor a layer, unless it uses one layer many times."""
    pattern = COUNTS[0][0]
    most = max((v for k, v in _entries(content) if type(v) is int and pattern.search(k) and "layer" in k), default=0)
    if most <= SHARED_LAYERS or not is_local(name) or Path(name).is_file():
        return
    stored = Checkpoint.of_model(name)
    if stored and most > SHARED_LAYERS + len(stored):
        raise UserError(f"{path} names {most:,} layers, and the files hold {len(stored):,} tensors. {REMEDY}")


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
