"""Every command gives the same text the same score, reading it like the model's training rows."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import FILE_NAME, Manifest
from qlora_rm.artifacts.trained_text import trained_text
from qlora_rm.cli import main
from qlora_rm.evaluation.scored_rows import score_rows
from qlora_rm.exporting.export import export
from qlora_rm.merging.merge import merge
from qlora_rm.preferences import Candidates, Tokenization
from qlora_rm.preferences.text_as import TrainedText
from tests.consumers.snippets import run_snippet
from tests.models_for_tests import save_backbone
from tests.serving.servers_for_tests import served
from tests.tokenizers_for_tests import CHATML, small_tokenizer
from tests.training.conftest import preference_rows, write_rows

PROMPT, ANSWERS = "Name the cat. ", ["a cat", "a dog, no", "Paris."]
SYSTEM = "Be brief."


def as_turns(prompt: str, *answers: str) -> Candidates:
    responses = tuple([{"role": "assistant", "content": answer}] for answer in answers)
    return Candidates([{"role": "user", "content": prompt}], responses)


def turned(row: dict[str, Any]) -> dict[str, Any]:
    read = as_turns(row["prompt"], row["chosen"], row["rejected"])
    return {"prompt": read.prompt, "chosen": read.responses[0], "rejected": read.responses[1]}


def tokenized(row: dict[str, Any]) -> dict[str, Any]:
    tokenizer = small_tokenizer()
    return {f"{side}_ids": tokenizer(row["prompt"] + row[side])["input_ids"] for side in ("chosen", "rejected")}


TEXT = preference_rows(24)
KINDS: dict[str, tuple[list[dict[str, Any]], str | None]] = {
    "text with a template": (TEXT, CHATML),
    "text without a template": (TEXT, None),
    "turns": ([*map(turned, TEXT)], CHATML),
    "text and turns": ([*TEXT[:12], *map(turned, TEXT[12:])], CHATML),
    "token ids": ([*map(tokenized, TEXT)], CHATML),
}
RECORDED = {
    "text with a template": (["text"], "text"),
    "text without a template": (["text"], "text"),
    "turns": (["turns"], "turns"),
    "text and turns": (["text", "turns"], "text"),
    "token ids": (["token_ids"], "text"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models trained on rows of each kind, by name of the kind."""
    made = {}
    for number, (name, (rows, template)) in enumerate(KINDS.items()):
        folder = tmp_path_factory.mktemp(f"trained{number}")
        base = save_backbone(folder / "base", "llama", small_tokenizer(chat_template=template))
        words = ["train", "--model_name_or_path", base, "--output_dir", str(folder / "model"), "--max_steps", "2"]
        words += ["--dataset", write_rows(folder / "rows.jsonl", rows), "--eval_fraction", "0.2", "--save_steps", "2"]
        words += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1", "--learning_rate", "0.01"]
        assert main([*words, "--eval_steps", "2", "--gradient_checkpointing", "False", "--disable_tqdm", "True"]) == 0
        made[name] = folder / "model"
    return made


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def wanted(kind: str, model: RewardModel, prompt: str = PROMPT, answers: list[str] = ANSWERS) -> list[float]:
    """Return the result that training would have given for this text in a row."""
    read = as_turns(prompt, *answers) if kind == "turns" else Candidates(prompt, tuple(answers))
    return model.score_candidates([read])[0]


def test_the_contract_records_what_the_training_rows_were(folders: dict[str, Path], kind: str) -> None:
    contract = Manifest.load(folders[kind]).contract
    assert (contract.trained_on, contract.text_as) == RECORDED[kind]


