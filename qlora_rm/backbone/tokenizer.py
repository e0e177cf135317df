"""Load a tokenizer, with its chat template and a pad token that can never be a scored token."""

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_rm.backbone.pad_token import choose_pad_token
from qlora_rm.backbone.paths import require_folder
from qlora_rm.backbone.plausible import require_plausible_config
from qlora_rm.errors import UserError, first_line
from qlora_rm.preferences.bounded_templates import bound_templates
from qlora_rm.shipped import here_or_shipped


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template_path: str | None = None,
    eos_token: str | None = None,
    pad_token: str | None = None,
    trained_pad: int | None = None,
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub id, with a pad token that no text contains (see `choose_pad_token`).

    Arguments:
        chat_template_path: a Jinja file, or a folder or hub id whose tokenizer's template is taken.
        eos_token: an existing token to use as end of sequence instead of the tokenizer's own.
        pad_token: an existing token to pad with.
        trained_pad: id of the pad token that the model was trained with, when training continues.
    """
    require_folder(name)
    bound_templates()
    require_plausible_config(name, revision)  # transformers reads it to choose the tokenizer's class
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise UserError(f"No tokenizer could be loaded from {name}: {first_line(error)}") from error
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise UserError(f"--eos_token {eos_token!r} is not in the vocabulary of the tokenizer {name}.")
        tokenizer.eos_token = eos_token
    if chat_template_path is not None:
        tokenizer.chat_template = _read_template(chat_template_path, trust_remote_code)
    tokenizer.padding_side = "right"
    choose_pad_token(tokenizer, pad_token, trained_pad)
    return tokenizer


def _read_template(path: str, trust_remote_code: bool) -> str:
    if path.endswith((".jinja", ".j2")):
        try:
            return here_or_shipped(path).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"--chat_template_path {path}: {error.strerror}.") from error
    require_folder(path)
    template = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code).chat_template
    if template is None:
        raise UserError(f"--chat_template_path {path}: the tokenizer there has no chat template.")
    return template
