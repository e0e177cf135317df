"""Verify running servers: ours in its three protocols, and imitations of others, correct and with their typical errors."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.cli import main
from qlora_rm.errors import UserError
from qlora_rm.verification.checks import Check
from qlora_rm.verification.client import PROTOCOLS
from qlora_rm.verification.server import activation, verify_endpoint
from tests.reward_models_for_tests import copy_of, edit_json, llama_adapter
from tests.serving.servers_for_tests import running, served

Scores = Callable[[list[str], bool], list[float]]
"""Maps texts, and whether special tokens are added to them, to scores."""


def failed(checks: Sequence[Check]) -> dict[str, str]:
    return {check.name: check.detail for check in checks if not check.ok}


@pytest.fixture(scope="session")
def scores_of(model: RewardModel) -> Scores:
    """Scores of a consumer that tokenizes text itself."""

    def score(texts: list[str], add_special_tokens: bool) -> list[float]:
        ids = model.tokenizer(texts, add_special_tokens=add_special_tokens)["input_ids"]
        return model.score_token_ids(ids).tolist()

    return score


def vllm(scores: Scores, name: str = "org/rm") -> Starlette:
    """vLLM 0.33's `/classify`, as documented: body, defaults, answer and refusals."""

    async def classify(request: Request) -> Response:
        body = await request.json()
        if body.get("model") not in (None, name):
            return JSONResponse({"error": {"message": f"The model `{body['model']}` does not exist."}}, 404)
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        logits = scores(texts, body.get("add_special_tokens", True))
        raw = body.get("use_activation") is False
        data = [
            {"index": index, "label": "LABEL_0", "probs": [x if raw else 1 / (1 + math.exp(-x))], "num_classes": 1}
            for index, x in enumerate(logits)
        ]
        return JSONResponse({"id": "classify-1", "object": "list", "created": 1, "model": name, "data": data[::-1]})

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"}]})

    return Starlette(
        routes=[
            Route("/health", lambda request: Response()),
            Route("/v1/models", models),
            Route("/classify", classify, methods=["POST"]),
        ]
    )


def openrlhf(answer: Callable[[list[str]], Any], status: int = 200) -> Starlette:
    """A server of OpenRLHF's protocol."""

    async def get_reward(request: Request) -> Response:
        body = await request.json()
        assert len(body["query"]) == len(body["prompts"]) == len(body["labels"])
        return JSONResponse(answer(body["query"]), status)

    return Starlette(routes=[Route("/get_reward", get_reward, methods=["POST"])])


def rewards(scores: Sequence[float]) -> dict[str, Any]:
    return {"rewards": list(scores), "scores": list(scores), "extra_logs": {}}


