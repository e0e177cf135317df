"""Prove a loaded model before use: the golden texts give the golden ids and the golden scores."""

from dataclasses import dataclass

from qlora_rm.artifacts.allowed import allowed_drift
from qlora_rm.artifacts.golden import Drift, GoldenItem, Tolerance, drift, scores_of
from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import FILE_NAME
from qlora_rm.errors import UserError
from qlora_rm.preferences.comparison import Candidates
from qlora_rm.preferences.decoded import DecodedText
from qlora_rm.preferences.row_errors import RowFault
from qlora_rm.preferences.values import kind_of


@dataclass(frozen=True)
class Proof:
    """Drift of the golden scores, number of items, and the allowed tolerance."""

    drift: Drift
    items: int
    allowed: Tolerance


def prove(model: RewardModel, folder: str) -> Proof:
    """Score the golden items as any text is scored.

    Raises:
        UserError: there are none, their texts become other token ids, or their scores have moved.
    """
    if model.manifest is None or not model.manifest.golden:
        raise UserError(
            f"{folder} has no golden scores in a {FILE_NAME}: nothing proves that it scores as it was trained."
        )
    items = model.manifest.expected()
    for place, (item, result) in enumerate(
        zip(items, model.tokenization.tokenize_each([item.candidates() for item in items]), strict=True), start=1
    ):
        if isinstance(result, RowFault) or result.tokens.sequences != item.token_ids:
            raise UserError(f"The text of golden item {place} no longer becomes its token ids. {_see(folder)}")
    allowed = allowed_drift(model.manifest, model.computes_in)
    moved = drift(items, scores_of(items, model.score_token_ids), allowed)
    if not moved.ok:
        raise UserError(f"The golden scores have moved: {moved}; allowed {allowed}. {_see(folder)}")
    return Proof(moved, len(items), allowed)


def prove_decoded(model: RewardModel, decoded: DecodedText, folder: str) -> None:
    """Check that the golden conversations (or plain texts), each rendered as one text, still give their token ids.

    Raises:
        UserError: one does not.
    """
    golden = model.manifest.golden if model.manifest else []
    for place, item in enumerate(golden, start=1):
        if not is_of_kind(item, decoded.as_turns):
            continue
        # one response at a time: each text is truncated on its own
        alone = [Candidates(item.prompt, (r,), item.tools, item.template_kwargs) for r in item.responses]
        written = [decoded.candidates(text) for text in model.tokenization.texts(item.candidates())]
        if model.tokenization.tokenize(alone) != model.tokenization.tokenize(written):
            raise UserError(
                f"Golden item {place}, written out with its special tokens, becomes other ids. {_see(folder)}"
            )


def is_of_kind(item: GoldenItem, as_turns: bool) -> bool:
    """Whether an item is a conversation; with `as_turns` False, whether it is plain text (token ids have no text)."""
    return kind_of(item.responses[0]) == ("turns" if as_turns else "text")


def _see(folder: str) -> str:
    return f"`qlora-rm verify {folder}` tells what has changed."
