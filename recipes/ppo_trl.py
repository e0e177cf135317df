"""PPO against a reward model of qlora-rm, with the last TRL that has a PPOTrainer.

    pip install trl==1.12.0        # in an environment of its own: this project trains with a later TRL
    qlora-rm export MERGED --for trl-ppo --policy POLICY --output REWARD_MODEL
    python recipes/ppo_trl.py --reward_model REWARD_MODEL --policy POLICY --prompts ROWS.jsonl --output_dir runs/ppo

ROWS.jsonl holds a `prompt` a row, text or turns. Every other option is one of TRL's PPOConfig. Policy and reward model
must share their tokens and chat template. What is left behind: the policy, and the mean score of each update in
scores.json.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    set_seed,
)

try:
    from trl.experimental.ppo import PPOConfig, PPOTrainer
except ImportError:
    raise SystemExit(f"This is trl {trl.__version__}, which has no PPO any more: pip install trl==1.12.0") from None


@dataclass
class Names:
    reward_model: str = field(metadata={"help": "Folder that `qlora-rm export --for trl-ppo` wrote."})
    policy: str = field(metadata={"help": "Folder or hub id of the causal language model to train."})
    prompts: str = field(metadata={"help": "JSONL file with a `prompt` a row: text, or a list of turns."})


def main() -> None:
    names, args = HfArgumentParser((Names, PPOConfig)).parse_args_into_dataclasses()
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(names.reward_model, padding_side="left")  # its pad token, too
    policy, reference = (AutoModelForCausalLM.from_pretrained(names.policy) for _ in range(2))
    reward_model, value_model = (
        AutoModelForSequenceClassification.from_pretrained(names.reward_model, num_labels=1) for _ in range(2)
    )
    prompts = read_prompts(names.prompts, tokenizer)
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=prompts,
        eval_dataset=prompts,
    )
    trainer.train()
    scores = [entry["objective/scores"] for entry in trainer.state.log_history if "objective/scores" in entry]
    output = Path(args.output_dir)
    (output / "scores.json").write_text(json.dumps(scores), encoding="utf-8")
    policy.save_pretrained(output)
    tokenizer.save_pretrained(output)
    few = max(1, len(scores) // 10)
    first, last = sum(scores[:few]) / few, sum(scores[-few:]) / few
    print(f"mean score of the first {few} updates {first:.3f}, of the last {few} {last:.3f}; policy in {output}")


def read_prompts(path: str, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Token ids of the prompts, turns with the template's invitation to answer."""
    rows = [json.loads(line)["prompt"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
    ids = []
    for prompt in rows:
        is_text = isinstance(prompt, str)
        text = prompt if is_text else tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        ids.append(tokenizer(text, add_special_tokens=is_text)["input_ids"])
    return Dataset.from_dict({"input_ids": ids})


if __name__ == "__main__":
    main()
