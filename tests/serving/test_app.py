"""Each path answers with the offline scorer's scores, or with a status and a reason."""

import json
import socket
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from qlora_rm.artifacts.load import RewardModel
from qlora_rm.evaluation.scored_rows import rank
from qlora_rm.preferences import Candidates, Tokenization
from qlora_rm.serving.app import Service
from tests.reward_models_for_tests import HELD_OUT, llama_adapter
from tests.serving.servers_for_tests import LOCAL, PATIENCE, running, served, wait_until

PROMPT, ANSWERS = "What is the capital of France?", ["Paris.", "I do not know.", ""]
CLOSE = pytest.approx


def metric(service: Service, name: str, **labels: str) -> float:
    return service.metrics.registry.get_sample_value(f"qlora_rm_{name}", labels) or 0.0


def offline(model: RewardModel, *candidates: Candidates) -> list[list[float]]:
    return model.score_candidates(candidates)


def as_turns(prompt: str, answers: Sequence[str]) -> Candidates:
    said = tuple([{"role": "assistant", "content": answer}] for answer in answers)
    return Candidates([{"role": "user", "content": prompt}], said)


class TestScore:
    def test_a_prompt_with_responses(self, client: TestClient, model: RewardModel) -> None:
        answer = client.post("/score", json={"prompt": PROMPT, "responses": ANSWERS})
        assert answer.status_code == 200
        [wanted] = offline(model, as_turns(PROMPT, ANSWERS))
        assert answer.json() == {"scores": CLOSE(wanted, abs=1e-5), "cut": 0}
        ranked = {text: score for score, text in rank(model, PROMPT, ANSWERS[:2])}  # as `qlora-rm score --prompt`
        assert answer.json()["scores"][:2] == CLOSE([ranked[text] for text in ANSWERS[:2]], abs=1e-5)

    def test_turns_system_tools_and_several_prompts(self, client: TestClient, model: RewardModel) -> None:
        tools, kwargs = [{"type": "function", "function": {"name": "look"}}], {"shout": True}
        bodies = [
            {"prompt": item.prompt, "responses": list(item.responses), "tools": tools, "chat_template_kwargs": kwargs}
            for item in HELD_OUT
        ]
        system = {"role": "system", "content": "Be brief."}
        bodies.append({"system": system["content"], "prompt": PROMPT, "responses": ["Paris."]})
        answer = client.post("/score", json=bodies)
        plain = as_turns(PROMPT, ["Paris."])
        wanted = [Candidates(item.prompt, item.responses, tools, kwargs) for item in HELD_OUT]
        wanted.append(Candidates([system, *plain.prompt], plain.responses))  # type: ignore[misc]
        assert answer.json()["scores"] == [CLOSE(scores, abs=1e-5) for scores in offline(model, *wanted)]

    def test_token_ids(self, client: TestClient, model: RewardModel) -> None:
        answer = client.post("/score", json={"prompt": [5, 6], "responses": [[7, 8], [9]]})
        assert answer.json()["scores"] == CLOSE(model.score_token_ids([[5, 6, 7, 8], [5, 6, 9]]).tolist(), abs=1e-5)

    def test_positions_are_limited_where_the_contract_has_no_limit(self, model: RewardModel) -> None:
        unlimited = RewardModel(model.model, Tokenization(model.tokenizer), None, None)
        with (
            served(unlimited, llama_adapter(), skip_golden=True) as service,
            TestClient(service.app(), base_url=LOCAL) as client,
        ):
            answer = client.post("/score", json={"prompt": [5] * 600, "responses": [[6]]})
        assert (answer.status_code, answer.json()["error"]) == (422, "a sequence of 601 tokens; the model has positions for 512")  # fmt: skip

    def test_the_over_long_cut_is_told(self, client: TestClient, model: RewardModel) -> None:
        long = "Tell me again. " * 100
        answer = client.post("/score", json={"prompt": long, "responses": ["No.", "The dog does not mind at all."]})
        assert answer.json()["cut"] > 0
        [wanted] = offline(model, as_turns(long, ["No.", "The dog does not mind at all."]))
        assert answer.json()["scores"] == CLOSE(wanted, abs=1e-5)

    def test_a_shared_prompt_is_computed_once(self, client: TestClient, service: Service) -> None:
        before = metric(service, "tokens_asked_total"), metric(service, "tokens_computed_total")
        client.post("/score", json={"prompt": "Which of these? " * 20, "responses": [f"The {i}." for i in range(16)]})
        asked, computed = (metric(service, f"tokens_{kind}_total") - was for kind, was in zip(("asked", "computed"), before, strict=True))  # fmt: skip
        assert 0 < computed < asked / 4


