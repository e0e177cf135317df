"""The pad token: one that no text contains, since consumers score the last token that differs from it."""

import difflib
import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_rm.console import say
from qlora_rm.errors import UserError

# Names under which vocabularies reserve unused tokens, most pad-like first.
RESERVED = re.compile(
    r"<\|?pad(ding)?\|?>|\[PAD\]|<\|(finetune_right_|vision_|video_|image_)?pad(_id)?\|>|"
    r"<\|?reserved_(special_token_)?\d+\|?>|\[control_\d+\]|<\|?(unused|extra_id_|dummy_|placeholder)_?\d*\|?>|"
    r"<\|endofprompt\|>",
    re.IGNORECASE,
)

MARKED = re.compile(r"[<\[{].*\w.*[>\]}]", re.DOTALL)
"""Pattern of tokens that are not text: <pad>, [PAD], <|padding|>."""

ROLES = {
    "bos_token": "its bos token",
    "eos_token": "its eos token",
    "cls_token": "its cls token",
    "sep_token": "its sep token",
}

UNSEEN = "\ue001 \U000f1234"
"""Private-use characters, for which no vocabulary has a token."""

CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
    [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
        {"role": "assistant", "content": "e"},
    ],
]


def choose_pad_token(tokenizer: PreTrainedTokenizerBase, asked: str | None = None, trained: int | None = None) -> None:
    """Set a pad token that no sequence contains, and log it where it is not the tokenizer's own.

    In order: the token asked for; the pad token that the model was trained with; the tokenizer's own, unless texts
    contain it; a reserved token of the vocabulary; the unknown token of a tokenizer that never emits it; a new token.

    Arguments:
        asked: `--pad_token`.
        trained: id of the pad token that the model was trained with, when training continues.

    Raises:
        UserError: the token asked for is not in the vocabulary, or texts contain it.
    """
    if asked is not None:
        _require_usable(tokenizer, asked)
        tokenizer.pad_token = asked
        return
    if trained is not None and trained != tokenizer.eos_token_id and trained <= len(tokenizer):
        if trained == len(tokenizer):
            _add_one(tokenizer)
        else:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(trained)
        return
    own = tokenizer.pad_token
    reason = None if own is None else why_in_texts(tokenizer, own)
    if own is not None and reason is None:
        return
    _set_another(tokenizer)
    was = "has no pad token" if own is None else f"pads with {own!r}, which texts contain ({reason})"
    say(f"pad token: the tokenizer {was}; using {tokenizer.pad_token!r} (id {tokenizer.pad_token_id}), which none does")


def why_in_texts(tokenizer: PreTrainedTokenizerBase, token: str) -> str | None:
    """Return the reason why texts contain a token of the vocabulary; None where they do not."""
    for name, reason in ROLES.items():
        if token == getattr(tokenizer, name, None):
            return reason
    index = tokenizer.convert_tokens_to_ids(token)
    if token == tokenizer.unk_token and index in _ids(tokenizer, UNSEEN):
        return "its token for unknown characters"
    if index in _ids(tokenizer, "a", add_special_tokens=True):
        return "it stands in every text"
    if token != tokenizer.unk_token and not MARKED.fullmatch(token):
        return "it is ordinary text"
    if any(token in source for source in _templates(tokenizer)) or index in set(_written(tokenizer)):
        return "the chat template writes it"
    return None


def _require_usable(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        near = difflib.get_close_matches(token, [name for name in vocabulary if MARKED.fullmatch(name)], 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(
            f"--pad_token {token!r} is no token of the vocabulary.{hint} Leave the option out to have one chosen or added."
        )
    if reason := why_in_texts(tokenizer, token):
        raise UserError(
            f"--pad_token {token!r}: texts contain it ({reason}), and the score is read at the last token that is not pad. "
            "Choose a token that no text contains, or leave the option out."
        )


def _set_another(tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = tokenizer.get_vocab()
    reserved = sorted(
        (name for name in vocabulary if RESERVED.fullmatch(name)),
        key=lambda name: ("pad" not in name.lower(), vocabulary[name]),
    )
    free = next((name for name in reserved if why_in_texts(tokenizer, name) is None), None)
    unknown = tokenizer.unk_token
    if free is not None:
        tokenizer.pad_token = free
    elif unknown is not None and why_in_texts(tokenizer, unknown) is None:
        tokenizer.pad_token = unknown
    else:
        _add_one(tokenizer)


def _add_one(tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = tokenizer.get_vocab()
    names = ("<|pad|>", *(f"<|pad_{i}|>" for i in range(len(vocabulary))))
    tokenizer.add_special_tokens({"pad_token": next(name for name in names if name not in vocabulary)})


def _templates(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    template: Any = tokenizer.chat_template
    if not template:
        return []
    return list(template.values()) if isinstance(template, dict) else [template]


def _written(tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    """Ids that the chat template writes around small conversations, including tokens whose names it concatenates."""
    if not tokenizer.chat_template:
        return
    for turns in CONVERSATIONS:
        for more in (False, True):
            try:
                text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=more)
            except Exception:  # a template is a program: it may refuse turns it was not written for
                continue
            yield from _ids(tokenizer, str(text))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]
