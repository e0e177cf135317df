"""Tokens of a micro-batch: assumed from a length and a share, or measured on tokenized comparisons."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from qlora_rm.backbone.packed import FLEX_BLOCK, PrefixSharing
from qlora_rm.config import BackboneConfig
from qlora_rm.planning.rehearsal import Batch
from qlora_rm.preferences.forest import grow, pays

HEAVIEST = 64
"""Number of comparisons considered: more than any planned micro-batch holds."""


@dataclass(frozen=True)
class Layout:
    """How the train command will lay out a micro-batch for a model.

    Attributes:
        kernel: attention kernel.
        packed: each prompt once, where possible; otherwise padded.
        row_multiple: row lengths of a forest are a multiple of this.
        width: hidden size of the backbone where attention uses a dense mask; a forest that would be more work is then
            padded. None where the kernel skips what the mask hides.
    """

    kernel: str
    packed: bool
    row_multiple: int
    width: int | None

    @classmethod
    def of(cls, model: PreTrainedModel, config: BackboneConfig, *, cuda: bool) -> "Layout":
        """Predict what `backbone.packed.share_prefixes` will decide, as far as possible without a probe."""
        text = model.config.get_text_config()
        dropout = any(getattr(text, name, 0) for name in ("attention_dropout", "attn_pdrop"))
        packed = config.share_prefix != "false" and isinstance(model, PrefixSharing)
        flex = packed and cuda and model._supports_flex_attn and not dropout
        kernel = config.attn_implementation or ("flex_attention" if flex else "sdpa")
        packed = packed and kernel in ("sdpa", "eager", "flex_attention")
        if kernel == "flex_attention":
            return cls(kernel, packed, FLEX_BLOCK, None)
        # others (flash_attention_2) keep what FlexAttention keeps: no mask and no scores
        return cls(kernel if kernel in ("sdpa", "eager") else "flex_attention", packed, 1, text.hidden_size)


class Workload:
    """Comparisons, the heaviest first; a micro-batch is assumed to hold the heaviest of all.

    Arguments:
        comparisons: token ids of each comparison's sequences.
        longest: tokens of the longest sequence.
    """

    def __init__(self, comparisons: Sequence[Sequence[list[int]]], longest: int, layout: Layout):
        self.comparisons, self.longest, self.layout = comparisons, longest, layout
        self._batches: dict[int, Batch] = {}

    @classmethod
    def measured(cls, rows: Iterable[Mapping[str, Any]], layout: Layout) -> "Workload":
        """Measure tokenized comparisons, rows with the columns of `preferences.load_preferences`."""

        def size(row: Mapping[str, Any]) -> int:
            return int(row["tokens"] if layout.packed else len(row["response_ids"]) * row["length"])

        longest = 0
        heaviest: list[Mapping[str, Any]] = []
        for row in rows:
            longest = max(longest, int(row["length"]))
            heaviest.append(row)
            if len(heaviest) == 4 * HEAVIEST:
                heaviest = sorted(heaviest, key=size, reverse=True)[:HEAVIEST]
        heaviest = sorted(heaviest, key=size, reverse=True)[:HEAVIEST]
        return cls([[row["prompt_ids"] + ids for ids in row["response_ids"]] for row in heaviest], longest, layout)

    @classmethod
    def assumed(cls, longest: int, share: float, responses: int, layout: Layout) -> "Workload":
        """Assume equal comparisons: sequences of the full length, whose responses have a `share` of it in common."""
        prompt = int(longest * share)
        return cls([[[0] * prompt + [1 + r] * (longest - prompt) for r in range(responses)]], longest, layout)

    def batch(self, pairs: int) -> Batch:
        """Shape of the largest micro-batch of `pairs` comparisons."""
        if pairs not in self._batches:
            self._batches[pairs] = self._batch(pairs)
        return self._batches[pairs]

    def _batch(self, pairs: int) -> Batch:
        chosen = [self.comparisons[i % len(self.comparisons)] for i in range(pairs)]
        # the first token keeps comparisons distinct: with few, some are used twice, and copies would share everything
        sequences = [[-i, *ids[1:]] for i, group in enumerate(chosen) for ids in group]
        padded = Batch(len(sequences), max(map(len, sequences)), len(sequences), packed=False)
        if not self.layout.packed:
            return padded
        forest = grow(sequences, 0, self.layout.row_multiple)
        if self.layout.width is not None and not pays(forest, sequences, self.layout.width):
            return padded
        rows, length = forest.input_ids.shape
        return Batch(rows, length, len(sequences))

    def cut(self, length: int) -> "Workload":
        """The same workload without the oldest tokens of long sequences, equally many for all responses to a prompt."""
        cut = [[ids[max(0, max(map(len, group)) - length) :] for ids in group] for group in self.comparisons]
        return Workload(cut, min(length, self.longest), self.layout)
