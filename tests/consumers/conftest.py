"""Fixtures for consumers: a policy, a reward model trained on preferences in 4 bit, and its exports."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.config import ExportConfig
from qlora_rm.demo.backbone import Recipe, write_backbone
from qlora_rm.exporting.choice import reader_named
from qlora_rm.exporting.export import export
from qlora_rm.merging.merge import merge
from qlora_rm.training.run import main as train
from tests.reward_models_for_tests import make_reward_model
from tests.tokenizers_for_tests import ENDS_WITH_EOS, small_tokenizer

ANIMALS = ("cat", "dog", "bird", "fish", "horse", "cow")
BACKBONES = (
    "llama",
    "llama_far",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_far",
    "phi3",
    "gpt2",
)
"""Every architecture of the allow-lists, and rotary parameters that are not the default ones."""
ROWS = 512  # embedding rows; some models' tokenizer classes add their own tokens
READERS = ["transformers", "trl", "trl-ppo", "openrlhf", "verl-critic", "vllm", "rewardbench"]
SETTINGS = {
    "eval_fraction": 0.1, "max_steps": 40, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 3e-3,
    "lora_r": 4, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True, "eval_strategy": "no",
    "save_strategy": "no",
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """Folders: the policy (also the reward model's backbone), the adapter, the merged model, and an export of it."""

    policy: Path
    rows: Path
    adapter: Path
    merged: Path
    exported: Path

    @property
    def manifest(self) -> Manifest:
        return Manifest.load(self.exported)


def polite_rows(count: int, seed: int = 0) -> list[dict]:
    """Make rows whose better answer is the willing one. A language model trained on both answers is willing half the time."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        animal = draw.choice(ANIMALS)
        asked = [{"role": "user", "content": f"Name the {animal}, number {draw.randrange(100)}."}]
        answers = [[{"role": "assistant", "content": text}] for text in (f"Gladly, a {animal}.", f"Never, a {animal}.")]
        rows.append({"prompt": asked, "chosen": answers[0], "rejected": answers[1]})
    return rows


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    folder = tmp_path_factory.mktemp("world")
    made = World(*(folder / name for name in ("policy", "rows.jsonl", "adapter", "merged", "exported")))
    rows = polite_rows(256)
    made.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = Recipe(vocab_size=384, hidden_size=64, intermediate_size=128, layers=2, steps=150)
    write_backbone(
        made.policy, [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")], recipe=recipe
    )
    places = {"model_name_or_path": made.policy, "dataset": made.rows, "output_dir": made.adapter}
    train([word for name, value in (places | SETTINGS).items() for word in (f"--{name}", str(value))])
    merge(str(made.adapter), str(made.merged), dtype="fp32")
    exported = export(str(made.merged), READERS, str(made.exported), ExportConfig(policy=str(made.policy)))
    assert exported.ok, [check for check in exported.checks if not check.ok]
    return made


@pytest.fixture(scope="session")
def ours(world) -> RewardModel:
    """The exported folder, loaded by this project."""
    return RewardModel.load(str(world.exported))


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Callable[[str], Path]:
    """The export of an untrained reward model of one architecture, for every consumer that accepts it. Made once."""
    made: dict[str, Path] = {}

    def export_of(backbone: str) -> Path:
        if backbone not in made:
            made[backbone] = make_toy(tmp_path_factory.mktemp(backbone), backbone)
        return made[backbone]

    return export_of


def make_toy(folder: Path, backbone: str) -> Path:
    tokenizer = small_tokenizer(bos=False, chat_template=ENDS_WITH_EOS)
    model = make_reward_model(folder, backbone, quantization="none", tokenizer=tokenizer, rows=ROWS, max_length=None)
    merge(str(model), str(folder / "merged"), dtype="fp32")
    architecture = json.loads((folder / "merged/config.json").read_text(encoding="utf-8"))["architectures"][0]
    names = [
        reader.name
        for reader in map(reader_named, ("trl-ppo", "rewardbench", "openrlhf", "verl-critic"))
        if reader.architectures is None or architecture in reader.architectures
    ]
    exported = export(str(folder / "merged"), names, str(folder / "exported"))
    assert exported.ok, [check for check in exported.checks if not check.ok]
    return folder / "exported"
