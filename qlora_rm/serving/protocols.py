"""The protocol of each path: check bodies, tokenize texts, and report every error with its place.

A path's reader turns a body into token sequences, and a function that turns their scores into the answer.
"""

import inspect
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase

from qlora_rm.preferences import Candidates, Content, RowFault, Tokenization
from qlora_rm.preferences.row_layouts import join, with_system
from qlora_rm.preferences.text_as import TrainedText
from qlora_rm.preferences.values import content, kind_of
from qlora_rm.serving.sizes import Refused, Sizes, characters_of

Ids = list[int]
T = TypeVar("T", bound=BaseModel)

OF_THE_LIBRARY = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
"""Names that `chat_template_kwargs` may not hold. One of them is another template, which is a program."""


ONLY_WITH_TURNS = {"system", "tools", "chat_template_kwargs"}


@dataclass(frozen=True)
class Asked:
    """Sequences to score, and the answer's body as a function of their scores."""

    sequences: list[Ids]
    answer: Callable[[list[float]], dict[str, Any]]


@dataclass(frozen=True)
class Reader:
    """Reads request bodies for one model.

    Attributes:
        text: how the model reads the text of `/score`, and decoded text.
        vocabulary: rows of the model's embedding.
        longest: number of positions of the model; None where it has no limit.
        max_sequences, max_tokens: limits of one request.
        sizes: limits of the text to tokenize for one request.

    Each method for a path takes `short`, the most characters to tokenize, and raises `Long` above it; None for no limit.
    """

    name: str
    text: TrainedText
    vocabulary: int
    longest: int | None
    max_sequences: int
    max_tokens: int
    sizes: Sizes

    @property
    def tokenization(self) -> Tokenization:
        return self.text.tokenization

    # ---- POST /score -----------------------------------------------------------------------------------------------------

    def score(self, body: bytes, short: int | None = None) -> Asked:
        """Read one prompt with N responses, `{"prompt": ..., "responses": [...]}`, or a list of such objects."""
        several = body.lstrip()[:1] == b"["
        items = _each_of(ScoreBody, body) if several else [_one(ScoreBody, body)]
        self._check_count(sum(len(item.responses) for item in items))
        places = [f"[{i}]." if several else "" for i in range(len(items))]
        self.sizes.check(
            (
                (f"{place}responses[{i}] with its prompt", size)
                for item, place in zip(items, places, strict=True)
                for i, size in enumerate(_sizes_of(item))
            ),
            short,
        )
        candidates = [self._candidates(item, place) for item, place in zip(items, places, strict=True)]
        tokenized = list(map(self._tokenized, candidates, places))
        cuts = [cut for _, cut in tokenized]

        def answer(scores: list[float]) -> dict[str, Any]:
            rest = iter(scores)
            each = [list(islice(rest, len(item.responses))) for item in items]
            return {"scores": each, "cut": cuts} if several else {"scores": each[0], "cut": cuts[0]}

        return self._asked([ids for sequences, _ in tokenized for ids in sequences], answer)

    def _candidates(self, item: "ScoreBody", place: str) -> Candidates:
        """Read an item like a row, except that a response may be empty: a policy may produce one, and it has a score."""
        kwargs, given = item.chat_template_kwargs or {}, item.model_fields_set
        if taken := OF_THE_LIBRARY & kwargs.keys():
            raise Refused(422, f"{place}chat_template_kwargs: {min(taken)} is not the template's")
        try:
            prompt = content(item.prompt, "prompt") if "prompt" in given else ""
            responses = [content(said, f"responses[{index}]") for index, said in enumerate(item.responses)]
            if [] in responses:
                raise RowFault("empty_response", f"responses[{responses.index([])}] is an empty array")
            prompt, responses = self.text.read(*join(prompt, responses))
            self._check_ids(prompt, *responses)
            prompt = with_system(prompt, item.system)
        except RowFault as fault:
            raise Refused(422, f"{place}{fault.what}") from fault
        if kind_of(responses[0]) == "turns":
            return Candidates(prompt, tuple(responses), item.tools, kwargs)
        if idle := ONLY_WITH_TURNS & given:
            raise Refused(422, f"{place}{min(idle)}: goes with turns, and this is text")
        return Candidates(prompt, tuple(responses))

    def _check_ids(self, *contents: Content) -> None:
        """Refuse unknown token ids. They would fail in the model, and on CUDA end the server."""
        for token in (token for found in contents if kind_of(found) == "ids" for token in found):
            if not 0 <= token < self.vocabulary:  # type: ignore[operator]
                raise RowFault("unknown_token", f"token id {token} is none of the model's {self.vocabulary}")

    def _tokenized(self, candidates: Candidates, place: str) -> tuple[list[Ids], int]:
        """Return the sequences of one prompt, and how many of its tokens were cut. An error names its response."""
        [result] = self._tokenize([candidates])
        if not isinstance(result, RowFault):
            return result.tokens.sequences, result.cut
        alone = (
            Candidates(candidates.prompt, (response,), candidates.tools, candidates.template_kwargs)
            for response in candidates.responses
        )
        faulty = [index for index, one in enumerate(self._tokenize(list(alone))) if isinstance(one, RowFault)]
        where = f"responses[{faulty[0]}]" if faulty else "responses"
        raise Refused(422, f"{place}{where}: {result.what}")

    # ---- POST /get_reward: OpenRLHF's protocol -------------------------------------------------------------------------

    def get_reward(self, body: bytes, short: int | None = None) -> Asked:
        """Read decoded texts from `query`. `prompts` and `labels`, which rule-based rewards need, are ignored.

        OpenRLHF 0.11 sends one query per request from up to 128 concurrent tasks, waits 180 s and tries 5 times.
        """
        texts = _one(RewardBody, body).query
        return self._asked(
            self._decoded(texts, "query", short), lambda scores: {"rewards": scores, "scores": scores, "extra_logs": {}}
        )

    # ---- POST /classify: vLLM's protocol, as verl reads it -----------------------------------------------------------

    def classify(self, body: bytes, short: int | None = None) -> Asked:
        """Read decoded texts from `input`. Scores are raw, which vLLM calls `use_activation: false`."""
        asked = _one(ClassifyBody, body)
        if asked.use_activation:
            raise Refused(422, "use_activation: this server gives raw scores only; send false")
        texts = [asked.input] if isinstance(asked.input, str) else asked.input
        sequences = self._decoded(texts, "input", short)
        tokens = sum(map(len, sequences))

        def answer(scores: list[float]) -> dict[str, Any]:
            return {
                "id": f"classify-{uuid.uuid4().hex}",
                "object": "list",
                "created": int(time.time()),
                "model": self.name,
                "data": [
                    {"index": index, "label": "LABEL_0", "probs": [score], "num_classes": 1}
                    for index, score in enumerate(scores)
                ],
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
            }

        return self._asked(sequences, answer)

    # ---- shared by all paths ---------------------------------------------------------------------------------------------

    def _decoded(self, texts: list[str], field: str, short: int | None) -> list[Ids]:
        self._check_count(len(texts))
        self.sizes.check(((f"{field}[{index}]", len(text)) for index, text in enumerate(texts)), short)
        candidates = []
        for index, text in enumerate(texts):
            try:
                candidates.append(self.text.decoded.candidates(text))
            except RowFault as fault:
                raise Refused(422, f"{field}[{index}]: {fault.what}") from fault
        sequences = []
        for index, result in enumerate(self._tokenize(candidates)):
            if isinstance(result, RowFault):
                raise Refused(422, f"{field}[{index}]: {result.what}")
            sequences += result.tokens.sequences
        return sequences

    def _tokenize(self, candidates: Sequence[Candidates]) -> Any:
        return self.tokenization.tokenize_each(candidates)

    def _check_count(self, count: int) -> None:
        if count > self.max_sequences:
            raise Refused(413, f"{count} sequences in one request; at most {self.max_sequences} are taken")

    def _asked(self, sequences: list[Ids], answer: Callable[[list[float]], dict[str, Any]]) -> Asked:
        longest, tokens = max(map(len, sequences)), sum(map(len, sequences))
        if self.longest is not None and longest > self.longest:
            raise Refused(422, f"a sequence of {longest} tokens; the model has positions for {self.longest}")
        if tokens > self.max_tokens:
            raise Refused(413, f"{tokens} tokens in one request; at most {self.max_tokens} are taken")
        return Asked(sequences, answer)


