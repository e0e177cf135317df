"""Golden items: texts, token ids and scores stored with a model, and how far a copy's scores may move."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from torch import Tensor

from qlora_rm.preferences.comparison import Candidates, Content
from qlora_rm.preferences.row_errors import RowFault
from qlora_rm.preferences.tokenization import Tokenization

Score = Callable[[list[list[int]]], Tensor]
"""From S token sequences to their scores, float [S]."""


@dataclass(frozen=True)
class GoldenItem:
    """One prompt, its responses, the token ids they must become, and their scores after training.

    Attributes:
        prompt: text or turns.
        responses: text or turns each.
        token_ids: of each response with its prompt.
        scores: one for each response.
        tools: the tools given to the chat template; null: none.
        template_kwargs: any further arguments of the chat template.
    """

    prompt: Any
    responses: list[Any]
    token_ids: list[list[int]]
    scores: list[float]
    tools: list[Any] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def candidates(self) -> Candidates:
        return Candidates(self.prompt, tuple(self.responses), self.tools, self.template_kwargs)


@dataclass(frozen=True)
class Tolerance:
    """How far a score may differ from the golden one, and which pairs may change their order.

    Attributes:
        absolute, relative: a score may move by the larger of `absolute` and `relative` times its absolute value.
        flip_margin: pairs of one prompt further apart than this must keep their order.
        typical: bound on the root mean square of all differences; None: only each difference is bounded.
    """

    absolute: float
    relative: float
    flip_margin: float
    typical: float | None = None

    def of(self, score: float) -> float:
        return max(self.absolute, self.relative * abs(score))

    def __str__(self) -> str:
        typical = "" if self.typical is None else f", {self.typical:.2g} in root mean square"
        return f"max({self.absolute:.2g}, {self.relative:.2%}){typical}, order kept above a margin of {self.flip_margin:.2g}"


SAFE_LENGTH = 256
"""Tokens that any backbone accepts."""

ROOM_FOR_THE_REST = 128
"""Tokens that the long item's prompt leaves for its response, the template and special tokens."""

SAME = Tolerance(absolute=1e-4, relative=1e-4, flip_margin=2e-4)
"""fp32 throughout: only the order of summation differs. The narrowest tolerance."""

ROUNDED = Tolerance(absolute=0.1, relative=0.02, flip_margin=0.2)
"""Weights or arithmetic in 16 or 8 bit on either side, if the model's noise was not measured (`noise.tolerance`)."""


@dataclass(frozen=True)
class Drift:
    """How scores differ from the golden ones.

    Attributes:
        largest, typical: largest absolute difference, and the root mean square; NaN if a score is not finite.
        outside: how many of the `scores` scores moved further than the tolerance allows.
        flips: how many of the `pairs` pairs with a golden margin above `flip_margin` changed their order.
        scattered: whether the root mean square exceeds the tolerance.
    """

    largest: float
    scores: int
    outside: int
    pairs: int
    flips: int
    typical: float = 0.0
    scattered: bool = False

    @property
    def ok(self) -> bool:
        return self.outside == 0 and self.flips == 0 and not self.scattered

    def __str__(self) -> str:
        return (
            f"largest difference {self.largest:.2g}, root mean square {self.typical:.2g}, {self.outside} of {self.scores} scores outside the tolerance, "
            f"{self.flips} of {self.pairs} clear pairs in another order"
        )


def scores_of(items: Sequence[GoldenItem], score: Score) -> list[list[float]]:
    """New scores of the items' token ids, in the shape of their golden scores."""
    scores = iter(score([ids for item in items for ids in item.token_ids]).tolist())
    return [[next(scores) for _ in item.token_ids] for item in items]


def drift(items: Sequence[GoldenItem], scores: Sequence[Sequence[float]], allowed: Tolerance) -> Drift:
    """Compare `scores`, one list per item, with the golden ones."""
    moved = [
        (golden, now)
        for item, new in zip(items, scores, strict=True)
        for golden, now in zip(item.scores, new, strict=True)
    ]
    differences = [abs(now - golden) for golden, now in moved]
    clear = [
        (golden, now)
        for item, new in zip(items, scores, strict=True)
        for golden, now in zip(_margins(item.scores), _margins(new), strict=True)
        if abs(golden) > allowed.flip_margin
    ]
    finite = all(map(math.isfinite, differences))
    typical = math.sqrt(sum(d * d for d in differences) / max(1, len(differences))) if finite else math.nan
    return Drift(
        largest=max(differences, default=0.0) if finite else math.nan,
        scores=len(moved),
        outside=sum(not abs(now - golden) <= allowed.of(golden) for golden, now in moved),
        pairs=len(clear),
        flips=sum(not golden * now > 0 for golden, now in clear),
        typical=typical,
        scattered=allowed.typical is not None and not typical <= allowed.typical,
    )