class TestDecodedText:
    @pytest.mark.parametrize("end", ["<|im_end|>\n", "<|im_end|>", "</s>", ""])
    def test_openrlhfs_query(self, client: TestClient, model: RewardModel, end: str) -> None:
        texts = model.tokenization.texts(as_turns(PROMPT, ANSWERS))
        queries = [text.removesuffix("<|im_end|>\n") + end for text in texts]
        answer = client.post("/get_reward", json={"query": queries, "prompts": [PROMPT] * 3, "labels": [None] * 3})
        [wanted] = offline(model, as_turns(PROMPT, ANSWERS))
        assert answer.json() == {
            "rewards": CLOSE(wanted, abs=1e-5),
            "scores": CLOSE(wanted, abs=1e-5),
            "extra_logs": {},
        }

    def test_vllms_classify_as_verl_asks_it(self, client: TestClient, model: RewardModel) -> None:
        [text] = model.tokenization.texts(as_turns(PROMPT, ["Paris."]))
        answer = client.post("/classify", json={"model": "rm", "input": text, "use_activation": False}).json()
        [[wanted]] = offline(model, as_turns(PROMPT, ["Paris."]))
        assert answer["data"][-1]["probs"][-1] == CLOSE(wanted, abs=1e-5)
        assert answer["usage"]["prompt_tokens"] == len(
            model.tokenization.tokenize([as_turns(PROMPT, ["Paris."])])[0].sequences[0]
        )


