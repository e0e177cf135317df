"""Verify that a running server gives the scores a model was trained to give: every check with its result."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from qlora_rm.artifacts.allowed import allowed_between_layouts, allowed_drift
from qlora_rm.artifacts.as_written import require_as_written
from qlora_rm.artifacts.golden import GoldenItem, Tolerance, drift
from qlora_rm.artifacts.manifest import Manifest, Reward
from qlora_rm.artifacts.own_tokenizer import read_tokenizer, tokenization_of
from qlora_rm.artifacts.trained_text import trained_text
from qlora_rm.backbone.precision import DTYPES
from qlora_rm.errors import UserError
from qlora_rm.preferences.tokenization import CHARACTERS_PER_TOKEN, Tokenization
from qlora_rm.verification.bounded_client import NoAnswer
from qlora_rm.verification.checks import Check, check_golden_ids, check_tokenizer
from qlora_rm.verification.client import Endpoint, Protocol, Question, connect
from qlora_rm.verification.golden_proof import is_of_kind

SIGMOID = 0.02
"""Largest distance between the sigmoid of a score computed in 16 bit and that of the golden score."""


def verify_endpoint(
    folder: str,
    url: str,
    *,
    protocol: Protocol | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> list[Check]:
    """Check the server at `url` against the manifest and the tokenizer in `folder`.

    Arguments:
        protocol: default: named by the path of `url`, or found by requests.

    Raises:
        UserError: `folder` has no manifest with golden items or no tokenizer, or `url` is not a URL.
    """
    manifest = Manifest.load(folder)
    if trust_remote_code:  # code runs only if it is the code that the manifest lists
        require_as_written(folder, manifest, "To check it all the same, leave out --trust_remote_code.")
    tokenizer = read_tokenizer(folder, trust_remote_code)
    tokenization = tokenization_of(manifest, tokenizer)
    if not manifest.golden:
        raise UserError(f"{folder} has no golden items to ask for: a checkpoint of an unfinished run has none.")
    checks = [*check_tokenizer(manifest, tokenizer), *check_golden_ids(manifest, tokenizer)]
    if not all(check.ok for check in checks):
        return checks  # the texts would not be those of training
    questions = questions_of(manifest.expected(), tokenization)
    as_turns = trained_text(manifest, tokenization).decodes_turns
    client, named = connect(url, token)
    with client:
        try:
            endpoint = Endpoint.find(client, protocol or named, as_turns, _shortest(questions, as_turns))
            told = endpoint.about.get("server", "not this project's")
            checks.append(Check("server answers", True, f"{endpoint.protocol} protocol; server: {str(told)[:100]}"))
            checks.extend(_Proof(endpoint, manifest, tokenization, questions, as_turns).checks())
        except NoAnswer as error:
            checks.append(Check("server answers", False, str(error)))
    return checks


def questions_of(items: Sequence[GoldenItem], tokenization: Tokenization) -> list[Question]:
    """Every golden response with its text."""
    return [
        Question(item, place, text)
        for item in items
        for place, text in enumerate(tokenization.texts(item.candidates()))
    ]


def _shortest(questions: Sequence[Question], as_turns: bool) -> Question:
    """A short question that any server of the model accepts, to find the protocol."""
    of_kind = [question for question in questions if is_of_kind(question.item, as_turns)] or questions
    return min(of_kind, key=lambda question: len(question.item.token_ids[question.response]))


class _Proof:
    """The checks of one server.

    Over-long texts, unless many times too long, are sent only under this project's own protocol. The other protocols do
    not mark the end of a prompt, and cannot cut as training did. Nor do they mark conversations: a model that was also
    trained on plain text gets only the conversations.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        manifest: Manifest,
        tokenization: Tokenization,
        questions: list[Question],
        as_turns: bool,
    ) -> None:
        self.endpoint, self.manifest, self.tokenization = endpoint, manifest, tokenization
        refused = {id(question.item) for question in questions if not self._is_taken(question)}
        taken = [
            q for q in questions if id(q.item) not in refused
        ] or questions  # complete items, since their responses are cut together
        whole = [q for q in taken if is_of_kind(q.item, as_turns) and not self._is_cut(q, as_turns)]
        self.questions, self.whole = (taken if endpoint.protocol == "score" else whole), whole
        self.left_out = len(questions) - len(self.questions)
        self.said = endpoint.about.get("computes_in")
        self.computes_in = self.said if isinstance(self.said, str) and self.said in DTYPES else None
        self.allowed = allowed_drift(manifest, self.computes_in or "bf16")
        self.same = allowed_between_layouts(manifest, self.computes_in or "bf16")

    def _is_taken(self, question: Question) -> bool:
        """Whether this project's server tokenizes the text at all; turns count as somewhat more than their words."""
        limit = self.tokenization.max_length
        return limit is None or len(question.text) <= limit * CHARACTERS_PER_TOKEN / 2

    def _is_cut(self, question: Question, as_turns: bool) -> bool:
        [ids] = self.tokenization.encode([question.text], add_special_tokens=not as_turns)
        return ids != question.item.token_ids[question.response]

    def checks(self) -> Iterator[Check]:
        scores = self.endpoint.scores(self.questions)
        yield self._raw(scores)
        yield self._golden(scores)
        yield self._dtype(scores)
        again = self.endpoint.scores(self.questions)
        yield _alike("the same question gets the same scores", again, scores, self.same)
        first = sum(question.item is self.questions[0].item for question in self.questions)
        turned = self.endpoint.scores(self.questions[first:] + self.questions[:first])
        yield _alike("answers keep the order of the questions", turned[-first:] + turned[:-first], scores, self.same)
        known = dict(zip(map(_key, self.questions), scores, strict=True))
        alone = [self.endpoint.scores([question])[0] for question in self.whole]
        together = [known[_key(question)] for question in self.whole]
        yield _alike("batch scores equal single scores", together, alone, self.same)
        yield self._spelled(known)
        if self.endpoint.protocol != "score":
            yield from self._ends()

    def _raw(self, scores: list[float]) -> Check:
        reason = activation([question.golden for question in self.questions], scores, self.manifest.reward)
        return Check("scores are raw", reason is None, reason or "")

    def _golden(self, scores: list[float]) -> Check:
        given = iter(scores)
        items, lists = [], []
        for _, group in groupby(self.questions, key=lambda question: id(question.item)):
            asked = list(group)
            items.append(replace(asked[0].item, scores=[question.golden for question in asked]))
            lists.append([next(given) for _ in asked])
        moved = drift(items, lists, self.allowed)
        left = f"; {self.left_out} texts not asked for, over-long or of another kind" if self.left_out else ""
        return Check("golden scores are given again", moved.ok, f"{moved}; allowed {self.allowed}{left}")

    def _dtype(self, scores: list[float]) -> Check:
        """Report the server's dtype. Other projects' servers do not state it, but their scores show their precision."""
        name = "arithmetic"
        if self.said is not None and self.computes_in is None:
            return Check(name, False, f"the server names {self.said!r:.40}; known are {', '.join(DTYPES)}")
        if self.computes_in:
            return Check(
                name, True, f"{self.computes_in}, as the server says; trained in {self.manifest.compute_dtype}"
            )
        exact = all(abs(s - q.golden) <= 1e-4 for s, q in zip(scores, self.questions, strict=True))
        looks = "as exact as fp32" if exact else "differences as of 16 bit, or larger"
        return Check(name, True, f"{looks}; trained in {self.manifest.compute_dtype}")

    def _spelled(self, known: dict[tuple[int, int], float]) -> Check:
        """Check golden items whose content spells a special token: a server may strip it, or break it up."""
        special = sorted(self.tokenization.tokenizer.all_special_tokens)
        spelled = [
            q for q in self.questions if any(token in str((q.item.prompt, q.item.responses)) for token in special)
        ]
        now = [known[_key(question)] for question in spelled]
        name = "special tokens spelled in a text are kept"
        if not spelled:
            return Check(name, True, "not tried: no golden item spells one")
        return _alike(name, now, [question.golden for question in spelled], self.allowed)

    def _ends(self) -> Iterator[Check]:
        """Check the beginnings and ends of text as consumers send them."""
        tokenizer = self.tokenization.tokenizer
        bos, eos = tokenizer.bos_token or "", tokenizer.eos_token or ""
        golden = [question.golden for question in self.whole]

        def asked(change: Callable[[str], str]) -> list[float]:
            return self.endpoint.scores([replace(question, text=change(question.text)) for question in self.whole])

        if self.endpoint.protocol == "classify":
            # verl strips a leading bos, and leaves special tokens to vLLM, whose tokenizer may add them
            texts = [question.text.removeprefix(bos) for question in self.whole]
            check = _alike("text as verl sends it gets the golden scores", self.endpoint.classified(texts, None), golden, self.allowed)  # fmt: skip
            way_out = "send add_special_tokens false and the text as the template renders it"
            yield check if check.ok else replace(check, detail=f"{check.detail}: the server adds special tokens that training does not have; {way_out}")  # fmt: skip
            return
        if bos and all(q.item.token_ids[q.response][0] == tokenizer.bos_token_id for q in self.whole):
            yield _alike("text without bos gets the golden scores", asked(lambda t: t.removeprefix(bos)), golden, self.allowed)  # fmt: skip
            yield _alike("text with bos gets the golden scores", asked(lambda t: bos + t.removeprefix(bos)), golden, self.allowed)  # fmt: skip
        if eos and all(question.text.rstrip().endswith(eos) for question in self.whole):
            yield _alike("text that ends at eos gets the golden scores", asked(str.rstrip), golden, self.allowed)


