"""Every comparison has the same weight in its optimizer step: training is compared with a plain PyTorch loop."""

import json
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid

from qlora_rm.backbone.tokenizer import load_tokenizer
from qlora_rm.errors import UserError
from qlora_rm.preferences import Tokenization, load_preferences
from qlora_rm.training.arguments import parse
from qlora_rm.training.limits import fit_max_length
from qlora_rm.training.run import _make_trainer, load_model, main
from tests.launching import launch
from tests.training.conftest import ANIMALS, preference_rows, write_rows

RATE, CENTRING = 0.1, 0.01
BATCH, ACCUMULATION = 4, 2
PLAIN_SGD = {
    "optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0,
    "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATION, "max_steps": -1, "num_train_epochs": 2,
    "logging_steps": 1, "eval_strategy": "no", "save_strategy": "no", "eval_fraction": 0, "center_rewards_coefficient": CENTRING,
}  # fmt: skip
ORDERS = ("random", "sequential", "group_by_length")


def weighted_pairs(count):
    rows = preference_rows(count)
    for i, row in enumerate(rows):
        row |= {"margin": 0.1 * (i % 5), "weight": [0.5, 1.0, 3.0, 0.1][i % 4]}
        row["chosen"] += " indeed" * (i % 3)
    return rows


def rankings(count):
    return [
        {
            "prompt": f"{i}: name the cat. ",
            "responses": [f"a {a}{' or so' * (i % 3)}" for a in ANIMALS[: 2 + i % 4]],
            "ranks": [1, 2, 2, 4, 5][: 2 + i % 4],
        }
        for i in range(count)
    ]


def trained(flags):
    """Train, and return the trainer, its weights before and after, and the comparisons of each step."""
    options = parse(flags)
    tokenizer = load_tokenizer(options.backbone.model_name_or_path)
    data = load_preferences(options.data, Tokenization(tokenizer, 1024, "error"), need_eval=False)
    trainer = _make_trainer(
        options, load_model(options, tokenizer, fit_max_length(options)), tokenizer, data.train, None
    )
    before = adapter(trainer.model)
    batches, collate = [], trainer.data_collator

    def recorded(rows):
        batches.append(rows)
        return collate(rows)

    trainer.data_collator = recorded
    trainer.train()
    taken = iter(batches)
    steps = []
    while step := list(islice(taken, trainer.args.gradient_accumulation_steps)):
        steps.append([row for batch in step for row in batch if len(row["response_ids"]) > 1])
    return trainer, before, steps, data.train


