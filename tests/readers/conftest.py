"""A small world for readers: a policy, a reward model trained on preferences in 4 bit, and its exports."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from qlora_rm.artifacts.exporting.export import export
from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.artifacts.merge import merge
from qlora_rm.config import ExportConfig
from qlora_rm.demo.backbone import Recipe, write_backbone
from qlora_rm.training.run import main as train

ANIMALS = ("cat", "dog", "bird", "fish", "horse", "cow")
READERS = ["transformers", "trl", "trl-ppo", "openrlhf", "verl-critic", "vllm", "rewardbench"]
SETTINGS = {
    "eval_fraction": 0.1, "max_steps": 40, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "learning_rate": 3e-3,
    "lora_r": 4, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "disable_tqdm": True, "eval_strategy": "no",
    "save_strategy": "no",
}  # fmt: skip


@dataclass(frozen=True)
class World:
    """Folders: the policy (the reward model's backbone, too), the adapter, the merged model, and an export of it."""

    policy: Path
    rows: Path
    adapter: Path
    merged: Path
    exported: Path

    @property
    def manifest(self) -> Manifest:
        return Manifest.load(self.exported)


def polite_rows(count: int, seed: int = 0) -> list[dict]:
    """Rows whose better answer is the willing one; a language model of both answers is willing half the time."""
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
    """The exported folder as this project scores with it."""
    return RewardModel.load(str(world.exported))
