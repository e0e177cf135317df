"""`qlora-rm train` in one process: what it writes, and that a resumed run gives the result of an uninterrupted one."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.errors import UserError
from qlora_rm.training.arguments import TrainingConfig
from qlora_rm.training.run import main
from qlora_rm.training.trainer import PreferenceTrainer
from tests.models_for_tests import save_backbone
from tests.tokenizers_for_tests import small_tokenizer
from tests.training.conftest import ANIMALS, preference_rows, write_rows

ROOT = Path(__file__).resolve().parents[2]


def weights(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def log(folder):
    return json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]


def assert_equal_adapters(one, two):
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0, msg=name)


@pytest.mark.slow
def test_a_run_leaves_a_model_that_scores_as_it_was_trained(flags, tmp_path, capfd):
    main(flags(max_steps=40, eval_steps=20, save_steps=20))
    out = tmp_path / "out"
    said = capfd.readouterr().err
    assert "engine: single, 1 process on cpu, fp32" in said and "held-out accuracy" in said
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert all((out / f"checkpoint-{step}" / "COMPLETE").exists() for step in (20, 40))
    saved = weights(out)
    assert any("score" in name for name in saved)
    assert all(w.dtype == torch.float32 and w.numel() > 0 for w in saved.values())
    losses = [entry["loss"] for entry in log(out) if "loss" in entry]
    assert losses[-1] < losses[0]
    manifest = Manifest.load(out)
    assert manifest.training.steps == 40 and manifest.reward.n == 48 and manifest.golden
    model = RewardModel.load(str(out))
    for item in manifest.golden:
        assert model.score_candidates([item.candidates()])[0] == pytest.approx(item.scores, abs=1e-5)


@pytest.mark.slow
def test_what_it_learned_holds_on_unseen_prompts(flags, tmp_path):
    main(flags(max_steps=60, eval_steps=60, save_steps=60))
    last = [entry for entry in log(tmp_path / "out") if "eval_accuracy" in entry][-1]
    assert last["eval_accuracy"] > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("order", ["random", "group_by_length"])
def test_resume_ends_with_the_very_adapter_of_the_uninterrupted_run(flags, tmp_path, order):
    through, resumed = tmp_path / "through", tmp_path / "resumed"
    main(flags(output_dir=str(through), train_sampling_strategy=order))
    resumed.mkdir()
    shutil.copytree(through / "checkpoint-4", resumed / "checkpoint-4")
    # a later checkpoint whose save was interrupted must not be used
    shutil.copytree(
        through / "checkpoint-8", resumed / "checkpoint-6", ignore=shutil.ignore_patterns("COMPLETE", "optimizer.pt")
    )
    main(flags(output_dir=str(resumed), resume_from_checkpoint="auto", train_sampling_strategy=order))
    assert_equal_adapters(weights(through), weights(resumed))
    assert [e["loss"] for e in log(through) if "loss" in e] == [e["loss"] for e in log(resumed) if "loss" in e]


@pytest.mark.slow
def test_sharing_prompts_changes_no_adapter(flags, tmp_path):
    """Compare thirty optimizer steps that compute each shared prompt once with plain padded batches."""
    shared, plain = tmp_path / "shared", tmp_path / "plain"
    steps = {"max_steps": 30, "eval_steps": 30, "save_steps": 30}
    main(flags(output_dir=str(shared), share_prefix="true", **steps))
    main(flags(output_dir=str(plain), share_prefix="false", **steps))
    one, two = weights(shared), weights(plain)
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], rtol=0, atol=1e-4, msg=name)


@pytest.mark.slow
def test_a_run_is_not_resumed_on_other_data(flags, tmp_path):
    main(flags())
    other = write_rows(tmp_path / "other.jsonl", preference_rows(96, seed=1))
    with pytest.raises(UserError, match="not what the checkpoint"):
        main(flags(dataset=other, max_steps=12, resume_from_checkpoint="auto"))


@pytest.mark.slow
def test_old_checkpoints_go_and_the_run_is_not_overwritten(flags, tmp_path):
    main(flags(save_steps=2, save_total_limit=2))
    assert sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    with pytest.raises(UserError, match="--resume auto"):
        main(flags())
    (tmp_path / "out/checkpoint-8/COMPLETE").unlink()
    with pytest.raises(UserError, match=r"COMPLETE file is missing.*checkpoint-6"):
        main(flags(resume_from_checkpoint=str(tmp_path / "out/checkpoint-8")))


@pytest.mark.slow
def test_zero_head_starts_at_ln_2(flags, tmp_path):
    main(flags(head_init_std=0, max_steps=1, logging_steps=1, center_rewards_coefficient=0))
    assert log(tmp_path / "out")[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice",
    [
        {"quantization": "8bit"},
        {"quantization": "none"},
        {"use_dora": True, "use_rslora": True, "lora_dropout": 0.1},
        {"label_smoothing": 0.1, "per_device_eval_batch_size": 5},
        {"gradient_checkpointing": True},
        {"train_sampling_strategy": "group_by_length"},
        {"group_by_prompt": True},
        {"report_to": "tensorboard"},
    ],
    ids=lambda choice: "-".join(choice),
)
def test_choices_train_and_reload(flags, tmp_path, choice):
    main(flags(max_steps=2, **choice))
    manifest = Manifest.load(tmp_path / "out")
    model = RewardModel.load(str(tmp_path / "out"))
    for item in manifest.golden:
        assert model.score_candidates([item.candidates()])[0] == pytest.approx(
            item.scores, abs=2e-2 if "8bit" in choice.values() else 1e-5
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice", [{}, {"ties": "half"}, {"ties": "rao_kupper"}, {"objective": "plackett_luce"}], ids=str
)
def test_k_responses(flags, tmp_path, choice, capfd):
    def row(i, ranks):
        return {"prompt": f"{i}: name the cat. ", "responses": [f"a {a}{i % 2}" for a in ANIMALS[:4]], "ranks": ranks}

    rows = [row(i, [1, 2, 2, 4]) for i in range(20)] + [row(i, [1, 1, 1, 1]) for i in range(20, 24)]
    main(flags(dataset=write_rows(tmp_path / "k.jsonl", rows), max_steps=4, **choice))
    accuracy = [entry["eval_accuracy"] for entry in log(tmp_path / "out") if "eval_accuracy" in entry]
    assert accuracy[-1] > 0.9
    assert ("of ties alone" in capfd.readouterr().err) == ("ties" not in choice)


@pytest.mark.slow
def test_an_adapter_and_its_head_go_on_from_where_they_were(flags, tmp_path):
    main(flags(output_dir=str(tmp_path / "first")))
    main(
        flags(
            output_dir=str(tmp_path / "second"),
            adapter=str(tmp_path / "first"),
            model_name_or_path=None,
            learning_rate=0.0,
            max_steps=1,
        )
    )
    assert_equal_adapters(weights(tmp_path / "first"), weights(tmp_path / "second"))


@pytest.mark.slow
def test_the_textbook_example_runs_as_written(tmp_path):
    """recipes/distilbert.yaml, with a small DistilBERT and rows made here."""
    backbone = save_backbone(tmp_path / "distilbert", "distilbert", small_tokenizer())
    turns = [
        {
            "prompt": r["prompt"],
            **{
                k: [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r[k]}]
                for k in ("chosen", "rejected")
            },
        }
        for r in preference_rows(40)
    ]
    rows = write_rows(tmp_path / "rows.jsonl", turns)
    main(
        [
            "--config", str(ROOT / "recipes/distilbert.yaml"), "--model_name_or_path", backbone, "--dataset", rows, "--bf16", "false",
            "--dataset_split", "train", "--eval_fraction", "0.2", "--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true",
            "--chat_template_path", str(ROOT / "recipes/templates/human_assistant.jinja"),
        ]
    )  # fmt: skip
    model = RewardModel.load(str(tmp_path / "out"))
    for item in Manifest.load(tmp_path / "out").golden:
        assert model.score_candidates([item.candidates()])[0] == pytest.approx(item.scores, abs=1e-5)


@pytest.mark.slow
def test_pre_tokenized_rows_under_the_old_names(flags, tmp_path):
    tokenizer = small_tokenizer()
    rows = []
    for r in preference_rows(40):
        row = {}
        for side in ("chosen", "rejected"):
            ids = tokenizer(r["prompt"] + r[side])["input_ids"] + [tokenizer.eos_token_id]
            row |= {f"input_ids_{side}": ids, f"attention_mask_{side}": [1] * len(ids)}
        rows.append(row)
    main(flags(dataset=write_rows(tmp_path / "ids.jsonl", rows), max_steps=2))
    assert Manifest.load(tmp_path / "out").training.steps == 2


MISTAKES = {
    "unknown flag": ({"lerning_rate": 1}, "learning_rate"),
    "no backbone": ({"model_name_or_path": None}, "--model_name_or_path"),
    "no data": ({"dataset": None}, "--dataset"),
    "no such file": ({"dataset": "nowhere.jsonl"}, "nowhere.jsonl"),
    "no such backbone": ({"model_name_or_path": "./nowhere"}, "nowhere"),
    "not a number": ({"max_steps": "many"}, "max_steps"),
    "whole model in 4 bit": ({"use_lora": False}, "--quantization none"),
    "bad choice": ({"over_long": "cut"}, "over_long"),
    "responses over max_length": ({"max_length": 3}, "max_length"),
    "nothing held out": ({"eval_fraction": 0}, "eval"),
    "other engine": ({"engine": "zero3"}, "zero3"),
    "resume from nowhere": ({"resume_from_checkpoint": "nowhere"}, "nowhere"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_in_one_message(flags, mistake):
    changes, named = MISTAKES[mistake]
    with pytest.raises(UserError) as told:
        main(flags(**changes))
    assert named in str(told.value) and "\n\n" not in str(told.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("lerning_rate: 1\n", "learning_rate"),
        ("[1, 2]", "mapping"),
        ("a: [", "YAML"),
        ("max_steps: many\n", "max_steps"),
        ("ties: rao-kupper\n", "rao_kupper"),
        ("on_bad_row: Error\n", "error, skip"),
    ],
)
def test_mistakes_in_the_yaml(flags, tmp_path, text, named):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=named):
        main(["--config", str(path), *flags(max_steps=None)])


@pytest.mark.slow
def test_flags_beat_yaml_and_yaml_beats_defaults(flags, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: 2\nlora_r: 2\nlora_target_modules: q_proj\nshare_prefix: true\n")
    main(["--config", str(path), *flags(max_steps=None), "--lora_r", "3"])
    assert Manifest.load(tmp_path / "out").training.steps == 2
    adapter = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert adapter["r"] == 3 and adapter["target_modules"] == ["q_proj"], "a single word in YAML is a list of one"


def test_an_output_that_cannot_be_written_stops_before_anything_is_loaded(flags, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        main(flags(output_dir=str(tmp_path / "file" / "out")))


@pytest.mark.slow
def test_one_process_trains_on_one_of_several_cards(flags, tmp_path, monkeypatch, capfd):
    """transformers 5.23 would use all GPUs through nn.DataParallel, which TRL refuses once the weights are loaded."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)  # simulates four GPUs; the process is on the CPU,
    monkeypatch.setattr(TrainingConfig, "_settle_on_cpu", lambda args: None)  # where this would set `use_cpu`
    main(flags(max_steps=1))
    assert Manifest.load(tmp_path / "out").training.steps == 1
    said = capfd.readouterr().err
    assert "engine: single, 1 process" in said
    assert "1 of the 4 cards it sees" in said and "--num_processes 4" in said


