"""The complete workflow on real rows: train 50 steps on a small backbone, evaluate, merge, verify."""

import json

import pytest

from qlora_rm.cli import main
from tests.models_for_tests import save_backbone
from tests.real_data import REAL_DATA
from tests.tokenizers_for_tests import tokenizer_of

# number of faulty rows in files that need the skip option; see SOURCES and tests/preferences/test_real_data.py
FAULTY = {"hh": 4, "pandalm": 60}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory, shared_data) -> str:
    """A small Llama whose tokenizer was trained on the English and Chinese rows themselves."""
    texts = (shared_data / "llamafactory_dpo_demo/data").glob("dpo_*_demo.json")
    corpus = [
        json.dumps(row, ensure_ascii=False) for path in texts for row in json.loads(path.read_text(encoding="utf-8"))
    ]
    tokenizer = tokenizer_of(corpus, 4096)
    return save_backbone(tmp_path_factory.mktemp("backbone"), "llama", tokenizer)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_DATA)
def test_train_evaluate_merge_verify(name, backbone, shared_data, tmp_path, capsys):
    rows = str(REAL_DATA[name](shared_data, tmp_path))
    model, merged = str(tmp_path / "model"), str(tmp_path / "merged")
    flags = {
        "model_name_or_path": backbone, "dataset": rows, "eval_fraction": 0.1, "max_eval_comparisons": 40, "on_bad_row": "skip",
        "max_length": 512, "ties": "half", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 50,
        "eval_steps": 50, "save_steps": 50, "learning_rate": 1e-3, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True,
        "output_dir": model,
    }  # fmt: skip
    assert main(["train", *(word for flag, value in flags.items() for word in (f"--{flag}", str(value)))]) == 0
    trained = json.loads((tmp_path / "model/rm_manifest.json").read_text(encoding="utf-8"))["training"]
    skipped = trained["data_report"]
    assert trained["steps"] == 50
    if name in FAULTY:
        assert str(FAULTY[name]) in json.dumps(skipped) or "empty_response" in json.dumps(skipped)
    capsys.readouterr()
    assert main(["eval", model, "--dataset", rows, "--on_bad_row", "skip", "--json"]) == 0
    accuracy = json.loads(capsys.readouterr().out)["overall"]["accuracy"]
    assert main(["merge", model, "--output", merged, "--dtype", "fp32"]) == 0
    capsys.readouterr()
    assert main(["verify", merged]) == 0, capsys.readouterr().out
    assert 0 < accuracy < 1
