"""Loading a tokenizer, and choosing a pad token that can never be a scored token."""

import re

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_rm.backbone.paths import require_folder
from qlora_rm.console import say
from qlora_rm.errors import UserError, first_line
from qlora_rm.shipped import here_or_shipped

# Names under which vocabularies reserve tokens nobody writes, most pad-like first.
RESERVED = re.compile(
    r"<\|?pad\|?>|\[PAD\]|<\|(finetune_right_|vision_|video_|image_)?pad(_id)?\|>|<\|?reserved_(special_token_)?\d+\|?>|"
    r"\[control_\d+\]|<\|?(unused|extra_id_|dummy_|placeholder)_?\d*\|?>|<\|endofprompt\|>",
    re.IGNORECASE,
)


def load_tokenizer(
    name: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template_path: str | None = None,
    eos_token: str | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id, with a pad token that differs from eos (see `choose_pad_token`).

    Arguments:
        chat_template_path: a Jinja file, or a folder or hub id whose tokenizer's template is taken.
        eos_token: an existing token to use as end of sequence instead of the tokenizer's own.
    """
    require_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"No tokenizer could be loaded from {name}: {first_line(error)}") from error
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise UserError(f"--eos_token {eos_token!r} is not in the vocabulary of the tokenizer {name}.")
        tokenizer.eos_token = eos_token
    if chat_template_path is not None:
        tokenizer.chat_template = _read_template(chat_template_path, trust_remote_code)
    tokenizer.padding_side = "right"
    choose_pad_token(tokenizer)
    return tokenizer


def choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Set a pad token that no sequence contains.

    Readers score the rightmost token that differs from pad, so a pad that is eos moves the scored token. In order:
    the tokenizer's own pad unless it is eos; a reserved token of the vocabulary; the unknown token of a vocabulary
    that falls back to bytes and so never emits it; a new token `<|pad|>`.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    was = "eos" if tokenizer.pad_token_id is not None else "unset"
    special = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token}
    reserved = sorted(t for t in tokenizer.get_vocab() if RESERVED.fullmatch(t) and t not in special)
    if reserved:
        tokenizer.pad_token = min(reserved, key=lambda t: ("pad" not in t.lower(), tokenizer.get_vocab()[t]))
    elif tokenizer.unk_token is not None and _falls_back_to_bytes(tokenizer):
        tokenizer.pad_token = tokenizer.unk_token
    else:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    say(
        f"pad token: {tokenizer.pad_token!r} (id {tokenizer.pad_token_id}); it was {was}, and pad must never be a scored token"
    )


def _falls_back_to_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return bool(backend is not None and getattr(backend.model, "byte_fallback", False))


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