def _margins(scores: Sequence[float]) -> list[float]:
    return [a - b for a, b in combinations(scores, 2)]


def make_golden(candidates: Iterable[Candidates], tokenization: Tokenization, score: Score) -> list[GoldenItem]:
    """Make golden items of `candidates` (a held-out sample) and `awkward` ones, without those that cannot be tokenized.

    Arguments:
        score: the trained model, computing as in training; called once.
    """
    sample = list(candidates)
    as_turns = bool(tokenization.tokenizer.chat_template) and (
        not sample or any(_is_turns(response) for item in sample for response in item.responses)
    )
    tokenized = _tokenized(sample, tokenization)
    seen = max((len(ids) for _, sequences in tokenized for ids in sequences), default=0)
    tokenized += _tokenized(awkward(tokenization, as_turns, longest=max(seen, SAFE_LENGTH)), tokenization)
    flat = score([ids for _, sequences in tokenized for ids in sequences]).tolist() if tokenized else []
    scores = iter(flat)
    return [
        GoldenItem(
            prompt=item.prompt,
            responses=list(item.responses),
            token_ids=sequences,
            scores=[next(scores) for _ in sequences],
            tools=item.tools,
            template_kwargs=item.template_kwargs,
        )
        for item, sequences in tokenized
    ]


def _tokenized(items: Sequence[Candidates], tokenization: Tokenization) -> list[tuple[Candidates, list[list[int]]]]:
    results = zip(items, tokenization.tokenize_each(items), strict=True)
    return [(item, result.tokens.sequences) for item, result in results if not isinstance(result, RowFault)]


def awkward(tokenization: Tokenization, as_turns: bool, longest: int = SAFE_LENGTH) -> list[Candidates]:
    """Items that have exposed errors in consumers of reward models.

    They are an empty answer, unicode, length, special tokens, several turns, and two answers that nearly tie.

    Arguments:
        longest: a length in tokens that the model certainly accepts. The long item is shorter, since exceeding the
            model's positions is an error. If the over-long rule cuts at or below this length, the item is cut.
    """
    eos = tokenization.tokenizer.eos_token or ""
    long = "Tell me again. "
    limit = min(longest, tokenization.max_length or longest)
    if limit == tokenization.max_length and tokenization.over_long == "truncate_prompt":
        repeats = limit
    else:
        per_repeat = len(tokenization.tokenizer(long, add_special_tokens=False)["input_ids"])
        repeats = max(1, (limit - ROOM_FOR_THE_REST) // per_repeat)
    texts = [
        ("Say nothing.", ("", "I will not.")),
        ("Grüße auf Ελληνικά, 日本語 und mit 🙂?", ("Γειά σου · こんにちは 🙂👩‍👩‍👧", "Nein\u00a0— \u202bלא\u202c.")),
        (long * repeats, ("Once more: the sea is salt.", "No.")),
        (f"What does {eos} mean?", (f"{eos} ends a text; {eos} again.", "Nothing.")),
        ("Is it raining?", ("Yes, it is raining.", "Yes, it is raining!")),
    ]
    talk = ["Good morning.", "Good morning to you.", "And now?"]
    if not as_turns:
        texts.append(("\n\n".join(talk), ("\n\nNow we begin.", "\n\nLater.")))
        return [Candidates(f"{prompt}\n", responses) for prompt, responses in texts]
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), talk, strict=True)]
    talked = Candidates(turns, (_turn("assistant", "Now we begin."), _turn("assistant", "Later.")))
    return [
        *(Candidates(_turn("user", p), tuple(_turn("assistant", r) for r in responses)) for p, responses in texts),
        talked,
    ]


def _turn(role: str, content: str) -> Content:
    return [{"role": role, "content": content}]


def _is_turns(content: Content) -> bool:
    return isinstance(content, list) and bool(content) and isinstance(content[0], dict)
