"""If a model is trained on one day and used on another, its template renders the day of training everywhere."""

import json
import shutil
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient
from transformers import AutoTokenizer

from qlora_rm.artifacts.golden import SAME
from qlora_rm.artifacts.hashes import hash_files
from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import FILE_NAME, Manifest, hash_of_template
from qlora_rm.errors import UserError
from qlora_rm.exporting.export import export
from qlora_rm.exporting.requantize import requantize
from qlora_rm.merging.merge import merge
from qlora_rm.preferences.clock import original
from qlora_rm.training import clock
from qlora_rm.training.run import main
from qlora_rm.verification.folder import verify
from tests.clocks_for_tests import DAY_OF_TRAINING, DAYS_LATER, READS_CLOCK, set_clock
from tests.models_for_tests import save_backbone
from tests.serving.servers_for_tests import served
from tests.tokenizers_for_tests import small_tokenizer
from tests.training.conftest import preference_rows, write_rows

DATE = "2024-07-26"


def command(folder: Path, output: Path, **changes: Any) -> list[str]:
    options = {
        "model_name_or_path": folder / "backbone",
        "dataset": folder / "rows.jsonl",
        "eval_fraction": 0.25,
        "output_dir": output,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "save_steps": 2,
        "eval_steps": 4,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    } | changes
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `backbone`, `rows.jsonl` and `model`, trained half a minute before midnight."""
    folder = tmp_path_factory.mktemp("clock")
    save_backbone(folder / "backbone", "llama", small_tokenizer(chat_template=READS_CLOCK))
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in preference_rows(32)
    ]
    write_rows(folder / "rows.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        set_clock(patch, DAY_OF_TRAINING)
        main(command(folder, folder / "model"))
    return folder


@pytest.fixture(autouse=True)
def _days_later(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch, DAYS_LATER)


def failed(folder: Path) -> list[str]:
    return [f"{check.name}: {check.detail}" for check in verify(str(folder)) if not check.ok]


def stock_ids(folder: Path) -> list[list[list[int]]]:
    """Return the token ids that plain transformers gives the golden conversations."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    golden = Manifest.load(folder).golden
    return [[tokenizer.apply_chat_template([*i.prompt, *r])["input_ids"] for r in i.responses] for i in golden]


def assert_scores_as_trained(model: RewardModel) -> None:
    assert model.manifest is not None
    for item in model.manifest.golden:
        assert model.score_candidates([item.candidates()])[0] == pytest.approx(item.scores, abs=SAME.absolute)


def test_the_date_is_recorded_and_written_into_the_template(trained: Path) -> None:
    contract = Manifest.load(trained / "model").contract
    assert (contract.date, contract.trained_on, contract.text_as) == (DATE, ["turns"], "turns")
    template = AutoTokenizer.from_pretrained(trained / "model").chat_template
    assert original(template) == READS_CLOCK
    assert "Today Date: 26 Jul 2024" in small_tokenizer(chat_template=template).apply_chat_template(
        [{"role": "user", "content": "?"}], tokenize=False
    )


@pytest.mark.slow
def test_scores_and_ids_are_those_of_training(trained: Path) -> None:
    assert failed(trained / "model") == []
    model = RewardModel.load(str(trained / "model"))
    assert_scores_as_trained(model)
    item = min(Manifest.load(trained / "model").golden, key=lambda item: len(item.token_ids[0]))
    with served(model, trained / "model") as service, TestClient(service.app(), base_url="http://localhost") as client:
        answer = client.post("/score", json={"prompt": item.prompt, "responses": item.responses}).json()
    assert answer["scores"] == pytest.approx(item.scores, abs=SAME.absolute)


@pytest.mark.slow
def test_merged_requantized_and_exported_it_renders_that_day(trained: Path, tmp_path: Path) -> None:
    merge(str(trained / "model"), str(tmp_path / "merged"), dtype="fp32")
    requantize(str(tmp_path / "merged"), str(tmp_path / "in 4 bit"))
    exported = export(str(tmp_path / "merged"), ["transformers"], str(tmp_path / "exported"))
    assert exported.ok, [check for check in exported.checks if not check.ok]
    for name in ("merged", "in 4 bit", "exported"):
        assert Manifest.load(tmp_path / name).contract.date == DATE
        whole = [item.token_ids for item in Manifest.load(tmp_path / name).golden]
        assert [a == b for a, b in zip(stock_ids(tmp_path / name), whole, strict=True)].count(
            False
        ) <= 1  # the truncated one
    assert failed(tmp_path / "merged") == []
    assert f"renders {DATE}" in (tmp_path / "exported/README.md").read_text()


