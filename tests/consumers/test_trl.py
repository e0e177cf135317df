"""TRL's online trainers take an exported folder as `reward_funcs`, and in one step give the same rewards as this project."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from qlora_rm.artifacts.load import RewardModel
from qlora_rm.preferences import Candidates
from tests.consumers.snippets import run_snippet

COMMON = {
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
    "use_cpu": True,
}
PAYS = {
    "grpo": (GRPOTrainer, "_calculate_rewards"),
    "rloo": (RLOOTrainer, "_calculate_rewards"),
    "online_dpo": (OnlineDPOTrainer, "_calculate_rewards_from_functions"),
}


def arguments(name: str, folder):
    if name == "online_dpo":
        return OnlineDPOConfig(output_dir=str(folder), max_new_tokens=10, **COMMON)
    config = GRPOConfig if name == "grpo" else RLOOConfig
    return config(output_dir=str(folder), max_completion_length=10, num_generations=2, **COMMON)


def prompts_of(world, form: str) -> Dataset:
    prompts = [json.loads(line)["prompt"] for line in world.rows.read_text(encoding="utf-8").splitlines()[:8]]
    return Dataset.from_dict({"prompt": prompts if form == "turns" else [turns[0]["content"] for turns in prompts]})


def one_step(name: str, form: str, world, folder, monkeypatch) -> tuple[list, list, torch.Tensor]:
    """Run one real step. Return prompts, completions and the rewards that TRL computed."""
    seen: list = []
    trainer_class, method = PAYS[name]
    pay = getattr(trainer_class, method)

    def paid(self, *words, **named):
        rewards = pay(self, *words, **named)
        prompts, completions = (
            (named["prompts"], named["completions"])
            if "prompts" in named
            else words[-3:-1]
            if len(words) > 2
            else words[:2]
        )
        seen.append((prompts, completions, rewards))
        return rewards

    monkeypatch.setattr(trainer_class, method, paid)
    policy = AutoModelForCausalLM.from_pretrained(world.policy)
    given = {"policy": policy, "args": arguments(name, folder), "prompts": prompts_of(world, form)}
    if name == "grpo":
        trainer = run_snippet(world.exported, "trl", **given)["trainer"]
    else:
        tokenizer = AutoTokenizer.from_pretrained(world.exported)
        trainer = trainer_class(
            model=policy,
            reward_funcs=str(world.exported),
            args=given["args"],
            train_dataset=given["prompts"],
            processing_class=tokenizer,
        )
    trainer.train()
    prompts, completions, rewards = seen[0]
    return list(prompts), list(completions), rewards.reshape(-1)


def our_scores(ours: RewardModel, form: str, prompts: list, completions: list) -> list[float]:
    if form == "turns":
        return [
            scores[0]
            for scores in ours.score_candidates(
                [Candidates(p, (c,)) for p, c in zip(prompts, completions, strict=True)]
            )
        ]
    texts = [f"{p}{c}" for p, c in zip(prompts, completions, strict=True)]
    return ours.score_token_ids(ours.tokenizer(texts, add_special_tokens=False)["input_ids"]).tolist()


@pytest.mark.parametrize("form", ["turns", "text"])
@pytest.mark.parametrize("name", list(PAYS))
def test_a_step_is_paid_in_our_scores(name, form, world, ours, tmp_path, monkeypatch):
    prompts, completions, rewards = one_step(name, form, world, tmp_path, monkeypatch)
    wanted = our_scores(ours, form, prompts, completions)
    assert len(wanted) >= 4
    assert rewards.tolist() == pytest.approx(wanted, abs=1e-4)
    assert rewards.std() > 0