class ScoreBody(BaseModel):
    """A prompt (text, or turns of role and content) and its responses (texts, or lists of turns)."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: Any = ""
    responses: list[Any] = Field(min_length=1)
    system: str | None = None
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def _sizes_of(item: ScoreBody) -> list[int]:
    """Return the characters of each response, with everything rendered before it."""
    before = characters_of([item.prompt, item.system, item.tools, item.chat_template_kwargs])
    return [before + characters_of(response) for response in item.responses]


class RewardBody(BaseModel):
    """The body that OpenRLHF sends."""

    model_config = ConfigDict(strict=True)

    query: list[str] = Field(min_length=1)
    prompts: list[Any] | None = None
    labels: list[Any] | None = None


class ClassifyBody(BaseModel):
    """The keys of vLLM's body that concern one score. Its other keys (priority, truncation, ...) are ignored."""

    model_config = ConfigDict(strict=True)

    input: str | list[str] = Field(min_length=1)
    use_activation: bool | None = None


def _one(kind: type[T], body: bytes) -> T:
    return _read(lambda: kind.model_validate_json(body))


def _each_of(kind: type[T], body: bytes) -> list[T]:
    many = Annotated[list[kind], Field(min_length=1)]  # type: ignore[valid-type]
    return _read(lambda: TypeAdapter(many).validate_json(body))


def _read(parse: Callable[[], Any]) -> Any:
    """Return the result of `parse`.

    Raises:
        Refused: 400 if the body is not JSON, 422 with the key if the JSON has another shape.
    """
    try:
        return parse()
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise Refused(400, first["msg"]) from error
        parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        where = "".join(parts).removeprefix(".")
        raise Refused(422, f"{where or 'body'}: {first['msg']}") from error
