"""What the trainer keeps, checks and batches."""

import torch
from torch import nn

from qlora_rm.training.checkpoints import begin, checkpoints, last_whole, mark_whole, prune
from qlora_rm.training.collate import Collator
from qlora_rm.training.curves import draw_curves
from qlora_rm.training.engine import engine_in_force
from qlora_rm.training.trainer import keep_trainables


def test_a_cast_of_the_trainables_is_undone_to_the_bit():
    model = nn.Linear(3, 3)
    model.is_loaded_in_4bit = True
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with keep_trainables(model):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    assert all(p.dtype == torch.float32 and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_batch_names_every_sequence_once_and_pairs_by_index():
    rows = [
        {
            "prompt_ids": [1, 2],
            "response_ids": [[3], [4, 5], []],
            "wins": [[1, 0]],
            "ties": [[0, 2]],
            "margins": [0.5],
            "weight": 2.0,
        },
        {"prompt_ids": [], "response_ids": [[6], [7]], "wins": [[0, 1]], "ties": [], "margins": [0.0], "weight": 1.0},
    ]
    batch = Collator(pad_token_id=0)(rows)
    assert next(iter(batch)) == "weight" and len(batch["weight"]) == 2, (
        "readers take the first tensor's length as batch size"
    )
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0], [1, 2, 4, 5], [1, 2, 0, 0], [6, 0, 0, 0], [7, 0, 0, 0]]
    assert batch["attention_mask"].sum(-1).tolist() == [3, 4, 2, 1, 1]
    assert batch["wins"].tolist() == [[1, 0], [3, 4]] and batch["win_comparison"].tolist() == [0, 1]
    assert batch["ties"].tolist() == [[0, 2]] and batch["comparison"].tolist() == [0, 0, 0, 1, 1]


def test_whole_checkpoints_are_told_from_broken_ones(tmp_path):
    for step in (5, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-old").mkdir()
    assert [p.name for p in checkpoints(str(tmp_path))] == ["checkpoint-5", "checkpoint-10", "checkpoint-100"]
    assert last_whole(str(tmp_path)) is None
    mark_whole(tmp_path / "checkpoint-10")
    mark_whole(tmp_path / "checkpoint-5")
    assert last_whole(str(tmp_path)) == tmp_path / "checkpoint-10"


def test_two_ranks_without_an_engine_have_no_good_name():
    assert engine_in_force(nn.Linear(1, 1), 1, torch.device("cpu")).name == "single"
    assert engine_in_force(nn.Linear(1, 1), 2, torch.device("cpu")).name not in ("single", "ddp")


def test_curves_are_drawn_from_whatever_the_log_holds(tmp_path):
    draw_curves([], tmp_path / "empty.png")
    draw_curves(
        [{"step": 1, "loss": 0.7, "accuracy": 0.5}, {"step": 2, "eval_loss": 0.6, "eval_accuracy": 0.6}],
        tmp_path / "some.png",
    )
    assert (tmp_path / "some.png").stat().st_size > (tmp_path / "empty.png").stat().st_size > 1000


def test_old_checkpoints_go_by_what_is_whole(tmp_path):
    """A damaged or later one is kept and not counted; one whose save was interrupted is removed."""
    for step in (2, 4, 6, 8, 9, 10, 12):
        folder = tmp_path / f"checkpoint-{step}"
        begin(folder)
        (folder / "state").write_text("x" * step)
        if step == 8:
            (folder / "INCOMPLETE").unlink()
        elif step != 9:
            mark_whole(folder)
    (tmp_path / "checkpoint-6/state").write_text("cut")
    prune(str(tmp_path), 1, str(tmp_path / "checkpoint-2"), upto=10)
    assert [path.name for path in checkpoints(str(tmp_path))] == [f"checkpoint-{step}" for step in (2, 6, 8, 10, 12)]
