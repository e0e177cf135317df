"""How a manifest's model reads plain text; all commands use this decision."""

from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.preferences.text_as import TrainedText, kind_of_row
from qlora_rm.preferences.tokenization import Tokenization


def trained_text(manifest: Manifest | None, tokenization: Tokenization) -> TrainedText:
    """Return how the contract reads text.

    Files of earlier versions do not record this: text becomes turns if a golden item is turns, as these versions served
    it. Without golden items, text becomes turns if the tokenizer has a template.
    """
    kinds = trained_kinds(manifest) if manifest else set()
    recorded = manifest.contract.text_as if manifest else None
    if recorded is not None:
        as_turns = recorded == "turns"
    else:
        as_turns = "turns" in kinds if kinds else bool(tokenization.tokenizer.chat_template)
    return TrainedText(tokenization, "turns" if as_turns else "text", kinds)


def trained_kinds(manifest: Manifest) -> set[str]:
    """The kinds of the training rows; for a file that does not record them, those of the golden items."""
    recorded = manifest.contract.trained_on
    return {kind_of_row(item.candidates()) for item in manifest.golden} if recorded is None else set(recorded)


def scores_turns(manifest: Manifest) -> bool:
    """Whether the model is primarily meant to score conversations."""
    return "turns" in (trained_kinds(manifest) or ({"turns"} if manifest.contract.chat_template_sha256 else set()))
