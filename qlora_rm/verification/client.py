"""Request scores from a running server over the protocols that consumers of reward models use."""

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, Self

import httpx2

from qlora_rm.artifacts.golden import GoldenItem
from qlora_rm.bearer import TOKEN_VARIABLE, authorization
from qlora_rm.errors import UserError
from qlora_rm.verification.bounded_client import BoundedClient, NoAnswer

Protocol = Literal["score", "get_reward", "classify"]
PROTOCOLS: tuple[Protocol, ...] = ("score", "get_reward", "classify")

LARGEST = sys.float_info.max
TRIES = 4
"""Number of attempts while a server is busy (503)."""


def connect(url: str, token: str | None) -> tuple[BoundedClient, Protocol | None]:
    """Return a client of the server at `url`, which the caller closes, and the protocol that the end of the path names.

    Raises:
        UserError: `url` is not a URL of a server.
    """
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise UserError(f"--url {url} is no URL: {error}.") from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"--url {url} must begin with http:// or https:// and name a server.")
    path = parsed.path.rstrip("/")
    named = next((protocol for protocol in PROTOCOLS if path.endswith(f"/{protocol}")), None)
    root = parsed.copy_with(path=path.removesuffix(f"/{named}") or "/", query=None, fragment=None)
    headers = {"Authorization": authorization(token)} if token else {}
    return BoundedClient(root, headers), named


@dataclass(frozen=True)
class Question:
    """One response to score.

    Attributes:
        item, response: its golden item, and its place there.
        text: prompt and response rendered as one text, including special tokens.
    """

    item: GoldenItem
    response: int
    text: str

    @property
    def golden(self) -> float:
        return self.item.scores[self.response]


@dataclass(frozen=True)
class Endpoint:
    """A server and the way to query it.

    Attributes:
        protocol: "score", this project's own; "get_reward", OpenRLHF's; "classify", vLLM's.
        about: the server's description of itself, empty unless it is this project's server.
        model: model name that vLLM expects, or None.
        add_special_tokens: setting sent to vLLM; rendered templates already contain their special tokens.
    """

    client: BoundedClient
    protocol: Protocol
    about: dict[str, Any]
    model: str | None = None
    add_special_tokens: bool = False

    @classmethod
    def find(cls, client: BoundedClient, protocol: Protocol | None, as_turns: bool, probe: Question) -> Self:
        """Find a protocol that the server answers. Default: this project's, or the first that answers `probe`.

        Raises:
            NoAnswer: no protocol gives a score.
        """
        health, models = _told(client, "/health"), _told(client, "/v1/models").get("data")
        about = health if str(health.get("server", "")).startswith("qlora_rm") else {}
        entries = [entry for entry in models if isinstance(entry, dict)] if isinstance(models, list) else []
        names = [entry["id"] for entry in entries if isinstance(entry.get("id"), str)]
        of_strangers: tuple[Protocol, ...] = ("get_reward", "classify")
        reasons = []
        for tried in (protocol,) if protocol else ("score",) if about else of_strangers:
            endpoint = cls(client, tried, about, next(iter(names), None), add_special_tokens=not as_turns)
            try:
                endpoint.scores([probe])
                return endpoint
            except NoAnswer as error:
                reasons.append(str(error))
        raise NoAnswer("; ".join(reasons))

    def scores(self, questions: Sequence[Question]) -> list[float]:
        """Scores of `questions`, requested in one body.

        Raises:
            NoAnswer: there are no scores, or not one for each question.
        """
        if self.protocol == "score":
            return self._count(_numbers(self._score(questions)), questions)
        texts = [question.text for question in questions]
        if self.protocol == "get_reward":
            nothing = [None] * len(texts)
            answer = self._post({"query": texts, "prompts": [""] * len(texts), "labels": nothing})
            return self._count(_numbers(_of(answer, "rewards")), questions)
        return self._count(self.classified(texts, self.add_special_tokens), questions)

    def classified(self, texts: list[str], add_special_tokens: bool | None) -> list[float]:
        """vLLM's answer to `texts`, the last probability of each; `add_special_tokens` None leaves it to the server."""
        body: dict[str, Any] = {"input": texts, "use_activation": False}
        if self.model is not None:
            body["model"] = self.model
        if add_special_tokens is not None:
            body["add_special_tokens"] = add_special_tokens
        rows = _of(self._post(body), "data")
        try:
            return _numbers([row["probs"][-1] for row in sorted(rows, key=lambda row: row["index"])])
        except (TypeError, KeyError, IndexError):
            raise NoAnswer("/classify answers rows without index and probs; is it vLLM's?") from None

    def _score(self, questions: Sequence[Question]) -> list[Any]:
        """Request consecutive responses of one prompt together, as the over-long rule requires."""
        body = []
        for _, group in groupby(questions, key=lambda question: id(question.item)):
            together = list(group)
            item = together[0].item
            entry = {"prompt": item.prompt, "responses": [item.responses[question.response] for question in together]}
            if item.tools is not None:
                entry["tools"] = item.tools
            if item.template_kwargs:
                entry["chat_template_kwargs"] = item.template_kwargs
            body.append(entry)
        scores = _of(self._post(body), "scores")
        if not all(isinstance(of_one, list) for of_one in scores):
            raise NoAnswer("/score answers something else than lists of scores; is it this project's?")
        return [score for of_one in scores for score in of_one]

    def _count(self, scores: list[float], questions: Sequence[Question]) -> list[float]:
        if len(scores) != len(questions):
            raise NoAnswer(f"/{self.protocol} answers {len(scores)} scores to {len(questions)} texts")
        return scores

    def _post(self, body: Any) -> Any:
        path = f"/{self.protocol}"
        for left in reversed(range(TRIES)):
            answer = self.client.ask("POST", path, body)
            if answer.status != 503 or not left:
                break
            time.sleep(1)
        if answer.status == 401:
            raise NoAnswer(f"{path}: 401, a token is wanted: set {TOKEN_VARIABLE} or --token_file FILE")
        if answer.location is not None:
            raise NoAnswer(f"{path}: {answer.status}, a redirect to {answer.location[:200]!r}, which is not followed")
        if answer.status != 200:
            raise NoAnswer(f"{path}: {answer.status} {answer.phrase}, {answer.text.strip()[:200]!r}")
        try:
            return answer.json()
        except ValueError:
            raise NoAnswer(f"{path} answers no JSON: {answer.text.strip()[:60]!r}") from None


def _told(client: BoundedClient, path: str) -> dict[str, Any]:
    """Answer to a GET request; empty if that is not a JSON object.

    Raises:
        NoAnswer: nothing answers.
    """
    answer = client.ask("GET", path)
    try:
        found = answer.json() if answer.status == 200 else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _of(answer: Any, key: str) -> list[Any]:
    found = answer.get(key) if isinstance(answer, dict) else None
    if not isinstance(found, list):
        raise NoAnswer(f"the answer has no list {key!r}: {str(answer)[:60]!r}")
    return found


def _numbers(values: Sequence[Any]) -> list[float]:
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        raise NoAnswer(f"the answer holds something else than numbers: {str(values)[:60]!r}")
    numbers = [float(value) if abs(value) <= LARGEST else math.inf for value in values]
    if not all(map(math.isfinite, numbers)):  # NaN and Infinity, which Python accepts although JSON has none, and 1e999
        raise NoAnswer(f"the answer holds a number that is not finite: {str(numbers)[:60]!r}")
    return numbers
