"""A small backbone and small preferences on disk, and runs of `qlora-rm train` over them."""

import json
import random
from pathlib import Path

import pytest

from tests.models_for_tests import save_backbone
from tests.tokenizers_for_tests import small_tokenizer
from tests.training.forking import Forks

ANIMALS = ("cat", "dog", "bird", "fish", "horse", "cow")


def preference_rows(count: int, seed: int = 0) -> list[dict]:
    """Return rows whose better answer names the animal asked for."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        right, wrong = draw.sample(ANIMALS, 2)
        rows.append({"prompt": f"{i}: name the {right}. ", "chosen": f"a {right}", "rejected": f"a {wrong}, no"})
    return rows


def write_rows(path: Path, rows: list[dict]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> str:
    return save_backbone(tmp_path_factory.mktemp("backbone"), "llama", small_tokenizer())


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory) -> str:
    return write_rows(tmp_path_factory.mktemp("rows") / "pairs.jsonl", preference_rows(96))


@pytest.fixture(scope="package")
def forks():
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture
def flags(backbone_folder, rows_file, tmp_path):
    """The command line of a short run; keyword arguments replace or add options, None removes one."""

    def make(**changes) -> list[str]:
        options = {
            "model_name_or_path": backbone_folder,
            "dataset": rows_file,
            "eval_fraction": 0.25,
            "output_dir": str(tmp_path / "out"),
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "learning_rate": 3e-3,
            "max_steps": 8,
            "logging_steps": 2,
            "eval_steps": 4,
            "save_steps": 4,
            "bf16": False,
            "gradient_checkpointing": False,
            "disable_tqdm": True,
        } | changes
        return [
            word
            for name, value in options.items()
            if value is not None
            for word in (f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)]))
        ]

    return make
