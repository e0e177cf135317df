"""Position tables of a model: how long a sequence they allow, and whether padding shifts it.

A table is found by watching a short forward pass, not by its name: a lookup by consecutive numbers in a table of floats
is a lookup by position. The first number is the row of position 0 (RoBERTa and OPT begin at 2).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from qlora_rm.backbone.zero3_gather import gathered_at_work

TOKENS = 6
"""Length of the probe's sequence. Tables have more rows than the probe has tokens, which excludes hidden states."""

PADDING = 2
"""Padding tokens when the same sequence is padded on the left."""

ATTENTION = {functional.scaled_dot_product_attention, functional.softmax, torch.softmax, Tensor.softmax}
"""Calls that follow the lookup of positions."""

GATHER = {torch.gather, Tensor.gather}


@dataclass(frozen=True)
class PositionTable:
    """One table of positions.

    Attributes:
        rows: number of rows.
        first: the row of a sequence's first token.
        width: of a row. A table as wide as the hidden states is added to them; a rotary table is as wide as an
            attention head.
        shifts: whether a sequence padded on the left is looked up at other rows.
    """

    rows: int
    first: int
    width: int
    shifts: bool

    @property
    def positions(self) -> int:
        """Tokens of the longest sequence that the table has rows for."""
        return self.rows - self.first


def usable_positions(model: nn.Module) -> int | None:
    """Tokens of the longest sequence that a loaded model has positions for; None where no table limits them."""
    return min((table.positions for table in position_tables(model)), default=None)


def positions_shift(model: nn.Module) -> bool:
    """Whether padding on the left gives a sequence other positions: those of a table indexed by the place in the row.

    Rotary and relative positions are the same wherever a sequence begins; a table may be indexed through the attention
    mask.
    """
    inner = inner_model(model)
    embedding: Any = inner.get_input_embeddings()
    widths = {embedding.weight.shape[-1], inner.config.get_text_config().hidden_size}
    return any(table.shifts and table.width in widths for table in position_tables(model))


def position_tables(model: nn.Module) -> list[PositionTable]:
    """The tables of a loaded model, wrapped or not."""
    inner = inner_model(model)
    with gathered_at_work(inner):
        return tables_of(inner)


def inner_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside its wrappers."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def probe_ids(model: PreTrainedModel) -> list[int]:
    """`TOKENS` ids, neither padding nor consecutive; the last is end-of-text, where BART and T5 read their score."""
    config = model.config.get_text_config()
    pad, end = (getattr(config, name, None) for name in ("pad_token_id", "eos_token_id"))
    ids = [token for token in range(config.vocab_size - 1, 0, -2) if token not in (pad, end)][:TOKENS]
    if isinstance(end, int) and end != pad and end < config.vocab_size:
        ids[-1] = end
    return ids


def probe_inputs(model: PreTrainedModel, *, left: int = 0, right: int = 0) -> dict[str, Tensor]:
    """The probe's sequence, [1, left + TOKENS + right], with its mask."""
    pad = model.config.get_text_config().pad_token_id or 0
    ids = [pad] * left + probe_ids(model) + [pad] * right
    mask = [0] * left + [1] * TOKENS + [0] * right
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    return {
        "input_ids": torch.tensor([ids], device=device),
        "attention_mask": torch.tensor([mask], device=device),
    }


def tables_of(model: PreTrainedModel, *, has_memory: bool = True) -> list[PositionTable]:
    """The tables of a model.

    Arguments:
        has_memory: whether its weights have values.
    """
    alone, padded = _lookups(model, 0, has_memory), _lookups(model, PADDING, has_memory)
    pairs = zip(alone, padded, strict=False)
    return [PositionTable(rows, first, width, shifts=row != first) for (rows, width, first), (*_, row) in pairs]


def _lookups(model: PreTrainedModel, left: int, has_memory: bool) -> list[tuple[int, int, int]]:
    """Rows and width of each table, and the row of the sequence's first token after `left` tokens of padding."""
    watch, inputs = _Watch(model, left, has_memory), probe_inputs(model, left=left)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), watch:
            model(**inputs)
    except Exception:  # the lookups are done; or the model cannot run, which scoring reports
        return watch.found
    finally:
        model.train(was_training)
    return watch.found


class _Done(Exception):
    """Raised once positions have been looked up."""


class _Watch(TorchFunctionMode):
    """Record lookups in tables of floats by numbers that are consecutive within the sequence.

    It ends the forward pass at the first attention. A decoder looks positions up after its encoder's attention, so that
    a model with both runs to the end if it has memory.

    Arguments:
        left: tokens of padding before the sequence.
        has_memory: if False, products with weights are zeros and are not computed.
    """

    def __init__(self, model: PreTrainedModel, left: int, has_memory: bool) -> None:
        super().__init__()
        self.model, self.left, self.has_memory = model, left, has_memory
        self.ends = not has_memory or not getattr(model.config, "is_encoder_decoder", False)
        self.found: list[tuple[int, int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.ends and func in ATTENTION:
            raise _Done
        if not self.has_memory and func is functional.linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            return args[0].new_zeros(*args[0].shape[:-1], weight.shape[0])
        for table, dim, index in _lookup(func, args, kwargs):
            self._note(func, table, dim, index)
        return func(*args, **kwargs)

    def _note(self, func: Any, table: Any, dim: int, index: Any) -> None:
        if not isinstance(table, Tensor) or not table.is_floating_point() or table.dim() < 2:
            return
        rows, length = table.shape[dim], self.left + TOKENS
        whole_numbers = isinstance(index, Tensor) and index.dtype in (torch.long, torch.int)
        if not whole_numbers or index.device.type == "meta" or not length <= index.numel() < rows or rows <= 2 * length:
            return
        numbers = index.flatten()[self.left : length].tolist()
        if numbers == list(range(numbers[0], numbers[0] + TOKENS)) and (func in GATHER or self._holds(table)):
            self.found.append((rows, table.shape[-1], numbers[0]))

    def _holds(self, table: Tensor) -> bool:
        """Whether `table` is a parameter or buffer of the model, not a tensor of hidden states."""
        place = table.untyped_storage().data_ptr()
        own = (*self.model.parameters(), *self.model.buffers())
        return any(tensor.untyped_storage().data_ptr() == place for tensor in own)


def _lookup(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Any, int, Any]]:
    """Yield the table, its dimension and the index of a call that looks up rows."""
    if func is functional.embedding:
        yield args[1] if len(args) > 1 else kwargs["weight"], 0, args[0] if args else kwargs["input"]
    elif func in (torch.index_select, Tensor.index_select) and len(args) == 3:
        yield args[0], args[1], args[2]
    elif func in GATHER and len(args) == 3 and args[2].dim() > 2 and args[1] == args[2].dim() - 2:  # GPT-J
        yield args[0], args[1], args[2].select(-1, 0)
    elif func is Tensor.__getitem__:
        key = args[1][0] if isinstance(args[1], tuple) and args[1] else args[1]
        if isinstance(key, Tensor):
            yield args[0], 0, key