BAD: list[tuple[str, Any, int, str]] = [
    ("/score", b"{", 400, "Invalid JSON"),
    ("/score", b"", 400, "Invalid JSON"),
    ("/score", b"\xff", 400, "Invalid JSON"),
    ("/score", b"[" * 100_000, 400, "recursion limit"),
    ("/score", rb'{"responses": ["\ud800"]}', 400, "Invalid JSON"),
    ("/score", "text", 422, "body: "),
    ("/score", [], 422, "body: "),
    ("/score", {}, 422, "responses: Field required"),
    ("/score", {"prompt": PROMPT, "responses": []}, 422, "responses: "),
    ("/score", {"prompt": PROMPT, "responses": "Paris."}, 422, "responses: "),
    ("/score", {"prompt": PROMPT, "responses": ["a"], "temperature": 1}, 422, "temperature: "),
    ("/score", {"prompt": PROMPT, "responses": ["a", None]}, 422, "responses[1] is null"),
    ("/score", {"prompt": PROMPT, "responses": ["a", True]}, 422, "responses[1] is a boolean"),
    ("/score", {"prompt": PROMPT, "responses": ["a", []]}, 422, "responses[1] is an empty array"),
    ("/score", {"prompt": PROMPT, "responses": ["a", "b <pad>"]}, 422, "responses[1]: the pad token"),
    ("/score", {"prompt": [5], "responses": [[6, 600]]}, 422, "token id 600 is none of the model's"),
    ("/score", {"prompt": [], "responses": [[-1]]}, 422, "token id -1 is none"),
    ("/score", {"prompt": [5, 6], "responses": [[7], []]}, 422, "responses[1] is an empty array"),
    ("/score", {"prompt": [5, 6], "responses": [[7], [2]]}, 422, "responses[1]: the pad token"),
    ("/score", {"prompt": "text", "responses": [[7]]}, 422, "the row mixes ids and text"),
    ("/score", {"prompt": None, "responses": ["a"]}, 422, "prompt is null"),
    ("/score", {"prompt": [{"role": "user"}], "responses": ["a"]}, 422, "turn 1 of prompt has no content"),
    ("/score", {"prompt": PROMPT, "responses": ["word " * 900]}, 200, ""),  # a single response may be cut too
    ("/score", {"prompt": PROMPT, "responses": ["a", "word " * 900]}, 422, "the longest sequence has"),
    ("/score", [{"responses": ["a"]}, {"responses": ["a", 5]}], 422, "[1].responses[1] is a number"),
    ("/score", [{"responses": ["a"]}, {}], 422, "[1].responses: Field required"),
    ("/score", {"responses": ["a"], "system": "x"}, 422, "system: goes with turns"),
    ("/score", {"prompt": PROMPT, "responses": ["a"], "chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, 422, "chat_template is not the template's"),
    ("/score", {"prompt": PROMPT, "responses": ["a"] * 513}, 413, "513 sequences in one request; at most 512"),
    ("/score", {"prompt": "x" * 4_000_001, "responses": ["a"]}, 413, "larger than 4000000 bytes"),
    ("/get_reward", {}, 422, "query: Field required"),
    ("/get_reward", {"query": []}, 422, "query: "),
    ("/get_reward", {"query": ["a", 1]}, 422, "query[1]: "),
    ("/get_reward", {"query": ["a", "b<pad>c"]}, 422, "query[1]: the pad token"),
    ("/classify", {"input": 5}, 422, "input"),
    ("/classify", {"input": []}, 422, "input"),
    ("/classify", {"input": "a", "use_activation": True}, 422, "use_activation: this server gives raw scores only"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body", "status", "reason"), BAD, ids=[f"{p} {str(b)[:50]}" for p, b, *_ in BAD])
def test_bad_bodies_are_told_why(client: TestClient, path: str, body: Any, status: int, reason: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert reason in answer.json().get("error", "")


def test_other_mistakes(client: TestClient) -> None:
    assert client.post("/score", content=b"prompt=x").status_code == 415
    assert "application/json" in client.post("/score", data={"prompt": "x"}).json()["error"]
    assert client.get("/score").status_code == 405
    assert client.post("/v1/score", json={}).json() == {"error": "Not Found"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.lists(st.integers(-5, 700), min_size=1, max_size=4) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "x"]), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
turn = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "tool"]), "content": json_values})
mostly_right = st.text(max_size=12) | json_values | st.lists(turn, max_size=3)
bodies = st.fixed_dictionaries(
    {},
    optional={
        "prompt": mostly_right,
        "responses": st.lists(mostly_right, max_size=3) | json_values,
        "system": st.text(max_size=5) | json_values,
        "tools": st.lists(json_values, max_size=2) | json_values,
        "chat_template_kwargs": st.dictionaries(st.text(max_size=5), json_values, max_size=2) | json_values,
        "query": st.lists(st.text(max_size=12), max_size=3) | json_values,
        "input": st.lists(st.text(max_size=12), max_size=3) | json_values,
    },
)


@pytest.mark.slow
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(path=st.sampled_from(["/score", "/get_reward", "/classify"]), body=bodies | st.lists(bodies, max_size=2) | json_values)  # fmt: skip
def test_any_json_gets_scores_or_a_reason(client: TestClient, path: str, body: Any) -> None:
    answer = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
    if answer.status_code == 200:
        assert "error" not in answer.json()
    else:
        assert answer.status_code in (400, 413, 422), (body, answer.text)
        assert answer.json()["error"]


