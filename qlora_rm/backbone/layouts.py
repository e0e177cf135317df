"""Where a loaded model reads a sequence's score, and which batch layouts must not change that score."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from qlora_rm.backbone.head import head_modules, is_in_head
from qlora_rm.backbone.packed import sharing_model
from qlora_rm.backbone.positions import TOKENS, inner_model, positions_shift, probe_inputs
from qlora_rm.backbone.scoring import Layout
from qlora_rm.backbone.zero3_gather import gathered_at_work

ScorePosition = Literal[
    "first token", "last token that is not pad", "all tokens that are not pad", "model's own choice"
]
SCORE_POSITIONS: tuple[ScorePosition, ...] = get_args(ScorePosition)
FIRST, LAST, ALL, OWN = SCORE_POSITIONS


def layouts_of(model: nn.Module) -> tuple[Layout, ...]:
    """The layouts in which `model` must give a sequence the score that it has alone.

    Right padding is always required. Left padding puts padding at the start of a row. It is required where the score is
    read at the last token or at all tokens. Exceptions are models that number positions by their place in the row, and
    models with a decoder, which sees its copy of the row without a mask. A forest is required where the model takes
    one.

    The requirement follows from where the model reads, not from how well it does: a model that reads the last token and
    lets padding reach it must still give equal scores, and fails.
    """
    left = score_position(model) in (LAST, ALL) and not positions_shift(model)
    left = left and not getattr(inner_model(model).config, "is_encoder_decoder", False)
    return ("right", *(("left",) if left else ()), *(("forest",) if sharing_model(model) is not None else ()))


def score_position(model: nn.Module) -> ScorePosition:
    """The tokens whose hidden states determine the score: those with a gradient in a short, right-padded sequence.

    Random head weights replace the model's own, which may be all zeros in a new head.
    """
    inner = inner_model(model)
    with gathered_at_work(inner):
        gradient = _gradient(inner)
    if gradient is None:
        return OWN
    read = gradient[0].abs().sum(-1).nonzero().flatten().tolist()
    if read == [0]:
        return FIRST
    if read == [TOKENS - 1]:
        return LAST
    return ALL if len(read) >= TOKENS else OWN


def _gradient(model: PreTrainedModel) -> Tensor | None:
    """Gradient of the score by the backbone's last hidden states [1, L, H]; None where it cannot be computed."""
    states: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: object) -> None:
        hidden = getattr(output, "last_hidden_state", None)
        states.append(hidden if hidden is not None else output[0])  # type: ignore[index]

    head = head_modules(model)
    draw = torch.Generator().manual_seed(0)
    heads = {
        name: torch.randn(p.shape, generator=draw).to(p.device, p.dtype)
        for name, p in model.named_parameters()
        if is_in_head(name, head)
    }
    hooks = [
        model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_(True)),
        model.base_model.register_forward_hook(keep),
    ]
    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            logits = functional_call(model, heads, (), probe_inputs(model, right=2)).logits
            return torch.autograd.grad(logits.float().sum(), states[-1], allow_unused=True)[0]
    except Exception:  # a model's own code may raise anything on a short sequence
        return None
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