@pytest.mark.slow
def test_a_resumed_run_reads_the_data_it_began_with(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    shutil.copytree(trained / "model/checkpoint-2", tmp_path / "out/checkpoint-2")
    main(command(trained, tmp_path / "out", resume_from_checkpoint="auto"))
    through, resumed = Manifest.load(trained / "model"), Manifest.load(tmp_path / "out")
    assert resumed.contract == through.contract
    assert resumed.training is not None and resumed.training == through.training
    assert [item.scores for item in resumed.golden] == [pytest.approx(item.scores, abs=1e-6) for item in through.golden]


@pytest.mark.slow
def test_an_adapter_that_is_trained_on_keeps_its_date(trained: Path, tmp_path: Path) -> None:
    main(command(trained, tmp_path / "out", adapter=trained / "model", max_steps=1, save_steps=1, eval_steps=1))
    assert Manifest.load(tmp_path / "out").contract.date == DATE


@pytest.mark.slow
def test_a_template_given_by_path_is_fixed_too(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(READS_CLOCK.replace("%d %b %Y", "%Y-%m-%d"))
    given = {"chat_template_path": tmp_path / "t.jinja", "max_steps": 1, "save_steps": 1, "eval_steps": 1}
    main(command(trained, tmp_path / "out", **given))
    assert Manifest.load(tmp_path / "out").contract.date == "2025-03-01"
    assert "Today Date: " in (tmp_path / "out/chat_template.jinja").read_text()


def test_every_rank_takes_the_first_one_s_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(everyones: list[Any], mine: datetime) -> None:
        everyones[:] = [DAY_OF_TRAINING, mine]

    monkeypatch.setattr(clock.torch.distributed, "all_gather_object", gather)
    tokenizer = small_tokenizer(chat_template=READS_CLOCK)
    clock.fix_training_date(tokenizer, SimpleNamespace(world_size=2), None)  # type: ignore[arg-type]
    assert "26" in tokenizer.chat_template.partition("\n")[0]


@pytest.fixture
def of_an_earlier_version(trained: Path, tmp_path: Path) -> Path:
    """The same model as version 2 would have left it: the template as the backbone has it, no date, no hashes of
    configurations."""
    folder = tmp_path / "earlier"
    shutil.copytree(trained / "model", folder)
    for place in (folder, folder / "checkpoint-2"):
        (place / "chat_template.jinja").write_text(READS_CLOCK)
        content = asdict(Manifest.load(place)) | {"schema_version": 2, "files": hash_files(place)}
        content["contract"]["chat_template_sha256"] = hash_of_template(small_tokenizer(chat_template=READS_CLOCK))
        for key in ("date", "trained_on", "text_as"):
            del content["contract"][key]
        del content["noise"], content["content_sha256"]
        (place / FILE_NAME).write_text(json.dumps(content))
    return folder


@pytest.mark.slow
def test_the_day_of_an_earlier_version_s_model_is_found_again(
    of_an_earlier_version: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert failed(of_an_earlier_version) == []
    assert capfd.readouterr().err.count(f"were rendered on {DATE}") == 1
    merge(str(of_an_earlier_version), str(tmp_path / "merged"), dtype="fp32")
    assert failed(tmp_path / "merged") == []
    assert export(str(of_an_earlier_version), ["peft"], str(tmp_path / "exported")).ok
    assert stock_ids(tmp_path / "exported")[:4] == [
        item.token_ids for item in Manifest.load(of_an_earlier_version).golden[:4]
    ]


def test_an_earlier_version_s_checkpoint_is_not_resumed_on_another_day(of_an_earlier_version: Path) -> None:
    tokenizer = small_tokenizer(chat_template=READS_CLOCK)
    args: Any = SimpleNamespace(world_size=1, trust_remote_code=False)
    with pytest.raises(UserError, match="did not record the date"):
        clock.fix_training_date(tokenizer, args, of_an_earlier_version / "checkpoint-2")


def test_a_model_of_others_renders_one_day_as_long_as_it_is_loaded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    merge(str(trained / "model"), str(tmp_path / "theirs"), dtype="fp32")
    (tmp_path / "theirs" / FILE_NAME).unlink()
    (tmp_path / "theirs/chat_template.jinja").write_text(READS_CLOCK)
    model = RewardModel.load(str(tmp_path / "theirs"))
    assert "this process renders 2025-03-01" in capfd.readouterr().err
    item = Manifest.load(trained / "model").golden[0].candidates()
    before = model.score_candidates([item])
    set_clock(monkeypatch, DAY_OF_TRAINING)
    assert model.score_candidates([item]) == before