def _key(question: Question) -> tuple[int, int]:
    return id(question.item), question.response


def _alike(name: str, scores: Sequence[float], others: Sequence[float], allowed: Tolerance) -> Check:
    """Check that `scores` differ from `others` by no more than rounding explains."""
    differences = [abs(score - other) for score, other in zip(scores, others, strict=True)]
    ok = all(difference <= allowed.of(other) for difference, other in zip(differences, others, strict=True))
    largest = max(differences, default=0.0) if all(map(math.isfinite, differences)) else math.nan
    limits = f"max({allowed.absolute:g}, {allowed.relative:.2%})"
    return Check(name, ok, f"largest difference {largest:.2g}; allowed {limits}")


def activation(golden: Sequence[float], scores: Sequence[float], reward: Reward | None) -> str | None:
    """Describe the function that the server applies to its scores, if it is a known one; None if they are golden."""
    if not scores or all(abs(score - value) <= 1e-3 for score, value in zip(scores, golden, strict=True)):
        return None
    if all(abs(score - 1) < 1e-6 for score in scores):
        return "every score is 1: a softmax over one label, as SGLang's /v1/classify; ask /classify or /v1/embeddings instead"
    if all(abs(score - _sigmoid(value)) <= SIGMOID for score, value in zip(scores, golden, strict=True)):
        return (
            "they are the golden scores' sigmoid: an activation is applied; send use_activation false, or set "
            'problem_type "regression" in config.json'
        )
    if (
        reward
        and reward.std
        and all(
            abs(score - (value - reward.mean) / reward.std) <= 1e-2 * (1 + abs(score))
            for score, value in zip(scores, golden, strict=True)
        )
    ):
        return "they are the golden scores minus mean over std: the server normalizes them; turn that off"
    return None


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-max(min(value, 500.0), -500.0)))
