"""`from qlora_rm import RewardModel, train`: what the docstrings show works, and an import alone costs nothing."""

import doctest
import subprocess
import sys
from pathlib import Path

import pytest

import qlora_rm
from qlora_rm import Outcome, RewardModel, UserError, train
from qlora_rm.artifacts import load
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.evaluation.scored_rows import rank
from qlora_rm.merging.merge import merge
from qlora_rm.training import interface
from tests.models_for_tests import save_backbone
from tests.reward_models_for_tests import llama_adapter
from tests.tokenizers_for_tests import small_tokenizer
from tests.training.conftest import preference_rows, write_rows

PROMPT, RESPONSES = "Name it. ", ["a cat", "a dog and a bird"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with what the examples name."""
    folder = tmp_path_factory.mktemp("project")
    demo = folder / "runs" / "demo"
    (demo / "data").mkdir(parents=True)
    save_backbone(demo / "backbone", "llama", small_tokenizer())
    write_rows(demo / "data" / "train.jsonl", preference_rows(32))
    merge(str(llama_adapter()), str(demo / "merged"), dtype="fp32")
    return folder


@pytest.fixture(scope="module")
def model(runs) -> RewardModel:
    return RewardModel.load(runs / "runs/demo/merged")


def test_a_model_scores_as_the_command_does(model):
    scores = model.score(PROMPT, RESPONSES)
    assert sorted(zip(scores, RESPONSES, strict=True), reverse=True) == rank(model, PROMPT, RESPONSES)


def test_a_batch_gives_the_scores_of_one_by_one(model):
    turns = [{"role": "user", "content": "Name it."}]
    together = model.score_batch([(PROMPT, RESPONSES), (turns, RESPONSES[:1])])
    assert together[0] == pytest.approx(model.score(PROMPT, RESPONSES), abs=1e-5)
    assert together[1] == pytest.approx(model.score(turns, RESPONSES[:1]), abs=1e-5)


def test_a_mistake_names_the_prompt(model):
    with pytest.raises(UserError, match="prompt 2"):
        model.score_batch([(PROMPT, RESPONSES), (PROMPT, [])])


@pytest.mark.parametrize("option", [{"learning_rat": 1e-3}, {"quantization": "3bit"}], ids=str)
def test_an_option_that_cannot_be_is_named(option, tmp_path):
    with pytest.raises(UserError, match=next(iter(option))):
        train({"output_dir": tmp_path / "out", **option})


@pytest.mark.slow
def test_a_run_returns_its_folder_and_metrics(runs):
    given = {
        "model_name_or_path": runs / "runs/demo/backbone", "dataset": str(runs / "runs/demo/data/train.jsonl"), "output_dir": runs / "out",
        "eval_fraction": 0.25, "max_steps": 2, "lora_r": 4, "report_to": "none",
    }  # fmt: skip
    outcome = train(given)
    assert isinstance(outcome, Outcome)
    assert outcome.folder == runs / "out"
    assert 0 <= outcome.metrics["eval_accuracy"] <= 1
    assert Manifest.load(outcome.folder).training.steps == 2


@pytest.mark.slow
def test_the_examples_run(runs, monkeypatch):
    monkeypatch.chdir(runs)
    ran = 0
    for module in (load, interface):
        for test in doctest.DocTestFinder(recurse=True).find(module):
            text = [example for example in test.examples if example.source.strip()]
            for example in text:
                example.source = example.source.replace('"max_steps": 100', '"max_steps": 1, "eval_strategy": "no"')
            result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=lambda _: None)
            assert not result.failed, test.name
            ran += bool(text)
    assert ran == 3
    assert (runs / "runs/mine/rm_manifest.json").exists()


def test_an_import_loads_no_library():
    code = "import sys, time; start = time.perf_counter(); import qlora_rm; print(time.perf_counter() - start, 'torch' in sys.modules)"
    seconds, torch_loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert torch_loaded == "False"
    assert float(seconds) < 0.2


def test_the_public_names():
    assert all(getattr(qlora_rm, name) for name in qlora_rm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = qlora_rm.other
