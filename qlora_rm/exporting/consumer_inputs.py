"""How readers turn a prompt and a response into token ids, re-enacted from their sources.

Each function gives the ids of an item's responses, or None where the reader cannot be fed that item: tools it does not
hand on, or content that spells a special token, at which a policy would have stopped. The golden ids themselves are
what the model was trained on; where a reader's ids differ, its scores do.
"""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_rm.artifacts.golden import GoldenItem

Feed = Callable[[PreTrainedTokenizerBase, GoldenItem], list[list[int]] | None]


def as_rendered(tokenizer: PreTrainedTokenizerBase, item: GoldenItem) -> list[list[int]] | None:
    """TRL's online trainers: turns through the model's own template, plain text as prompt + completion with neither
    bos nor eos; no special tokens added to either."""
    if _has_more_than_turns(item):
        return None
    texts = rendered(tokenizer, item) if is_turns(item) else [f"{item.prompt}{text}" for text in item.responses]
    return encode(tokenizer, texts, add_special_tokens=False)


def as_text(tokenizer: PreTrainedTokenizerBase, item: GoldenItem) -> list[list[int]] | None:
    """RewardBench: turns through the template, then tokenized as any text, special tokens added."""
    if _has_more_than_turns(item) or not is_turns(item) or not _alternate(item):
        return None
    return encode(tokenizer, rendered(tokenizer, item), add_special_tokens=True)


def without_bos(tokenizer: PreTrainedTokenizerBase, item: GoldenItem) -> list[list[int]] | None:
    """verl's reward loop: turns through the template, a leading bos taken off, then sent as text to an engine that
    adds special tokens."""
    if _has_more_than_turns(item) or not is_turns(item) or _spells_special(tokenizer, item.responses):
        return None
    bos = tokenizer.bos_token
    texts = [text.removeprefix(bos) if bos else text for text in rendered(tokenizer, item)]
    return encode(tokenizer, texts, add_special_tokens=True)


def from_policy(tokenizer: PreTrainedTokenizerBase, item: GoldenItem) -> list[list[int]] | None:
    """Trainers that hand on a policy's token ids: the prompt with the template's invitation to answer (plain text with
    special tokens), the answer, and the eos at which the policy stopped."""
    if _spells_special(tokenizer, item.responses) or tokenizer.eos_token_id is None:
        return None
    sequences = []
    for response in item.responses:
        if is_turns(item):
            *before, answer = response
            if answer.get("role") != "assistant" or not isinstance(answer.get("content"), str):
                return None
            prompt = tokenizer.apply_chat_template(
                [*item.prompt, *before],
                tools=item.tools,
                tokenize=False,
                add_generation_prompt=True,
                **item.template_kwargs,
            )
            answered = answer["content"]
        else:
            prompt, answered = item.prompt, response
        before_it, ids = (
            encode(tokenizer, [str(prompt)], add_special_tokens=not is_turns(item)),
            encode(tokenizer, [answered], add_special_tokens=False),
        )
        sequences.append([*before_it[0], *ids[0], tokenizer.eos_token_id])
    return sequences


def texts_of(tokenizer: PreTrainedTokenizerBase, item: GoldenItem) -> list[str]:
    """What a reader of finished text is to be given: rendered turns (to be tokenized without adding special tokens), or
    plain text with its eos (to be tokenized with them)."""
    if is_turns(item):
        return rendered(tokenizer, item)
    eos = tokenizer.eos_token or ""
    return [f"{item.prompt}{text}{'' if text.endswith(eos) else eos}" for text in item.responses]


def rendered(tokenizer: PreTrainedTokenizerBase, item: GoldenItem) -> list[str]:
    """The template's text for each response of an item of turns."""
    return [
        str(
            tokenizer.apply_chat_template(
                [*item.prompt, *turns], tools=item.tools, tokenize=False, **item.template_kwargs
            )
        )
        for turns in item.responses
    ]


def is_turns(item: GoldenItem) -> bool:
    """Whether an item is a conversation, not plain text or token ids."""
    return isinstance(item.responses[0], list) and all(isinstance(turn, dict) for turn in item.responses[0])


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    """Token ids of texts."""
    encoded: Any = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)
    return encoded["input_ids"]


def _has_more_than_turns(item: GoldenItem) -> bool:
    return bool(item.tools or item.template_kwargs)


def _alternate(item: GoldenItem) -> bool:
    """User and assistant in turn: all that RewardBench can say."""
    roles = [turn.get("role") for turn in [*item.prompt, *item.responses[0]]]
    return roles == (["user", "assistant"] * len(roles))[: len(roles)]


def _spells_special(tokenizer: PreTrainedTokenizerBase, responses: list[Any]) -> bool:
    text = str(responses)
    return any(token and token in text for token in tokenizer.all_special_tokens)
