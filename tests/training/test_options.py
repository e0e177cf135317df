"""Every option of the train command has a rule, and commands are checked against them before anything is loaded."""

import json
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path

import pytest
import torch
import trl
from transformers import TrainingArguments

from qlora_rm.errors import UserError
from qlora_rm.training import option_conditions
from qlora_rm.training.arguments import DEFAULTS, TrainingConfig, parse
from qlora_rm.training.library_options import LIBRARY
from qlora_rm.training.option_rules import check_options
from qlora_rm.training.options_page import page
from qlora_rm.training.project_options import PROJECT

RULES = LIBRARY | PROJECT
ANOTHER = {
    "include_for_metrics": ["inputs"], "length_column_name": "tokens", "fsdp": "full_shard", "fsdp_config": {"fsdp_version": 2},
    "torch_compile_backend": "inductor", "torch_compile_mode": "default", "label_smoothing_factor": 0.4, "pad_to_multiple_of": 8,
    "parallelism_config": "tp", "liger_kernel_config": {"rope": True}, "model_init_kwargs": {"dtype": "auto"}, "local_rank": 0,
    "label_names": ["labels"], "dataset_num_proc": 4,
}  # fmt: skip
"""A value other than the default, for options that are not switches."""


def another(name):
    return ANOTHER[name] if name in ANOTHER else not DEFAULTS[name]


def of_kind(kind):
    return [name for name, rule in RULES.items() if rule.kind == kind]


def unclassified(*kinds):
    return {item.name for kind in kinds for item in fields(kind)} - RULES.keys()


def test_every_option_of_the_libraries_and_of_this_project_has_one_rule():
    assert unclassified(TrainingConfig, trl.RewardConfig, TrainingArguments) == set()
    assert DEFAULTS.keys() == RULES.keys(), "a rule for an option that is gone, or an option without a rule"
    assert not LIBRARY.keys() & PROJECT.keys()
    newer = make_dataclass("Newer", [("brand_new_option", bool, False)], bases=(trl.RewardConfig,))
    assert unclassified(dataclass(newer)) == {"brand_new_option"}


def test_the_page_is_what_the_tables_say():
    written = (Path(__file__).parents[2] / "docs/options.md").read_text(encoding="utf-8")
    assert written == page(), "run python -m qlora_rm.training.options_page > docs/options.md"


def test_the_defaults_pass_without_a_word():
    assert check_options(RULES, DEFAULTS, DEFAULTS, set()) == []


@pytest.mark.parametrize("name", of_kind("refused"))
def test_what_would_do_nothing_or_something_else_is_refused(name):
    with pytest.raises(UserError) as told:
        check_options(RULES, DEFAULTS | {name: another(name)}, DEFAULTS, {name})
    assert f"--{name} " in str(told.value) and RULES[name].remedy in str(told.value) and RULES[name].remedy


@pytest.mark.parametrize("name", of_kind("meaningless"))
def test_what_has_no_meaning_here_is_told_in_one_line(name):
    (note,) = check_options(RULES, DEFAULTS | {name: another(name)}, DEFAULTS, {name})
    assert note.startswith(f"--{name} ") and "has no effect: " in note and RULES[name].why in note


def test_several_are_told_at_once():
    values = DEFAULTS | {"label_smoothing_factor": 0.4, "torch_compile": True}
    with pytest.raises(UserError) as told:
        check_options(RULES, values, DEFAULTS, set())
    assert len(str(told.value).splitlines()) == 2


def test_the_command_line_and_the_yaml_file_are_refused_alike(flags, tmp_path):
    with pytest.raises(UserError, match=r"--label_smoothing_factor 0.4 smooths class labels.*Use --label_smoothing,"):
        parse(flags(label_smoothing_factor=0.4))
    path = tmp_path / "run.yaml"
    path.write_text("label_smoothing_factor: 0.4\n")
    with pytest.raises(UserError, match=r"--label_smoothing_factor 0.4 smooths class labels"):
        parse(["--config", str(path), *flags()])
    path.write_text("tie_threshold: 2.0\n")
    with pytest.raises(UserError, match=r"--tie_threshold 2.0 has no effect here.*rao_kupper"):
        parse(["--config", str(path), *flags()])
    assert parse(["--config", str(path), *flags(tie_threshold=1.0)]).objective.tie_threshold == 1.0, (
        "flags take it back"
    )
    assert parse(flags(label_smoothing_factor=0.0)).training.label_smoothing_factor == 0, "asks for nothing"


