"""PPO of trl 1.12, in its own environment, reads our scores, and a policy learns from them."""

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.exporting.choice import reader_named
from tests.consumers.conftest import ANIMALS, BACKBONES
from tests.consumers.overlays import HERE, overlay, run_in

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "ppo_trl.py"
SETTINGS = {
    "total_episodes": 960, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1, "num_mini_batches": 1,
    "num_ppo_epochs": 4, "local_rollout_forward_batch_size": 32, "learning_rate": 2e-4, "response_length": 10, "stop_token": "eos",
    "temperature": 1.0, "kl_coef": 0.5, "num_sample_generations": 0, "bf16": False, "gradient_checkpointing": False,
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "seed": 0,
}  # fmt: skip


@pytest.mark.long
@pytest.mark.slow
def test_ppo_reads_the_golden_scores(world, toy):
    """Holds for the trained model and for every architecture that is exported for PPO."""
    folders = [world.exported, *map(toy, BACKBONES)]
    read = json.loads(run_in(overlay("trl-1.12"), HERE / "in_trl_1_12.py", *map(str, folders)).splitlines()[-1])
    for folder in folders:
        golden = [score for item in Manifest.load(folder).golden for score in item.scores]
        assert read[str(folder)] == pytest.approx(golden, abs=1e-4), folder
    names = {json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0] for folder in folders}
    assert reader_named("trl-ppo").architectures == names


@pytest.mark.long
@pytest.mark.slow
def test_a_policy_learns_from_our_rewards(world, tmp_path):
    """The policy starts out willing half the time, and the reward model prefers willing. Its score and its words change."""
    given = {
        "reward_model": world.exported,
        "policy": world.policy,
        "prompts": world.rows,
        "output_dir": tmp_path,
    } | SETTINGS
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    printed = run_in(overlay("trl-1.12"), RECIPE, *words)
    scores = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))
    assert len(scores) == 30
    liked = (
        sum(item.scores[0] for item in world.manifest.golden[:8]) / 8
    )  # golden items are held-out pairs, chosen first
    assert sum(scores[-8:]) / 8 > sum(scores[:2]) / 2 + 0.3 * liked, scores
    assert willing(world.policy) < 0.6, "the policy was to begin undecided"
    assert willing(tmp_path) > 0.7
    assert "mean score of the first" in printed


def willing(policy: Path) -> float:
    """Return the probability that the policy begins its answer as the reward model prefers.

    With a small KL penalty (kl_coef 0.02), a policy was seen to exploit a small reward model: the score rose, with other words.
    """
    tokenizer, model = AutoTokenizer.from_pretrained(policy), AutoModelForCausalLM.from_pretrained(policy).eval()
    asked = [[{"role": "user", "content": f"Name the {animal}, number 7."}] for animal in ANIMALS]
    texts = [tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) for turns in asked]
    wanted = tokenizer("Gladly", add_special_tokens=False)["input_ids"][0]
    chances = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        chances.append(model(ids).logits[0, -1].softmax(-1)[wanted].item())
    return sum(chances) / len(chances)