@pytest.mark.slow
def test_every_command_gives_the_score_of_training(
    folders: dict[str, Path], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = folders[kind]
    model = RewardModel.load(str(folder))
    close = pytest.approx(wanted(kind, model), abs=1e-4)

    assert main(["score", str(folder), "--json", "--prompt", PROMPT, "--responses", *ANSWERS]) == 0
    by_answer = {item["response"]: item["score"] for item in json.loads(capsys.readouterr().out)}
    assert [by_answer[answer] for answer in ANSWERS] == close, "score --prompt"

    rows = [{"prompt": PROMPT, "response": answer} for answer in ANSWERS] + [{"prompt": PROMPT, "responses": ANSWERS}]
    given = write_rows(tmp_path / "rows.jsonl", rows)
    assert main(["score", str(folder), "--input", given, "--output", str(tmp_path / "scored.jsonl")]) == 0
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [row["score"] for row in scored[:3]] == close, "score --input, one response a row"
    assert scored[3]["scores"] == close, "score --input, several responses a row"

    with served(model, folder) as service, TestClient(service.app(), base_url="http://localhost") as client:
        answer = client.post("/score", json={"prompt": PROMPT, "responses": ANSWERS}).json()
    assert answer["scores"] == close, "serve"

    pairs = [{"prompt": PROMPT, "chosen": ANSWERS[0], "rejected": answer} for answer in ANSWERS[1:]]
    pairs_file = write_rows(tmp_path / "pairs.jsonl", pairs)
    assert main(["eval", str(folder), "--dataset", pairs_file, "--json"]) == 0
    scores = wanted(kind, model)
    margin = sum(scores[0] - other for other in scores[1:]) / 2
    assert json.loads(capsys.readouterr().out)["overall"]["mean_margin"] == pytest.approx(margin, abs=1e-4), "eval"


def test_served_golden_items_give_their_scores(folders: dict[str, Path], kind: str) -> None:
    """This includes a model trained on text and turns, whose golden items are of both kinds."""
    model = RewardModel.load(str(folders[kind]))
    golden = Manifest.load(folders[kind]).golden
    with served(model, folders[kind]) as service, TestClient(service.app(), base_url="http://localhost") as client:
        body = [{"prompt": item.prompt, "responses": item.responses} for item in golden]
        answer = client.post("/score", json=body).json()
    assert answer["scores"] == [pytest.approx(item.scores, abs=1e-4) for item in golden]


@pytest.fixture(scope="module")
def model(folders: dict[str, Path]) -> RewardModel:
    """The model that was trained on turns."""
    return RewardModel.load(str(folders["turns"]))


@pytest.fixture
def said(model: RewardModel) -> Iterator[list[str]]:
    """The messages of reading, with none reported before."""
    lines: list[str] = []
    model.text = TrainedText(model.tokenization, "turns", {"turns"}, tell=lines.append)
    yield lines
    del model.text


class TestOfTurns:
    def scores(self, model: RewardModel, *rows: dict[str, Any], **how: Any) -> list[Any]:
        scored = score_rows(model, [json.dumps(row) for row in rows], "rows", **how)
        return [row.get("score", row.get("scores")) for row in scored]

    def test_a_system_column_goes_with_the_turns(self, model: RewardModel, said: list[str]) -> None:
        [score] = self.scores(model, {"system": SYSTEM, "prompt": PROMPT, "response": "a cat"})
        read = as_turns(PROMPT, "a cat")
        system = [{"role": "system", "content": SYSTEM}]
        assert score == pytest.approx(
            model.score_candidates([Candidates([*system, *read.prompt], read.responses)])[0][0], abs=1e-5
        )  # type: ignore[misc]

    def test_text_of_the_template_is_the_conversation_it_spells(self, model: RewardModel, said: list[str]) -> None:
        [rendered] = model.tokenization.texts(as_turns(PROMPT, "a cat"))
        before, after = rendered.split("a cat")
        found = self.scores(
            model,
            {"text": rendered},
            {"prompt": before, "response": "a cat"},
            {"prompt": before, "response": f"a cat{after.rstrip()}"},
            {"chosen": rendered, "rejected": rendered.replace("cat", "dog")},
        )
        close = pytest.approx(wanted("turns", model, answers=["a cat"])[0], abs=1e-5)
        assert [*found[:3], found[3][0]] == [close] * 4
        assert len(said) == 1 and "the conversation it spells" in said[0]

    def test_text_without_a_prompt_stays_text_and_is_told_once(self, model: RewardModel, said: list[str]) -> None:
        rows = [{"text": "Name it. a cat"}, {"response": "a cat"}, {"prompt": "", "response": "a cat"}]
        rows += [{"chosen": "Name it. a cat", "rejected": "Name it. a dog"}]
        found = self.scores(model, *rows)
        whole, alone = model.score_candidates([Candidates("", ("Name it. a cat",)), Candidates("", ("a cat",))])
        assert found[:3] == [pytest.approx(score, abs=1e-5) for score in (whole[0], alone[0], alone[0])]
        assert found[3][0] == pytest.approx(whole[0], abs=1e-5)
        assert len(said) == 1 and "no prompt apart" in said[0]

    def test_raw_hh_text_stays_text_unless_its_turns_are_asked_for(self, model: RewardModel, said: list[str]) -> None:
        text = "\n\nHuman: Name the cat.\n\nAssistant: a cat"
        before = text.removesuffix(" a cat")
        rows = [{"text": text}, {"prompt": before, "response": " a cat"}]
        assert self.scores(model, *rows) == pytest.approx(
            [model.score_candidates([Candidates("", (text,))])[0][0]] * 2, abs=1e-5
        )
        assert len(said) == 1 and "--hh_turns" in said[0]
        read = as_turns("Name the cat.", "a cat")
        assert self.scores(model, *rows, hh_turns=True) == pytest.approx(
            [model.score_candidates([read])[0][0]] * 2, abs=1e-5
        )

    def test_that_text_becomes_turns_is_told_once(self, model: RewardModel, said: list[str]) -> None:
        self.scores(model, *[{"prompt": PROMPT, "response": answer} for answer in ANSWERS])
        assert len(said) == 1 and "a user's turn" in said[0]
        self.scores(model, turned(TEXT[0]), {"prompt": [5, 6], "response": [7]})
        assert len(said) == 1, "turns and token ids are what they are"


def test_turns_for_a_model_of_text_are_rendered_with_a_warning(
    folders: dict[str, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = folders["text with a template"]
    rows = write_rows(tmp_path / "turns.jsonl", [turned(row) for row in TEXT[:3]])
    assert main(["eval", str(folder), "--dataset", rows, "--json"]) == 0
    told = capsys.readouterr()
    model = RewardModel.load(str(folder))
    scores = [model.score_candidates([as_turns(r["prompt"], r["chosen"], r["rejected"])])[0] for r in TEXT[:3]]
    assert json.loads(told.out)["overall"]["mean_margin"] == pytest.approx(sum(a - b for a, b in scores) / 3, abs=1e-4)
    assert told.err.count("trained on text, and some rows are turns") == 1


@pytest.mark.parametrize("words", [["eval", "--dataset"], ["score", "--input"]], ids=["eval", "score"])
def test_turns_are_refused_where_nothing_can_write_them(
    folders: dict[str, Path], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "turns.jsonl", [turned(TEXT[0])])
    assert main([words[0], str(folders["text without a template"]), words[1], rows]) == 2
    told = capsys.readouterr().err
    assert "turns.jsonl, row 1: the row is a conversation" in told and "Give prompt and response as text" in told


def test_what_was_not_recorded_is_read_off_the_golden_items(folders: dict[str, Path]) -> None:
    for kind in ("turns", "text with a template", "text and turns"):
        model = RewardModel.load(str(folders[kind]))
        assert model.manifest is not None
        older = replace(model.manifest, contract=replace(model.manifest.contract, trained_on=None, text_as=None))
        read = trained_text(older, model.tokenization)
        kinds, text_as = RECORDED[kind]
        assert sorted(read.trained_on) == kinds
        assert read.text_as == ("turns" if "turns" in kinds else text_as), "as earlier versions served it"


@pytest.mark.slow
def test_the_card_s_code_gives_text_to_a_model_of_text(folders: dict[str, Path], tmp_path: Path) -> None:
    """The tokenizer has a chat template, which training never used."""
    folder = folders["text with a template"]
    merge(str(folder), str(tmp_path / "merged"), dtype="fp32")
    assert export(str(tmp_path / "merged"), ["transformers"], str(tmp_path / "exported")).ok
    found = run_snippet(tmp_path / "exported", "transformers")
    [[score]] = RewardModel.load(str(folder)).score_candidates([Candidates("Why? ", ("Because.",))])
    assert [found["score"], found["same_score"]] == pytest.approx([score] * 2, abs=1e-4)


def test_without_a_manifest_the_template_decides() -> None:
    for template, text_as in ((CHATML, "turns"), (None, "text")):
        assert trained_text(None, Tokenization(small_tokenizer(chat_template=template))).text_as == text_as


@pytest.mark.slow
def test_held_out_rows_of_another_kind_are_told_and_not_golden(
    folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = folders["turns"].parent / "base"
    words = ["train", "--model_name_or_path", str(base), "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    words += ["--dataset", str(base.parent / "rows.jsonl"), "--eval_dataset", write_rows(tmp_path / "t.jsonl", TEXT)]
    assert main([*words, "--save_steps", "1", "--eval_steps", "1", "--gradient_checkpointing", "False"]) == 0
    assert "some held-out rows are text, and the training rows are turns" in capfd.readouterr().err
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.contract.trained_on == ["turns"]
    assert all(isinstance(item.responses[0], list) for item in manifest.golden)
    assert (tmp_path / "out" / FILE_NAME).exists()