REFUSED = {
    "adam of sgd": ({"optim": "sgd", "adam_beta1": 0.8}, r"--adam_beta1 0.8 has no effect: --optim sgd"),
    "eps of lion": ({"optim": "lion_8bit", "adam_epsilon": 1e-6}, r"--adam_epsilon 1e-06 has no effect"),
    "arguments of adamw": ({"optim_args": "momentum=0.9"}, r"--optim_args momentum is not an argument of --optim adamw_torch"),
    "misspelt arguments": ({"optim": "sgd", "optim_args": "momentumm=0.9"}, r"--optim_args momentumm"),
    "no arguments": ({"optim": "sgd", "optim_args": "momentum"}, r"--optim_args momentum is not of the form"),
    "no such package": ({"optim": "adamw_anyprecision"}, r"--optim adamw_anyprecision: .*torchdistx"),
    "galore": ({"optim": "galore_adamw", "optim_target_modules": "q_proj"}, r"--optim galore_adamw: .*galore_torch"),
    "lomo": ({"optim": "lomo"}, r"--optim lomo changes weights in each backward pass"),
    "targets of adamw": ({"optim_target_modules": "q_proj"}, r"--optim_target_modules .*galore"),
    "kwargs of constant": (
        {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": '{"num_cycles": 2}'}, r"--lr_scheduler_kwargs .*no effect"
    ),
    "wrong kwargs": ({"lr_scheduler_kwargs": '{"min_lrr": 2}'}, r"--lr_scheduler_type cosine with .*min_lrr"),
    "kwargs that lack": ({"lr_scheduler_type": "cosine_with_min_lr"}, r"--lr_scheduler_type cosine_with_min_lr"),
    "no such logger": ({"report_to": "tensorbord"}, r"--report_to tensorbord is not known.*tensorboard"),
    "no logger": ({"report_to": "neptune"}, r"--report_to neptune: the package is not installed"),
    "project": ({"project": "mine"}, r"--project mine has no effect here. Add --report_to trackio"),
    "best of nothing": ({"save_strategy": "best"}, r"--save_strategy best needs a metric"),
    "best without evaluation": (
        {"load_best_model_at_end": True, "eval_strategy": "no"}, r"--load_best_model_at_end needs evaluations"
    ),
    "unknown metric": ({"metric_for_best_model": "acuracy", "load_best_model_at_end": True}, r"acuracy is not measured"),
    "metric of nothing": (
        {"metric_for_best_model": "accuracy", "eval_strategy": "no"}, r"--metric_for_best_model accuracy has no effect here"
    ),
    "comparison of nothing": ({"greater_is_better": True}, r"--greater_is_better true has no effect here"),
    "workers": ({"dataloader_persistent_workers": True}, r"--dataloader_persistent_workers true .*num_workers"),
    "context": ({"dataloader_multiprocessing_context": "spawn"}, r"--dataloader_multiprocessing_context .*num_workers"),
    "prefetch": ({"dataloader_prefetch_factor": 2}, r"--dataloader_prefetch_factor 2 .*num_workers"),
    "rebalance": ({"train_sampling_strategy": "batch_rebalance"}, r"batch_rebalance changes the sizes.*Use random"),
    "split batches": ({"accelerator_config": '{"split_batches": true}'}, r"--accelerator_config split_batches"),
    "accumulation": (
        {"accelerator_config": '{"gradient_accumulation_kwargs": {"num_steps": 2}}'}, r"--accelerator_config num_steps"
    ),
    "tpu": ({"debug": "tpu_metrics_debug"}, r"--debug tpu_metrics_debug needs a TPU"),
    "noise": ({"neftune_noise_alpha": 5}, r"--neftune_noise_alpha 5.0 .*--share_prefix false"),
    "checkpointing": ({"gradient_checkpointing_kwargs": '{"use_reentrant": false}'}, r"Add --activation_checkpointing true"),
    "smoothing of rankings": ({"objective": "plackett_luce", "label_smoothing": 0.1}, r"--label_smoothing needs"),
    "shares": ({"eval_dataset": "held_out.jsonl"}, r"--eval_fraction 0.25 has no effect here"),
    "split of a file": ({"dataset_split": "test"}, r"--dataset_split test .*Files have no splits"),
    "configuration of a file": ({"dataset_config": "en"}, r"--dataset_config en .*configurations"),
    "revision of a folder": ({"model_revision": "main"}, r"--model_revision main .*A folder has no revisions"),
    "none held out": ({"eval_fraction": 0, "max_eval_comparisons": 5}, r"--max_eval_comparisons 5"),
    "share of nothing": ({"quantization": "none", "max_unquantized": 0.5}, r"--max_unquantized 0.5"),
    "rank of no adapter": ({"use_lora": False, "quantization": "none", "lora_r": 4}, r"--lora_r 4 has no effect here"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_options_without_an_effect_beside_the_others_are_refused(flags, case):
    changes, told = REFUSED[case]
    with pytest.raises(UserError, match=told):
        parse(flags(**changes))


SAID = {
    "steps decide": ({"num_train_epochs": 3}, "--num_train_epochs 3.0 has no effect: --max_steps decides"),
    "no warm-up": ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "--warmup_steps 5.0 has no effect: this"),
    "one process": ({"ddp_bucket_cap_mb": 5}, "--ddp_bucket_cap_mb 5 has no effect: it is an option of DDP"),
    "not pushed": ({"hub_model_id": "me/it"}, "--hub_model_id me/it has no effect: it needs --push_to_hub true"),
    "no logger": ({"run_name": "mine"}, "--run_name mine has no effect: it names the run for --report_to"),
    "epochs decide": ({"save_strategy": "epoch"}, "--save_steps 4.0 has no effect: --save_strategy decides"),
    "its default": ({"tie_threshold": 1.0}, "--tie_threshold 1.0 has no effect: only --ties rao_kupper"),
    "do_train": ({"do_train": True}, "--do_train true has no effect: the command trains"),
}


@pytest.mark.parametrize("case", SAID)
def test_options_that_another_overrides_are_told_in_one_line(flags, case, capfd):
    changes, told = SAID[case]
    parse(flags(**changes))
    assert told in capfd.readouterr().err


def test_a_command_without_such_options_says_nothing(flags, capfd):
    parse(flags())
    assert "has no effect" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("lora_r", 8, r"--lora_r 8 has no effect: --adapter .* which has 4"),
        ("lora_r", 16, r"--lora_r 16 has no effect"),  # the default, which differs from the adapter's
        ("use_dora", True, "--use_dora True has no effect"),
        ("lora_target_modules", ["q_proj"], r"--lora_target_modules \['q_proj'\] has no effect"),
        ("head_init_std", 0.0, r"--head_init_std 0.0 has no effect"),
    ],
)
def test_an_adapter_keeps_its_own_shape(flags, tmp_path, option, value, told):
    saved = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["v_proj", "q_proj"],
        "use_dora": False,
        "layers_to_transform": None,
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=told):
        parse(flags(adapter=tmp_path, **{option: value}))
    same = {"lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"], "use_dora": False}
    assert parse(flags(adapter=tmp_path, **same)).adapter.adapter == str(tmp_path)


@pytest.mark.parametrize("gpu", [False, True])
def test_half_precision_and_offloading_are_for_gpus(monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    for name in ("fp16", "activation_offloading"):
        values = DEFAULTS | {name: True}
        if gpu:
            assert check_options(RULES, values, DEFAULTS, {name}) == []
        else:
            with pytest.raises(UserError, match=f"--{name} true"):
                check_options(RULES, values, DEFAULTS, {name})


def test_a_timeout_that_would_not_reach_cpu_ranks_is_refused(monkeypatch):
    values = DEFAULTS | {"ddp_timeout": 60}
    assert check_options(RULES, values, DEFAULTS, {"ddp_timeout"}) == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(option_conditions.torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--ddp_timeout does not reach CPU ranks"):
        check_options(RULES, values, DEFAULTS, {"ddp_timeout"})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert check_options(RULES, values, DEFAULTS, {"ddp_timeout"}) == []