@pytest.mark.slow
@pytest.mark.parametrize("empty_file", [False, True])
def test_a_save_that_writes_no_weights_is_no_finished_run(flags, tmp_path, monkeypatch, empty_file):
    """transformers' trainer can save a model without weights and only log a warning."""

    def save(trainer, folder):
        if empty_file:
            save_file({}, Path(folder) / "adapter_model.safetensors")

    monkeypatch.setattr(PreferenceTrainer, "save_model", save)
    with pytest.raises(RuntimeError, match="none of adapter_model"):
        main(flags(max_steps=1, save_strategy="no"))
    assert not (tmp_path / "out/rm_manifest.json").exists()


@pytest.mark.long
@pytest.mark.slow
def test_ctrl_c_leaves_the_last_checkpoint_whole(flags, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "qlora_rm/train.py", *flags(max_steps=100_000, save_steps=3, eval_steps=50_000)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(out.glob("checkpoint-*/COMPLETE")) and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "Traceback" not in said and "go on with --resume auto" in said
    last = max(out.glob("checkpoint-*/COMPLETE"), key=lambda p: int(p.parent.name.split("-")[1])).parent
    step = int(last.name.split("-")[1])
    main(flags(max_steps=step + 2, save_steps=1000, resume_from_checkpoint="auto"))
    assert Manifest.load(out).training.steps == step + 2