class TestOurs:
    @pytest.mark.slow
    @pytest.mark.parametrize("protocol", PROTOCOLS)
    def test_all_checks_hold_in_every_protocol(self, url: str, protocol: Any) -> None:
        checks = verify_endpoint(str(llama_adapter()), url, protocol=protocol)
        assert not failed(checks)
        names = {check.name for check in checks}
        assert {"server answers", "scores are raw", "golden scores are given again", "batch scores equal single scores", "answers keep the order of the questions", "special tokens spelled in a text are kept"} <= names  # fmt: skip
        [answers] = [check for check in checks if check.name == "server answers"]
        assert answers.detail.startswith(f"{protocol} protocol; server: qlora_rm")

    @pytest.mark.slow
    def test_the_protocol_is_known_from_the_url_or_found(self, url: str) -> None:
        for place, protocol in ((url, "score"), (f"{url}/get_reward", "get_reward"), (f"{url}/classify/", "classify")):
            said = [check.detail for check in verify_endpoint(str(llama_adapter()), place) if check.name == "server answers"]  # fmt: skip
            assert said[0].startswith(f"{protocol} protocol")

    @pytest.mark.slow
    def test_long_texts_are_asked_for_where_the_cut_is_ours(self, url: str) -> None:
        for protocol, left_out in (("score", False), ("get_reward", True)):
            checks = verify_endpoint(str(llama_adapter()), url, protocol=protocol)  # type: ignore[arg-type]
            [golden] = [check for check in checks if check.name == "golden scores are given again"]
            assert ("2 texts not asked for" in golden.detail) is left_out

    @pytest.mark.slow
    def test_a_server_of_another_model_is_found_out(self, url: str, tmp_path: Path) -> None:
        folder = copy_of(llama_adapter(), tmp_path / "other")
        manifest = json.loads((folder / "rm_manifest.json").read_text())
        for item in manifest["golden"]:
            item["scores"] = [score + 0.01 for score in item["scores"]]
        edit_json(folder / "rm_manifest.json", **manifest)
        found = failed(verify_endpoint(str(folder), url))
        assert "golden scores are given again" in found
        assert "batch scores equal single scores" not in found

    @pytest.mark.slow
    def test_the_door(self, url: str, capsys: Any, model: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
        assert main(["verify", str(llama_adapter()), "--url", url]) == 0
        assert f"{url}: all 16 checks hold" in capsys.readouterr().out
        assert main(["verify", str(llama_adapter()), "--url", f"{url}/nowhere", "--json"]) == 1
        result = json.loads(capsys.readouterr().out)
        assert result["ok"] is False
        assert result["checks"][-1] == {"name": "server answers", "ok": False, "detail": "/get_reward: 404 Not Found, '{\"error\":\"Not Found\"}'; /classify: 404 Not Found, '{\"error\":\"Not Found\"}'", "checked": True}  # fmt: skip
        with served(model, llama_adapter(), token="secret") as service, running(service.app()) as closed:
            assert main(["verify", str(llama_adapter()), "--url", closed]) == 1
            assert "401, a token is wanted: set QLORA_RM_TOKEN" in capsys.readouterr().out
            monkeypatch.setenv("QLORA_RM_TOKEN", "secret")
            assert main(["verify", str(llama_adapter()), "--url", closed]) == 0


class TestVllm:
    @pytest.mark.slow
    def test_a_right_one(self, scores_of: Scores) -> None:
        """The template writes no bos and the tokenizer adds one, so only text sent as verl does gets wrong scores."""
        with running(vllm(scores_of)) as url:
            found = failed(verify_endpoint(str(llama_adapter()), url))
        assert list(found) == ["text as verl sends it gets the golden scores"]
        assert "the server adds special tokens that training does not have" in found.popitem()[1]

    @pytest.mark.slow
    def test_one_that_adds_nothing(self, scores_of: Scores) -> None:
        with running(vllm(lambda texts, _: scores_of(texts, False))) as url:
            checks = verify_endpoint(str(llama_adapter()), url)
        assert not failed(checks)
        assert "classify protocol; server: not this project's" in [check.detail for check in checks]

    @pytest.mark.slow
    def test_an_activation_that_cannot_be_turned_off(self, scores_of: Scores) -> None:
        with running(vllm(lambda texts, _: [1 / (1 + math.exp(-x)) for x in scores_of(texts, False)])) as url:
            found = failed(verify_endpoint(str(llama_adapter()), url))
        assert "an activation is applied; send use_activation false" in found["scores are raw"]
        assert "golden scores are given again" in found


class TestOpenRlhf:
    @pytest.mark.slow
    def test_a_right_one(self, scores_of: Scores) -> None:
        with running(openrlhf(lambda texts: rewards(scores_of(texts, False)))) as url:
            assert not failed(verify_endpoint(str(llama_adapter()), url))

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("wrong", "check"),
        [
            (lambda scores, texts: scores[::-1], "answers keep the order of the questions"),
            (lambda scores, texts: [x + 0.5 * len(texts) for x in scores], "batch scores equal single scores"),
            (lambda scores, texts: [x + ("</s>" in t) for x, t in zip(scores, texts, strict=True)], "special tokens spelled in a text are kept"),
            (lambda scores, texts: [1.0] * len(scores), "scores are raw"),
            (lambda scores, texts: [(x - 0.5) / 1.5 for x in scores], "scores are raw"),
            (lambda scores, texts: [x + 0.3 for x in scores], "golden scores are given again"),
            (lambda scores, texts: scores[1:], "server answers"),
            (lambda scores, texts: [str(x) for x in scores], "server answers"),
            (lambda scores, texts: None, "server answers"),
        ],
    )  # fmt: skip
    def test_wrong_ones_fail_by_name(self, scores_of: Scores, wrong: Any, check: str) -> None:
        def answer(texts: list[str]) -> Any:
            return {"rewards": wrong(scores_of(texts, False), texts)}

        with running(openrlhf(answer)) as url:
            assert check in failed(verify_endpoint(str(llama_adapter()), url, protocol="get_reward"))

    @pytest.mark.slow
    def test_one_that_drifts_from_call_to_call(self, scores_of: Scores) -> None:
        calls: list[int] = []

        def answer(texts: list[str]) -> Any:
            calls.append(1)
            return rewards([x + len(calls) for x in scores_of(texts, False)])

        with running(openrlhf(answer)) as url:
            found = failed(verify_endpoint(str(llama_adapter()), url))
        assert "the same question gets the same scores" in found

    @pytest.mark.slow
    def test_servers_that_give_no_scores(self) -> None:
        for app, said in (
            (openrlhf(lambda texts: {"detail": "boom"}, status=500), "/get_reward: 500 Internal Server Error"),
            (openrlhf(lambda texts: {"reward": 1}), "the answer has no list 'rewards'"),
            (Starlette(routes=[Route("/get_reward", lambda request: PlainTextResponse("hello"), methods=["POST"])]), "answers no JSON: 'hello'"),
        ):  # fmt: skip
            with running(app) as url:
                found = failed(verify_endpoint(str(llama_adapter()), url, protocol="get_reward"))
            assert said in found["server answers"]
        found = failed(verify_endpoint(str(llama_adapter()), url))
        assert "is the server running there?" in found["server answers"]


def test_a_broken_folder_is_told_before_the_server_is_asked(tmp_path: Path) -> None:
    folder = copy_of(llama_adapter(), tmp_path / "adapter")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    found = failed(verify_endpoint(str(folder), "http://127.0.0.1:9"))
    assert "chat template is the trained one" in found
    assert "server answers" not in found
    Manifest(**{**vars(Manifest.load(folder)), "golden": []}).save(folder)
    with pytest.raises(UserError, match="no golden items to ask for"):
        verify_endpoint(str(folder), "http://127.0.0.1:9")
    for url in ("127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://[::1"):
        with pytest.raises(UserError, match="--url"):
            verify_endpoint(str(llama_adapter()), url)


def test_activations_are_told_apart(model: RewardModel) -> None:
    assert model.manifest is not None
    golden, reward = [-3.0, 0.0, 2.5], model.manifest.reward
    assert activation(golden, golden, reward) is None
    assert activation(golden, [x + 0.2 for x in golden], reward) is None
    assert "softmax" in (activation(golden, [1.0] * 3, reward) or "")
    assert "sigmoid" in (activation(golden, [0.0474, 0.5, 0.9241], reward) or "")
    assert "mean over std" in (activation(golden, [(x - 0.5) / 1.5 for x in golden], reward) or "")
    assert reward is not None
    assert activation(golden, [x * 2 for x in golden], replace(reward, std=0.0)) is None