@settings(max_examples=50)
@given(st.binary(max_size=40))
def test_any_bytes_get_a_reason(client: TestClient, content: bytes) -> None:
    answer = client.post("/score", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code in (400, 422), answer.text


class TestToken:
    def test_is_asked_for_everywhere_but_health(self, model: RewardModel) -> None:
        with (
            served(model, llama_adapter(), token="secret") as service,
            TestClient(service.app(), base_url=LOCAL) as client,
        ):
            assert client.get("/health").status_code == 200
            for given_token in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer sécret".encode()}):
                for answer in (
                    client.post("/score", json={}, headers=given_token),
                    client.get("/metrics", headers=given_token),
                ):
                    assert answer.status_code == 401
                    assert answer.headers["www-authenticate"] == "Bearer"
            right = {"Authorization": "Bearer secret"}
            assert client.post("/score", json={"responses": ["a"]}, headers=right).status_code == 200
            assert client.get("/metrics", headers=right).status_code == 200


class TestHealthAndMetrics:
    def test_health_tells_of_the_proof(self, client: TestClient) -> None:
        found = client.get("/health").json()
        assert found["status"] == "ready"
        assert (found["computes_in"], found["shares_prompts"], found["golden"]["items"]) == ("fp32", True, 8)
        assert found["golden"]["largest_difference"] < 1e-4
        assert str(llama_adapter()) not in json.dumps(found)

    def test_metrics_count_what_was_asked(self, client: TestClient, service: Service) -> None:
        before = metric(service, "requests_total", path="/score", status="200"), metric(service, "score_count")
        client.post("/score", json={"prompt": PROMPT, "responses": ANSWERS})
        client.get("/nowhere/at/all")
        text = client.get("/metrics").text
        assert metric(service, "requests_total", path="/score", status="200") == before[0] + 1
        assert metric(service, "score_count") == before[1] + 3
        assert 'qlora_rm_requests_total{path="other",status="404"}' in text
        for name in ("queued_sequences", "queued_tokens", "batch_requests_bucket", "batch_seconds_bucket", "request_seconds_bucket", "tokens_asked_total", "tokens_computed_total"):  # fmt: skip
            assert f"qlora_rm_{name}" in text
        assert "/nowhere" not in text


class Slow:
    """Blocks the model until `go` is set."""

    def __init__(self, service: Service) -> None:
        self.inner, self.go, self.sequences = service.batcher._score, threading.Event(), 0
        service.batcher._score = self

    def __call__(self, sequences: Sequence[list[int]]) -> Sequence[float]:
        self.sequences += len(sequences)
        assert self.go.wait(PATIENCE)
        return self.inner(sequences)


class TestUnderPressure:
    def test_a_full_queue_is_503_and_says_when_to_come_back(self, model: RewardModel) -> None:
        with served(model, llama_adapter(), max_queue_sequences=2) as service, running(service.app()) as url:
            slow = Slow(service)
            with ThreadPoolExecutor(3) as clients:
                asked = [clients.submit(httpx2.post, f"{url}/score", json={"responses": ["a"]}, timeout=PATIENCE)]
                wait_until(lambda: slow.sequences == 1)
                asked.append(clients.submit(httpx2.post, f"{url}/score", json={"responses": ["a", "b"]}, timeout=PATIENCE))  # fmt: skip
                wait_until(lambda: service.metrics.queued_sequences._value.get() == 2)
                refused = httpx2.post(f"{url}/score", json={"responses": ["c"]})
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
                assert "queue is full" in refused.json()["error"]
                slow.go.set()
                assert [len(answer.result(PATIENCE).json()["scores"]) for answer in asked] == [1, 2]
                assert httpx2.post(f"{url}/score", json={"responses": ["c"]}).status_code == 200
            too_many = httpx2.post(
                f"{url}/score", json={"responses": ["a"] * 3}
            )  # never fits, so a retry would not help
            assert too_many.status_code == 413

    def test_work_of_a_client_that_left_is_dropped(self, model: RewardModel) -> None:
        with served(model, llama_adapter()) as service, running(service.app()) as url:
            slow = Slow(service)
            with ThreadPoolExecutor(1) as clients:
                first = clients.submit(httpx2.post, f"{url}/score", json={"responses": ["a"]}, timeout=PATIENCE)
                wait_until(lambda: slow.sequences == 1)
                body = json.dumps({"responses": ["b"] * 10}).encode()
                with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as leaver:
                    head = f"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                    leaver.sendall(head.encode() + body)
                    wait_until(lambda: service.metrics.queued_sequences._value.get() == 10)
                wait_until(lambda: metric(service, "abandoned_total") == 1)
                slow.go.set()
                assert first.result(PATIENCE).status_code == 200
                assert httpx2.post(f"{url}/score", json={"responses": ["c"]}).status_code == 200
            assert slow.sequences == 2

    def test_a_request_that_takes_too_long_is_503(self, model: RewardModel) -> None:
        with served(model, llama_adapter(), request_timeout=0.3) as service, running(service.app()) as url:
            slow = Slow(service)
            answer = httpx2.post(f"{url}/score", json={"responses": ["a"]}, timeout=PATIENCE)
            assert (answer.status_code, answer.json()["error"]) == (503, "no answer within 0.3 s")
            slow.go.set()

    def test_a_defect_is_500_and_says_no_more(self, model: RewardModel) -> None:
        with served(model, llama_adapter()) as service:
            service.reader.tokenization.tokenize_each = lambda batch: 1 / 0  # type: ignore[method-assign]
            try:
                with TestClient(service.app(), base_url=LOCAL, raise_server_exceptions=False) as client:
                    answer = client.post("/score", json={"responses": ["a"]})
            finally:
                del service.reader.tokenization.tokenize_each
        assert answer.status_code == 500
        assert answer.json() == {"error": "a defect of the server; its log has the traceback"}

    def test_a_failing_model_is_500_for_that_request_and_no_other(self, model: RewardModel) -> None:
        with served(model, llama_adapter()) as service, TestClient(service.app(), base_url=LOCAL) as client:
            inner = service.batcher._score

            def score(sequences: Sequence[list[int]]) -> Sequence[float]:
                if len(sequences) == 3:
                    raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")
                return [float("nan")] * 2 if len(sequences) == 2 else inner(sequences)

            service.batcher._score = score
            failed = client.post("/score", json={"responses": ["a", "b", "c"]})
            assert failed.status_code == 500
            assert "RuntimeError: CUBLAS_STATUS_ALLOC_FAILED" in failed.json()["error"]
            no_number = client.post("/score", json={"responses": ["a", "b"]})
            assert (no_number.status_code, "not a number" in no_number.json()["error"]) == (500, True)
            assert client.post("/score", json={"responses": ["a"]}).status_code == 200
            assert client.get("/health").status_code == 200

    def test_a_dead_model_thread_turns_health_to_503(self, model: RewardModel) -> None:
        with served(model, llama_adapter()) as service, TestClient(service.app(), base_url=LOCAL) as client:

            def score(sequences: Sequence[list[int]]) -> Sequence[float]:
                raise SystemExit

            service.batcher._score = score
            answer = client.post("/score", json={"responses": ["a"]})
            assert answer.status_code == 503
            found = client.get("/health")
            assert (found.status_code, found.json()["status"]) == (503, "failed")


class TestLoad:
    """64 clients at once: every answer is the offline score of that client's own text."""

    @pytest.mark.slow
    def test_nothing_is_lost_or_crossed(self, url: str, service: Service, model: RewardModel) -> None:
        prompts = [f"Question {i}: what is the capital of France? " * (1 + i % 3) for i in range(16)]
        wanted: dict[tuple[str, str], float] = {}
        for prompt in prompts:
            answers = [f"Paris, says {i}." for i in range(8)]
            [scores] = offline(model, as_turns(prompt, answers))
            wanted |= {(prompt, answer): score for answer, score in zip(answers, scores, strict=True)}
        batches = metric(service, "batch_requests_count")
        ready = threading.Barrier(64)
        limits = httpx2.Limits(max_connections=64, max_keepalive_connections=64)

        def ask(number: int) -> int:
            prompt, count = prompts[number % 16], 0
            ready.wait(PATIENCE)
            for turn in range(4):
                answers = [f"Paris, says {(number + turn + i) % 8}." for i in range(1 + (number + turn) % 4)]
                if (number + turn) % 3:
                    body: dict[str, Any] = {"prompt": prompt, "responses": answers}
                    scores = client.post("/score", json=body).json()["scores"]
                else:
                    texts = model.tokenization.texts(as_turns(prompt, answers))
                    scores = client.post("/get_reward", json={"query": texts}).json()["rewards"]
                assert scores == CLOSE([wanted[prompt, answer] for answer in answers], abs=1e-5)
                count += len(scores)
            return count

        with httpx2.Client(base_url=url, timeout=PATIENCE, limits=limits) as client, ThreadPoolExecutor(64) as clients:
            counts = list(clients.map(ask, range(64)))
        assert sum(counts) == sum(1 + (number + turn) % 4 for number in range(64) for turn in range(4))
        together = 256 / (metric(service, "batch_requests_count") - batches)
        assert together > 2, f"{together:.1f} requests a batch"
