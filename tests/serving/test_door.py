"""`qlora-rm serve` as a user starts and stops it."""

import json
import signal
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest

from qlora_rm.artifacts.golden import make_golden
from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.cli import main
from qlora_rm.config import ServeConfig
from qlora_rm.errors import UserError
from qlora_rm.preferences import Candidates
from qlora_rm.serving.run import check_address, make_service
from tests.reward_models_for_tests import HELD_OUT, HELD_OUT_TEXT, copy_of, edit_json, llama_adapter
from tests.serving.servers_for_tests import PATIENCE, Door, running, wait_until


@pytest.mark.slow
def test_from_start_to_an_orderly_end(model: RewardModel, tmp_path: Path) -> None:
    """With a token, SIGTERM arrives while requests wait. All are answered, and the status is 0."""
    token = tmp_path / "token"
    token.write_text("secret\nnot read\n")
    words = ("--token_file", str(token), "--tokens_per_batch", "600")  # many batches
    door = Door(llama_adapter(), *words, log=tmp_path / "log")
    headers = {"Authorization": "Bearer secret"}
    with httpx2.Client(base_url=door.url(), headers=headers, timeout=PATIENCE) as client:
        assert client.get("/health").json()["status"] == "ready"
        assert client.post("/score", json={"responses": [1]}).status_code == 422
        assert client.post("/score", json={"responses": ["a"]}, headers={"Authorization": "x"}).status_code == 401
        item = HELD_OUT[0]
        body = {"prompt": item.prompt, "responses": [r[0]["content"] for r in item.responses] * 40}  # type: ignore[index]
        with ThreadPoolExecutor(8) as clients:
            asked = [clients.submit(client.post, "/score", json=body) for _ in range(8)]
            wait_until(lambda: "qlora_rm_queued_sequences 0.0" not in client.get("/metrics").text)
            door.process.send_signal(signal.SIGTERM)
            answers = [answer.result(PATIENCE) for answer in asked]
        [wanted] = model.score_candidates([item])
        assert [answer.json()["scores"] for answer in answers] == [pytest.approx(wanted * 40, abs=1e-5)] * 8
        assert door.ends() == 0
        with pytest.raises(httpx2.ConnectError):
            client.get("/health")
    assert "golden scores of 8 items" in door.said()
    assert door.said().endswith("stopped: every request is answered\n")
    assert "Traceback" not in door.said()


