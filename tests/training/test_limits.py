"""Checks before training: tokens and positions without an embedding, and rotary scaling that depends on length."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient
from transformers import AutoConfig, AutoModelForSequenceClassification

from qlora_rm import cli
from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.backbone.layouts import FIRST, LAST
from qlora_rm.backbone.rotary import depends_on_length
from qlora_rm.config import ServeConfig
from qlora_rm.errors import UserError
from qlora_rm.evaluation.scored_rows import score_rows
from qlora_rm.exporting.export import export
from qlora_rm.merging.merge import merge
from qlora_rm.serving.run import make_service
from qlora_rm.training.run import main
from qlora_rm.verification.folder import verify
from tests.models_for_tests import SWITCH, save_backbone
from tests.reward_models_for_tests import make_reward_model
from tests.tokenizers_for_tests import small_tokenizer
from tests.training.conftest import preference_rows, write_rows

POSITIONS = {"gpt2": 512, "bert": 512, "roberta": 509, "opt": 512}  # small_tokenizer's pad is 2: RoBERTa begins at 3


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made: dict[str, str] = {}

    def make(architecture: str) -> str:
        if architecture not in made:
            folder = tmp_path_factory.mktemp(architecture)
            made[architecture] = save_backbone(folder, architecture, small_tokenizer())
        return made[architecture]

    return make


def failing(checks: list[Any]) -> list[str]:
    return [f"{check.name}: {check.detail}" for check in checks if not check.ok]


@pytest.mark.parametrize("architecture", POSITIONS)
def test_more_than_there_are_positions_for_is_refused_before_loading(
    architecture: str, flags: Any, backbone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_rm.training.run.load_model", None)
    monkeypatch.setattr("qlora_rm.training.run.load_preferences", None)
    given = flags(model_name_or_path=backbone(architecture), max_length=POSITIONS[architecture] + 1)
    with pytest.raises(UserError, match=f"--max_length {POSITIONS[architecture]}\\."):
        main(given)


def test_a_file_s_max_length_is_the_user_s_too(flags: Any, backbone: Any, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("max_length: 600\n")
    with pytest.raises(UserError, match="more than the 512 positions"):
        main([*flags(model_name_or_path=backbone("gpt2")), "--config", str(tmp_path / "run.yaml")])


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "where"), [("roberta", FIRST), ("gpt2", LAST)])
def test_a_default_that_is_too_long_is_lowered_and_said(
    architecture: str, where: str, flags: Any, backbone: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A row longer than the positions is still used for training: its prompt is truncated."""
    long = {"prompt": "name the cat. " * 300, "chosen": "a cat", "rejected": "a dog, no"}
    rows = write_rows(
        tmp_path / "rows.jsonl", [*preference_rows(20), *[long | {"prompt": f"{i} {long['prompt']}"} for i in range(4)]]
    )
    main(flags(model_name_or_path=backbone(architecture), dataset=rows, max_steps=2, eval_steps=2, save_steps=2))
    said, positions = capfd.readouterr().err, POSITIONS[architecture]
    assert said.count(f"max_length: {positions}, since") == 1 and "the default is 1024" in said
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.contract.max_length, manifest.contract.score_position) == (positions, where)
    assert max(len(ids) for item in manifest.golden for ids in item.token_ids) == positions
    assert failing(verify(str(tmp_path / "out"))) == []
    main(
        flags(model_name_or_path=backbone(architecture), dataset=rows, max_steps=2, resume="auto")
    )  # lowered to the same length again


