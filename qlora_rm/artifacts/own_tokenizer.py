"""The tokenizer saved with a model, and the tokenization that its manifest's contract requires."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_rm.artifacts.manifest import Manifest, has_trained_template
from qlora_rm.artifacts.training_date import fix_to_training
from qlora_rm.backbone.plausible import require_plausible_config
from qlora_rm.errors import UserError, first_line
from qlora_rm.preferences.bounded_templates import bound_templates
from qlora_rm.preferences.tokenization import Tokenization


def read_tokenizer(folder: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved with a model, unchanged: its pad token is part of the contract."""
    if not any((Path(folder) / name).exists() for name in ("tokenizer_config.json", "tokenizer.json")):
        raise UserError(f"{folder} has no tokenizer: copy the tokenizer files of the training run's output into it.")
    bound_templates()
    require_plausible_config(folder)  # transformers reads it to choose the tokenizer's class
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise UserError(f"The tokenizer in {folder} could not be loaded: {first_line(error)}") from error
    tokenizer.padding_side = "right"
    fix_to_training(tokenizer, folder)
    return tokenizer


def require_trained_template(folder: str, manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a chat template that the model was not trained with, so that it is never rendered."""
    if not has_trained_template(tokenizer, manifest.contract):
        raise UserError(
            f"The chat template in {folder} is not the one the model was trained with. Restore the tokenizer files of the "
            "training run's output. To score with it all the same, pass --skip_checks."
        )


def tokenization_of(manifest: Manifest, tokenizer: PreTrainedTokenizerBase) -> Tokenization:
    """Return the tokenization that the manifest's contract requires."""
    contract = manifest.contract
    if tokenizer.pad_token_id != contract.pad_token_id:
        raise UserError(
            f"The tokenizer pads with id {tokenizer.pad_token_id}, the model was trained with {contract.pad_token_id}: "
            "scores would be read at other tokens. Restore the tokenizer files of the training run's output."
        )
    return Tokenization(tokenizer, contract.max_length, contract.over_long)