def adapter(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def plain_loss(model, row):
    """Return the weighted loss of one comparison, with its responses scored one by one."""
    scores = [
        model(input_ids=torch.tensor([row["prompt_ids"] + ids]), attention_mask=torch.ones(1, len(row["prompt_ids"] + ids))).logits[0, 0]
        for ids in row["response_ids"]
    ]  # fmt: skip
    pairs = [
        -logsigmoid(scores[i] - scores[j] - m) + CENTRING * (scores[i] + scores[j]) ** 2
        for (i, j), m in zip(row["wins"], row["margins"], strict=True)
    ]
    return row["weight"] * sum(pairs) / len(pairs)


def step_by_hand(model, before, steps):
    """Return the mean loss of each step, and leave the model with the weights that plain gradient descent gives."""
    model.train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in parameters.items():
        parameter.data.copy_(before[name])
    means = []
    for step in steps:
        loss = sum(plain_loss(model, row) for row in step) / len(step)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for parameter, gradient in zip(parameters.values(), gradients, strict=True):
            if gradient is not None:
                parameter.data -= RATE * gradient
        means.append(loss.item())
    return means


def identity(row):
    return str(row["prompt_ids"]) + str(row["response_ids"])


@pytest.mark.slow
@pytest.mark.parametrize("drop_last", [False, True], ids=["", "drop_last"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("make", [weighted_pairs, rankings])
def test_every_order_takes_the_steps_of_plain_pytorch(flags, tmp_path, order, make, drop_last):
    """13 comparisons: a step of 8, and one of 5, or of 4 if the last micro-batch is dropped; for two epochs."""
    rows = write_rows(tmp_path / "rows.jsonl", make(13))
    asked = {**PLAIN_SGD, "dataset": rows, "train_sampling_strategy": order, "dataloader_drop_last": drop_last}
    trainer, before, steps, data = trained(flags(**asked))
    kept = 12 if drop_last else 13
    assert [len(step) for step in steps] == [8, kept - 8] * 2
    everything = [identity(row) for row in data]
    for epoch in (steps[:2], steps[2:]):
        seen = [identity(row) for step in epoch for row in step]
        assert len(set(seen)) == kept and set(seen) <= set(everything)
        assert order != "sequential" or seen == everything[:kept]
    after = adapter(trainer.model)
    means = step_by_hand(trainer.model, before, steps)
    by_hand = adapter(trainer.model)
    assert max((after[name] - before[name]).abs().max() for name in after) > 0.01
    for name, weight in after.items():
        torch.testing.assert_close(weight, by_hand[name], rtol=1e-3, atol=2e-5, msg=name)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(means, rel=1e-4)


@pytest.mark.slow
def test_logged_metrics_are_those_of_the_whole_step(flags, tmp_path):
    """A short last step, whose second micro-batch holds one comparison: it counts as much as one of the first's four."""
    rows = write_rows(tmp_path / "rows.jsonl", preference_rows(13))
    asked = {**PLAIN_SGD, "dataset": rows, "train_sampling_strategy": "sequential", "num_train_epochs": 1}
    trainer, _, steps, _ = trained(flags(**asked | {"learning_rate": 0}))
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for step, entry in zip(steps, logged, strict=True):
        scores = [
            [
                trainer.model(input_ids=torch.tensor([row["prompt_ids"] + ids])).logits.item()
                for ids in row["response_ids"]
            ]
            for row in step
        ]
        margins = [pair[row["wins"][0][0]] - pair[row["wins"][0][1]] for pair, row in zip(scores, step, strict=True)]
        assert entry["accuracy"] == pytest.approx(sum(m > 0 for m in margins) / len(step))
        assert entry["margin"] == pytest.approx(sum(margins) / len(step), abs=1e-5)
        assert entry["mean_reward"] == pytest.approx(sum(map(sum, scores)) / (2 * len(step)), abs=1e-5)
        assert entry["min_reward"] == pytest.approx(min(map(min, scores)), abs=1e-5)


@pytest.mark.slow
def test_dropping_the_last_micro_batch_keeps_the_evaluation_whole(flags, tmp_path):
    """21 held-out comparisons in batches of 16: none of them is dropped."""
    asked = {"eval_fraction": 0.22, "learning_rate": 0, "max_steps": 1, "save_strategy": "no"}
    found = []
    for drop_last in (False, True):
        main(flags(output_dir=str(tmp_path / str(drop_last)), dataloader_drop_last=drop_last, **asked))
        state = json.loads((tmp_path / str(drop_last) / "trainer_state.json").read_text())
        found.append([entry for entry in state["log_history"] if "eval_loss" in entry][-1])
    for name in ("eval_loss", "eval_accuracy", "eval_mean_reward"):
        assert found[0][name] == pytest.approx(found[1][name], abs=1e-6)


def test_dropping_everything_is_an_error(flags, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", preference_rows(3))
    with pytest.raises(UserError, match=r"--dataloader_drop_last.*3 comparisons.*--per_device_train_batch_size"):
        main(flags(**{**PLAIN_SGD, "dataset": rows, "dataloader_drop_last": True}))


@pytest.mark.long
@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(backbone_folder, tmp_path):
    """Two ranks, each accumulating half as many micro-batches; 13 comparisons, so that the last step is short."""
    rows = write_rows(tmp_path / "rows.jsonl", weighted_pairs(13))
    asked = {
        **PLAIN_SGD,
        "dataset": rows,
        "train_sampling_strategy": "sequential",
        "model_name_or_path": backbone_folder,
    }
    asked |= {"bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}

    def run(name, start, **changes):
        options = asked | {"output_dir": tmp_path / name} | changes
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        start(words)
        return json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]

    def two_ranks(words):
        done = launch("cpu_ddp", words)
        assert done.returncode == 0, done.stderr[-5000:]

    alone, together = run("one", main), run("two", two_ranks, gradient_accumulation_steps=1)
    assert_same(tmp_path / "one", tmp_path / "two")
    losses = [[entry["loss"] for entry in log if "loss" in entry] for log in (alone, together)]
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-4)


def assert_same(one, two):
    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (one, two))
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=2e-5, msg=name)