def program(score: str) -> str:
    """Return a program that runs the command, but replaces its model after the golden check by a function with body `score`."""
    return (
        "import sys, time, torch, qlora_rm.serving.run as run\n"
        "from qlora_rm.cli import main\n"
        "real = run.make_service\n"
        "def changed(*args):\n"
        "    service = real(*args)\n"
        "    def score(sequences):\n"
        f"        {score}\n"
        "    service.batcher._score = score\n"
        "    return service\n"
        "run.make_service = changed\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )


@pytest.mark.slow
def test_a_dead_model_ends_the_process(tmp_path: Path) -> None:
    code = program("raise torch.AcceleratorError('CUDA error: unspecified launch failure')")
    door = Door(llama_adapter(), log=tmp_path / "log", code=code)
    answer = httpx2.post(f"{door.url()}/score", json={"responses": ["a"]}, timeout=PATIENCE)
    assert (answer.status_code, "model has failed" in answer.json()["error"]) == (503, True)
    assert door.ends() == 1
    assert "unspecified launch failure" in door.said()
    assert "the model thread died" in door.said()


@pytest.mark.slow
def test_the_time_to_stop_has_an_end(tmp_path: Path) -> None:
    """Ctrl-C arrives while the model is stuck."""
    code = program(f"print('begun', file=sys.stderr, flush=True); time.sleep({10 * PATIENCE})")
    door = Door(llama_adapter(), "--stop_timeout", "1", log=tmp_path / "log", code=code)
    url = door.url()
    with ThreadPoolExecutor(1) as clients:
        asked = clients.submit(httpx2.post, f"{url}/score", json={"responses": ["a"]}, timeout=PATIENCE)
        wait_until(lambda: "begun" in door.said())
        door.process.send_signal(signal.SIGINT)
        assert door.ends() == 1
        assert isinstance(asked.exception(PATIENCE), httpx2.HTTPError) or asked.result().status_code == 503
    assert "stopped with work unfinished after 1 s" in door.said()
    assert "Traceback" not in door.said()


class TestWhatIsNotServed:
    def test_a_model_whose_scores_have_moved(self, tmp_path: Path, capsys: Any) -> None:
        folder = copy_of(llama_adapter(), tmp_path / "moved")
        manifest = json.loads((folder / "rm_manifest.json").read_text())
        manifest["golden"][0]["scores"][0] += 1
        edit_json(folder / "rm_manifest.json", **manifest)
        assert main(["serve", str(folder), "--port", "0"]) == 2
        said = capsys.readouterr().err
        assert "The golden scores have moved: largest difference 1" in said
        assert f"qlora-rm verify {folder}" in said and "--skip_golden" in said

    def test_a_tokenizer_that_has_changed(self, model: RewardModel, tmp_path: Path) -> None:
        other = RewardModel(model.model, model.tokenization, model.manifest, model.autocast)
        golden = list(Manifest.load(llama_adapter()).golden)
        golden[0].token_ids[0][-1] += 1
        other.manifest = Manifest(**{**vars(model.manifest), "golden": golden})
        with pytest.raises(UserError, match="golden item 1 no longer becomes its token ids"):
            make_service(other, "there", ServeConfig())

    def test_a_model_without_golden_scores(self, model: RewardModel) -> None:
        other = RewardModel(model.model, model.tokenization, None, model.autocast)
        with pytest.raises(UserError, match="nothing proves that it scores"):
            make_service(other, "there", ServeConfig())
        service = make_service(other, "there", ServeConfig(skip_golden=True))
        assert service.batcher.close(PATIENCE)
        assert "golden" not in service.about


class TestWhatTextIs:
    """Text is read as in training, for a model trained on text, on conversations or on both."""

    @pytest.mark.parametrize("kinds", ["text", "turns", "both", "ids"])
    def test_by_its_golden_items(self, model: RewardModel, kinds: str) -> None:
        candidates = {
            "text": HELD_OUT_TEXT,
            "turns": HELD_OUT,
            "both": HELD_OUT_TEXT + HELD_OUT,
            "ids": [Candidates([5, 6], ([7, 8], [9]))],
        }[kinds]
        golden = make_golden(candidates, model.tokenization, model.score_token_ids)
        manifest = Manifest(**{**vars(model.manifest), "golden": golden})
        service = make_service(RewardModel(model.model, model.tokenization, manifest, None), "there", ServeConfig())
        with running(service.app()) as url:
            prompt, answers = "What is the capital of France? ", ["Paris.", "I do not know."]
            scores = httpx2.post(f"{url}/score", json={"prompt": prompt, "responses": answers}).json()["scores"]
        assert service.batcher.close(PATIENCE)
        said = [{"role": "user", "content": prompt}], tuple([{"role": "assistant", "content": a}] for a in answers)
        as_trained = Candidates(*said) if kinds in ("turns", "both") else Candidates(prompt, tuple(answers))
        assert scores == pytest.approx(model.score_candidates([as_trained])[0], abs=1e-5)


class TestAddresses:
    @pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "localhost", "::1"])
    def test_this_machine_needs_no_token(self, host: str) -> None:
        check_address(ServeConfig(host=host), None)

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "example.org"])
    def test_others_do(self, host: str) -> None:
        with pytest.raises(UserError, match="can be reached from other machines"):
            check_address(ServeConfig(host=host), None)
        check_address(ServeConfig(host=host), "secret")
        check_address(ServeConfig(host=host, allow_anonymous=True), None)


def test_mistakes_are_told_before_the_model_is_loaded(tmp_path: Path, capsys: Any) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\nsecret")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, message in (
            (["--port", port], f"Cannot listen on 127.0.0.1 port {port}: Address already in use"),
            (["--port", "70000"], "--port 70000 must lie between"),
            (["--host", "0.0.0.0"], "QLORA_RM_TOKEN"),
            (["--token_file", str(tmp_path / "none")], "cannot be read"),
            (["--token_file", str(empty)], "holds no token on its first line"),
            (["--max_body_bytes", "0"], "--max_body_bytes 0 must be above 0"),
            (["--max_wait_ms", "-1"], "--max_wait_ms -1.0 must not be negative"),
            (["--port", "0"], "There is no folder ./no_model"),
        ):
            assert main(["serve", "./no_model", *words]) == 2
            assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_packages_it_needs_are_named(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("qlora_rm.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # as if not installed
    assert main(["serve", "./no_model"]) == 2
    assert "Serving needs uvicorn: pip install 'qlora_rm[serve]'" in capsys.readouterr().err