@pytest.mark.slow
def test_positions_that_the_configuration_hides_are_found_in_the_loaded_model(
    flags: Any, backbone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_rm.training.limits.positions_of_config", lambda *_: None)
    with pytest.raises(UserError, match="more than the 512 positions"):
        main(flags(model_name_or_path=backbone("gpt2"), max_length=600))


@pytest.mark.slow
def test_a_rotary_backbone_beyond_what_it_was_made_for_is_said_once(
    flags: Any, backbone: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    main(flags(model_name_or_path=backbone("llama"), max_length=600, max_steps=1))
    assert capfd.readouterr().err.count("--max_length 600 is more than the 512 positions") == 1


def edges(folder: Path) -> tuple[Path, str]:
    """Return a BERT whose contract exceeds its positions (by an earlier version), and rows with one too long."""
    model = make_reward_model(folder, "bert", quantization="none", max_length=1024)
    rows = [*preference_rows(6), {"prompt": "word " * 600, "chosen": "a", "rejected": "b"}]
    return model, write_rows(folder / "rows.jsonl", rows)


@pytest.mark.slow
def test_one_row_beyond_the_positions_is_its_own_fault_everywhere(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, rows = edges(tmp_path)
    model = RewardModel.load(str(folder))
    lines = Path(rows).read_text().splitlines()
    scored = list(score_rows(model, lines, rows, on_bad_row="skip"))
    assert [row.get("scores") is not None for row in scored] == [True] * 6 + [False]
    assert "the model has positions for 512" in scored[-1]["error"]
    with pytest.raises(UserError, match=r"row 7: a sequence of \d+ tokens; the model has positions for 512"):
        list(score_rows(model, lines, rows))
    assert cli.main(["eval", str(folder), "--dataset", rows, "--on_bad_row", "skip", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    assert report["comparisons"] == 6
    assert report["data"]["read"]["data"]["skipped"]["beyond_positions"]["count"] == 1
    service = make_service(model, str(folder), ServeConfig())
    with TestClient(service.app(), base_url="http://localhost", raise_server_exceptions=False) as client:
        for path, body in {
            "/score": {"prompt": "word " * 600, "responses": ["a"]},
            "/get_reward": {"query": ["word " * 600]},
            "/classify": {"input": ["word " * 600]},
        }.items():
            answer = client.post(path, json=body)
            assert (answer.status_code, "positions for 512" in answer.json()["error"]) == (422, True)
    service.batcher.close(5)


BAD_IDS = {
    "beyond": (5000, "holds token id 5000; the model has token ids 0 to"),
    "first beyond": (None, "the model has token ids 0 to"),
    "ignored label": (-100, "holds token id -100"),
    "beyond int32": (2**31, f"holds token id {2**31}"),
    "beyond int64": (2**70, f"holds token id {2**70}"),
    "boolean": (True, "chosen_ids holds true at place 2"),
    "number": (7.0, "chosen_ids holds 7.0 at place 2"),
    "padding": (2, "pad token"),
}


@pytest.mark.parametrize("name", BAD_IDS)
def test_an_id_that_is_no_token_s_is_a_row_s_fault_everywhere(
    name: str, flags: Any, tmp_path: Path, reward_model: tuple[Path, RewardModel], capfd: pytest.CaptureFixture[str]
) -> None:
    folder, model = reward_model
    token, told = BAD_IDS[name]
    token = len(model.tokenizer) if token is None else token
    good = [{"chosen_ids": [5, 6, 20 + i], "rejected_ids": [5, 6, 60 + i]} for i in range(8)]
    bad = {"chosen_ids": [5, 6, token], "rejected_ids": [5, 6]}
    rows = write_rows(tmp_path / "rows.jsonl", [*good[:4], bad, *good[4:]])
    with pytest.raises(UserError, match=r"row 5: ") as train_says:
        main(flags(dataset=rows, eval_fraction=0, eval_strategy="no"))
    with pytest.raises(UserError, match=r"row 5: ") as score_says:
        list(score_rows(model, Path(rows).read_text().splitlines(), rows))
    assert told in str(train_says.value) and told in str(score_says.value)
    scored = list(score_rows(model, Path(rows).read_text().splitlines(), rows, on_bad_row="skip"))
    assert [row.get("scores") is None for row in scored] == [False] * 4 + [True] + [False] * 4
    assert cli.main(["eval", str(folder), "--dataset", rows, "--on_bad_row", "skip", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["comparisons"] == 8
    service = make_service(model, str(folder), ServeConfig())
    with TestClient(service.app(), base_url="http://localhost", raise_server_exceptions=False) as client:
        answer = client.post("/score", json={"prompt": [5, 6], "responses": [[7], [token]]})
        assert answer.status_code == 422 and answer.json()["error"]
    service.batcher.close(5)


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RewardModel]:
    folder = make_reward_model(tmp_path_factory.mktemp("rm"), quantization="none", max_length=100)
    return folder, RewardModel.load(str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["phi3_long", "llama_dynamic"])
def test_one_rotation_from_training_to_the_last_reader(
    architecture: str, flags: Any, backbone: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Chosen and rejected on both sides of the switch: trained, served, merged, exported, loaded by stock code."""
    rows = [row | {"rejected": row["rejected"] + " and no more of it" * 4} for row in preference_rows(40)]
    given = {"model_name_or_path": backbone(architecture), "dataset": write_rows(tmp_path / "rows.jsonl", rows)}
    main(flags(**given, max_length=128, max_steps=6, share_prefix="true", quantization="none"))
    assert "rotary scaling: that of 128 tokens" in capfd.readouterr().err
    out, merged = tmp_path / "out", tmp_path / "merged"
    manifest = Manifest.load(out)
    sequences = [ids for item in manifest.golden for ids in item.token_ids]
    golden = [score for item in manifest.golden for score in item.scores]
    assert manifest.contract.rotary_length == 128
    assert min(map(len, sequences)) <= SWITCH < max(map(len, sequences))
    assert failing(verify(str(out))) == []
    served = RewardModel.load(str(out))
    alone = [served.score_token_ids([ids]).item() for ids in reversed(sequences)]
    assert alone == pytest.approx(golden[::-1], abs=1e-4)

    merge(str(out), str(merged), dtype="fp32")
    assert not depends_on_length(AutoConfig.from_pretrained(merged))
    assert failing(verify(str(merged))) == []
    exported = export(str(merged), ["transformers"], str(tmp_path / "exported"))
    assert exported.ok, failing(exported.checks)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "exported").eval()
    with torch.no_grad():
        read = [float(stock(torch.tensor([ids])).logits[0, 0]) for ids in sequences]
    assert read == pytest.approx(golden, abs=1e-4)
    refused = export(str(out), ["peft"], str(tmp_path / "peft"))
    assert [check.name for check in refused.checks if not check.ok] == ["peft: base rotates sequences as in training"]


@pytest.mark.slow
def test_short_runs_keep_the_rotation_that_every_reader_of_the_adapter_chooses(
    flags: Any, backbone: Any, tmp_path: Path
) -> None:
    main(flags(model_name_or_path=backbone("phi3_long"), max_length=SWITCH, max_steps=2, quantization="none"))
    assert export(str(tmp_path / "out"), ["peft"], str(tmp_path / "peft")).ok
