"""Scoring a prefix forest: its attention mask, the forward pass that reads scores at leaves, and the probe.

Shapes: R rows, L tokens a row, S sequences, H hidden size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from qlora_rm.backbone.positions import usable_positions
from qlora_rm.backbone.zero3_gather import gathered_at_work
from qlora_rm.config import SharePrefix
from qlora_rm.console import say
from qlora_rm.errors import UserError, first_line
from qlora_rm.preferences.forest import Forest, grow

Mask = Tensor | BlockMask

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest relative difference of hidden states, packed against plain, that rounding explains, by compute dtype."""

FLEX_BLOCK = 128
"""FlexAttention works in blocks of this many tokens; rows of other lengths are padded to a multiple."""


class PrefixSharing:
    """Mixin for a `...ForSequenceClassification` with a linear `score` head: `forward` takes a forest too.

    Called with `subtree_end` and `leaves` it returns logits [S, 1], one per sequence of the forest; without them it is
    the class's own forward pass.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        subtree_end: Tensor | None = None,
        leaves: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if subtree_end is None or leaves is None:
            given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids, **kwargs}
            return super().forward(**{name: value for name, value in given.items() if value is not None})  # type: ignore[misc]
        assert input_ids is not None and position_ids is not None
        states = leaf_states(self, input_ids, position_ids, subtree_end, leaves)  # type: ignore[arg-type]
        return SequenceClassifierOutputWithPast(logits=self.score(states))  # type: ignore[attr-defined]


def leaf_states(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, subtree_end: Tensor, leaves: Tensor
) -> Tensor:
    """The backbone's last hidden states at the leaves of a forest, [S, H]."""
    masks = attention_masks(model.config, position_ids, subtree_end, _dtype(model))
    hidden = model.base_model(
        input_ids=input_ids, attention_mask=masks, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    return hidden[leaves[:, 0], leaves[:, 1]]


def attention_masks(
    config: PretrainedConfig, position_ids: Tensor, subtree_end: Tensor, dtype: torch.dtype
) -> Mask | dict[str, Mask]:
    """The forest's mask as the model's attention takes it: one, or one per kind of layer where it has several kinds."""
    config = config.get_text_config()  # of a model of text and images, the part that is the backbone
    kinds = getattr(config, "layer_types", None)

    def mask(kind: str) -> Mask:
        window = config.sliding_window if kind == "sliding_attention" else None
        chunk = config.attention_chunk_size if kind == "chunked_attention" else None
        if config._attn_implementation == "flex_attention":
            return block_mask(position_ids, subtree_end, window, chunk)
        visible = dense_mask(position_ids, subtree_end, window, chunk)
        if config._attn_implementation == "eager":  # adds its mask to the attention logits
            return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
        return visible

    if kinds:
        return {kind: mask(kind) for kind in set(kinds)}
    return mask("sliding_attention" if getattr(config, "sliding_window", None) else "full_attention")


def dense_mask(
    position_ids: Tensor, subtree_end: Tensor, window: int | None = None, chunk: int | None = None
) -> Tensor:
    """Mask of which token may see which, bool [R, 1, L (query), L (key)]: k <= q < subtree_end[k].

    A sliding window and chunked attention count by depth (position), not by place in the row. A token sees only its own
    sequence, and there depth equals the index in a plain batch.
    """
    q = torch.arange(subtree_end.shape[1], device=subtree_end.device)
    mask = (q <= q[:, None]) & (q[:, None] < subtree_end[:, None, :])
    if window is not None:
        mask &= position_ids[:, :, None] - position_ids[:, None, :] < window
    if chunk is not None:
        mask &= position_ids[:, :, None] // chunk == position_ids[:, None, :] // chunk
    return mask[:, None]


def block_mask(
    position_ids: Tensor, subtree_end: Tensor, window: int | None = None, chunk: int | None = None
) -> BlockMask:
    """The same mask for FlexAttention, built on the device from both index tensors; fully masked blocks are skipped."""

    def may_see(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (k <= q) & (q < subtree_end[b, k])
        if window is not None:
            seen = seen & (position_ids[b, q] - position_ids[b, k] < window)
        if chunk is not None:
            seen = seen & (position_ids[b, q] // chunk == position_ids[b, k] // chunk)
        return seen

    rows, length = subtree_end.shape
    return create_block_mask(may_see, rows, None, length, length, device=subtree_end.device)


def forest_batch(sequences: Sequence[list[int]], pad_token_id: int, multiple_of: int = 1) -> dict[str, Tensor]:
    """The forward pass's inputs for S sequences, with each shared beginning once."""
    return as_tensors(grow(sequences, pad_token_id, multiple_of))


def as_tensors(forest: Forest) -> dict[str, Tensor]:
    """`input_ids`, `position_ids`, `subtree_end` int64 [R, L] and `leaves` int64 [S, 2]."""
    names = ("input_ids", "position_ids", "subtree_end", "leaves")
    return {name: torch.from_numpy(getattr(forest, name)) for name in names}


def sharing_model(model: nn.Module) -> PreTrainedModel | None:
    """The model inside its wrappers that takes forests, or None where prefixes are not shared."""
    return next((module for module in model.modules() if isinstance(module, PrefixSharing)), None)  # type: ignore[return-value]


def row_multiple(model: nn.Module) -> int:
    """The multiple that forest row lengths must have for the model's attention kernel; `model` may be wrapped."""
    inner = next(module for module in model.modules() if isinstance(module, PreTrainedModel))
    return FLEX_BLOCK if inner.config._attn_implementation == "flex_attention" else 1


def dense_width(model: nn.Module) -> int | None:
    """The backbone's hidden size where attention uses a dense mask; None where it skips what the mask hides."""
    config = next(module for module in model.modules() if isinstance(module, PreTrainedModel)).config
    return None if config._attn_implementation == "flex_attention" else config.get_text_config().hidden_size


def share_prefixes(model: PreTrainedModel, choice: SharePrefix, kernel: str | None = None) -> bool:
    """Let `model` take forests where that gives the scores of plain batches; log the decision and its reason.

    Arguments:
        model: loaded, outside any wrapper. Its class gains the mixin in place and keeps its name, which saved
            configurations hold.
        choice: "auto" falls back to plain batches and logs one line; "true" makes that an error; "false" means plain
            batches.
        kernel: the attention kernel the user asked for, if any; then no other is tried.

    Raises:
        UserError: `choice` is "true" and packed scores differ, or cannot be computed.
    """
    if choice == "false":
        return False
    reasons = []
    obstacle = _obstacle(model)
    for candidate in [] if obstacle else _kernels(model, kernel):
        reason = _try(model, candidate)
        if reason is None:
            say(f"shared prompts: computed once ({candidate} attention; packed equals plain)")
            return True
        reasons.append(f"{candidate} attention: {reason}")
    told = obstacle or "; ".join(reasons) or f"{kernel} attention takes no mask"
    if choice == "true":
        raise UserError(f"--share_prefix true, but prompts cannot be shared here ({told}). Use --share_prefix auto.")
    say(f"shared prompts: computed again for each response, in plain padded batches ({told})")
    return False


def _obstacle(model: PreTrainedModel) -> str | None:
    """Why no kernel can share prompts here, checked before any is tried; includes cases a short probe would miss."""
    if not isinstance(getattr(model, "score", None), nn.Linear):
        return "no linear score head on a causal backbone"
    if any(buffer.dtype == torch.bool and buffer.dim() == 4 for buffer in model.buffers()):
        return "this architecture masks by place in the row, with a mask of its own"  # GPT-Neo's local layers
    return None


def _kernels(model: PreTrainedModel, asked: str | None) -> list[str]:
    """Attention kernels that take a mask, in the order to try them.

    FlexAttention skips what the mask hides, but has no backward on a CPU, and none with attention dropout.
    """
    if asked is not None:
        return [asked] if asked in ("sdpa", "eager", "flex_attention") else []
    config = model.config.get_text_config()
    dropout = any(getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop"))
    flex = ["flex_attention"] if model.device.type == "cuda" and model._supports_flex_attn and not dropout else []
    current = str(config._attn_implementation)
    return [*flex, current if current in ("sdpa", "eager") else "sdpa"]


def _try(model: PreTrainedModel, kernel: str) -> str | None:
    """Switch `model` to sharing with `kernel` and probe it; on failure restore everything and return the reason."""
    own_class, own_kernel = type(model), model.config._attn_implementation
    allowed = TOLERANCE.get(_dtype(model), TOLERANCE[torch.float32])
    try:
        model.set_attn_implementation(kernel)
        with gathered_at_work(model):
            plain, packed = probe(model)
            if kernel == "flex_attention":  # compiled, forward and backward separately
                probe_backward(model)
    except Exception as error:  # an architecture may raise anything on a mask it was not written for
        reason = f"{type(error).__name__}: {first_line(error)[:100]}"
    else:
        difference = float(((packed - plain).norm(dim=-1) / plain.norm(dim=-1).clamp(min=1e-12)).max())
        if difference <= allowed:
            model.__class__ = type(own_class.__name__, (PrefixSharing, own_class), {})
            return None
        reason = f"packed and plain hidden states differ by {difference:.1e}, more than the {allowed:.0e} of rounding"
    model.set_attn_implementation(own_kernel)
    return reason


def probe(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Last hidden states of three short sequences, two with a common beginning: one by one, and packed; [3, H].

    The third starts beyond the positions of pretraining, where rotary scaling may switch for the entire row. The probe
    compares hidden states, because a head that starts at zero gives every sequence the same score.
    """
    sequences, starts, batch = _probe_batch(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            plain = [_last_state(model, *one) for one in zip(sequences, starts, strict=True)]
            packed = leaf_states(model, **batch)
    finally:
        model.train(was_training)
    return torch.stack(plain).float(), packed.float()


def probe_backward(model: PreTrainedModel) -> None:
    """Run one forward and backward pass over the probe's forest in training mode; raise what the kernel raises.

    Only hidden states get gradients: gradients of weights would take the memory of a second model.
    """
    *_, batch = _probe_batch(model)
    was_training = model.training
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    hook = model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: output.requires_grad_(True)
    )
    model.train()
    try:
        with torch.enable_grad():
            leaf_states(model, **batch).sum().backward()
    finally:
        hook.remove()
        model.train(was_training)
        for parameter in trained:
            parameter.requires_grad_(True)


def _probe_batch(model: PreTrainedModel) -> tuple[list[list[int]], list[int], dict[str, Tensor]]:
    """Three sequences, the position at which each begins, and their forest."""
    config = model.config.get_text_config()
    ids = torch.randint(config.vocab_size // 4, config.vocab_size, (28,), generator=torch.Generator().manual_seed(0))
    shared, ends, other = ids[:12].tolist(), ids[12:19].tolist(), ids[19:].tolist()
    sequences, far = [shared + ends[:5], shared + ends[5:], other], _beyond_pretraining(model)
    batch = forest_batch(sequences, config.pad_token_id or 0, row_multiple(model))
    row, end = batch["leaves"][2].tolist()
    batch["position_ids"][row, end + 1 - len(other) : end + 1] += far
    return sequences, [0, 0, far], {name: tensor.to(model.device) for name, tensor in batch.items()}


def _beyond_pretraining(model: PreTrainedModel) -> int:
    """A position beyond those a backbone was made for; 0 where a table of positions ends there.

    It is the start of a chunk where attention works in chunks: stock models count chunks from the beginning of the row.
    """
    if usable_positions(model) is not None:
        return 0
    config = model.config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) or {}
    rules = [rotary, *(rule for rule in rotary.values() if isinstance(rule, dict))]
    made_for = [rule.get("original_max_position_embeddings") for rule in rules]
    longest = max(filter(None, (*made_for, getattr(config, "max_position_embeddings", None))), default=0)
    chunk = getattr(config, "attention_chunk_size", None) or 1
    return -(-longest // chunk) * chunk


def _dtype(model: PreTrainedModel) -> torch.dtype:
    """Dtype of the hidden states: that of the embeddings."""
    return next(model.get_input_embeddings().parameters()).dtype


def _last_state(model: PreTrainedModel, sequence: list[int], start: int) -> Tensor:
    ids = torch.tensor([sequence], device=model.device)
    where = {"position_ids": torch.arange(start, start + len(sequence), device=model.device)[None]} if start else {}
    return model.base_model(input_ids=ids, use_cache=False, **where).last_hidden_state[0, -1]


MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "subtree_end", "leaves")


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a training batch that the forward pass takes: a forest's tensors, or a padded batch's."""
    return {name: batch[name] for name in MODEL_INPUTS if name in batch}
