"""Turn a prompt and a response into token ids as each consumer does, reproduced from its source.

Each function returns the ids of an item's responses, or None where the consumer cannot take that item. Reasons are tools that
it does not pass on, or content that spells a special token, at which a policy would have stopped. The golden ids are those of
training. Where a consumer's ids differ, its scores differ.
"""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from qlora_rm.artifacts.golden import GoldenItem

Feed = Callable[[PreTrainedTokenizerBase, GoldenItem], list[list[int]] | None]


def as_rendered(tokenizer: PreTrainedTokenizerBase, item: GoldenItem) -> list[list[int]] | None:
    """Encode as TRL's online trainers do: turns through the model's own template, and plain text as prompt + completion.

    Plain text gets neither bos nor eos, and no special tokens are added to either.
    """
    if _has_more_than_turns(item):
        return None
    texts = rendered(tokenizer, item) if is_turns(item) else [f"{item.prompt}{text}" for text in item.responses]
    return encode(tokenizer, texts, add_special_tokens=False)


def as_text(tokenizer: PreTrainedTokenizerBase, item: GoldenItem) -> list[list[int]] | None:
    """Encode as RewardBench does: turns through the template, then tokenized as any text, with special tokens added."""
    if _has_more_than_turns(item) or not is_turns(item) or not _alternate(item):
        return None
    return encode(tokenizer, rendered(tokenizer, item), add_special_tokens=True)


def without_bos(tokenizer: PreTrainedTokenizerBase, item: GoldenItem) -> list[list[int]] | None:
    """Encode as verl's reward loop does: turns through the template without a leading bos, sent as text to an engine.

    The engine adds special tokens.
    """
    if _has_more_than_turns(item) or not is_turns(item) or _spells_special(tokenizer, item.responses):
        return None
    bos = tokenizer.bos_token
    texts = [text.removeprefix(bos) if bos else text for text in rendered(tokenizer, item)]
    return encode(tokenizer, texts, add_special_tokens=True)


def from_policy(tokenizer: PreTrainedTokenizerBase, item: GoldenItem) -> list[list[int]] | None:
    """Encode as trainers do that pass on a policy's token ids: prompt, answer, and the eos at which the policy stopped.

    The prompt ends with the template's generation prompt. A plain text prompt gets special tokens instead.
    """
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
    """Return the text to give to a consumer of finished text: rendered turns, or plain text with its eos.

    Rendered turns are to be tokenized without adding special tokens, plain text with them.
    """
    if is_turns(item):
        return rendered(tokenizer, item)
    eos = tokenizer.eos_token or ""
    return [f"{item.prompt}{text}{'' if text.endswith(eos) else eos}" for text in item.responses]


def rendered(tokenizer: PreTrainedTokenizerBase, item: GoldenItem) -> list[str]:
    """Render the template's text for each response of an item of turns."""
    return [
        str(
            tokenizer.apply_chat_template(
                [*item.prompt, *turns], tools=item.tools, tokenize=False, **item.template_kwargs
            )
        )
        for turns in item.responses
    ]


def is_turns(item: GoldenItem) -> bool:
    """Return whether an item is a conversation, not plain text or token ids."""
    return isinstance(item.responses[0], list) and all(isinstance(turn, dict) for turn in item.responses[0])


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool) -> list[list[int]]:
    """Return token ids of texts."""
    encoded: Any = tokenizer(texts, add_special_tokens=add_special_tokens, verbose=False)
    return encoded["input_ids"]


def _has_more_than_turns(item: GoldenItem) -> bool:
    return bool(item.tools or item.template_kwargs)


def _alternate(item: GoldenItem) -> bool:
    """Return whether user and assistant alternate. RewardBench supports nothing else."""
    roles = [turn.get("role") for turn in [*item.prompt, *item.responses[0]]]
    return roles == (["user", "assistant"] * len(roles))[: len(roles)]


def _spells_special(tokenizer: PreTrainedTokenizerBase, responses: list[Any]) -> bool:
    text = str(responses)
    return any(token and token in text for token in tokenizer.all_special_tokens)
