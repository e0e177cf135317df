"""How the model of a manifest reads plain text: the one place that decides it, for every command."""

from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.preferences.text_as import TextAs, TrainedText, kind_of_row, text_as_of
from qlora_rm.preferences.tokenization import Tokenization


def trained_text(manifest: Manifest | None, tokenization: Tokenization) -> TrainedText:
    """The reading that training's rows ask for; a model whose rows are not known scores turns where it has a template."""
    kinds = trained_kinds(manifest) if manifest else set()
    text_as: TextAs = "turns" if tokenization.tokenizer.chat_template else "text"
    if kinds:
        recorded = manifest.contract.text_as if manifest else None
        text_as = text_as_of(kinds) if recorded is None else "turns" if recorded == "turns" else "text"
    return TrainedText(tokenization, text_as, kinds)


def trained_kinds(manifest: Manifest) -> set[str]:
    """The kinds of the training rows; of a file that does not record them, those of the golden items."""
    recorded = manifest.contract.trained_on
    return {kind_of_row(item.candidates()) for item in manifest.golden} if recorded is None else set(recorded)


def scores_turns(manifest: Manifest) -> bool:
    """Whether a conversation is what the model is to be given first of all."""
    return "turns" in (trained_kinds(manifest) or ({"turns"} if manifest.contract.chat_template_sha256 else set()))
