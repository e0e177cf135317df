"""Library options that are obeyed have the effect they name in this project's trainer."""

import importlib
import json
import logging
from datetime import timedelta

import pytest
import torch
import transformers
from torch import nn
from transformers import TrainingArguments
from trl.trainer import reward_trainer

from qlora_rm.backbone.tokenizer import load_tokenizer
from qlora_rm.config import BackboneConfig
from qlora_rm.errors import UserError
from qlora_rm.preferences import Tokenization, load_preferences
from qlora_rm.training.arguments import TrainingConfig, parse
from qlora_rm.training.library_options import LIBRARY
from qlora_rm.training.limits import fit_max_length
from qlora_rm.training.run import _make_trainer, load_model, main
from tests.models_for_tests import save_backbone
from tests.tokenizers_for_tests import small_tokenizer


@pytest.fixture(scope="module")
def ready(backbone_folder, rows_file):
    """A function that makes a trainer with given options over one model and data set, always from the same state."""
    words = ["--model_name_or_path", backbone_folder, "--dataset", rows_file, "--eval_fraction", "0.25"]
    options = parse([*words, "--quantization", "none", "--lora_r", "2", "--bf16", "false"])
    tokenizer = load_tokenizer(backbone_folder)
    data = load_preferences(options.data, Tokenization(tokenizer, 1024, "error"), need_eval=True)
    model = load_model(options, tokenizer, fit_max_length(options))
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def trainer(folder, **changes):
        for name, parameter in model.named_parameters():
            if name in start:
                parameter.data.copy_(start[name])
        asked = {
            "output_dir": folder, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 1,
            "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "bf16": False, "activation_checkpointing": False,
            "disable_tqdm": True, "warmup_steps": 0,
        } | changes  # fmt: skip
        flags = [word for name, value in asked.items() if value is not None for word in (f"--{name}", str(value))]
        run = parse([*words, "--quantization", "none", "--lora_r", "2", *flags])
        return _make_trainer(run, model, tokenizer, data.train, data.held_out)

    verbosity = transformers.logging.get_verbosity()
    yield trainer
    transformers.logging.set_verbosity(verbosity)


@pytest.fixture
def made(ready, tmp_path):
    return lambda **changes: ready(tmp_path / "out", **changes)


def optimizer(trainer):
    trainer.create_optimizer()
    return trainer.optimizer


def rates(trainer, steps=(0, 5, 50, 99)):
    trainer.create_optimizer_and_scheduler(100)
    (factor, *_) = trainer.lr_scheduler.lr_lambdas
    return [round(trainer.args.learning_rate * factor(step), 9) for step in steps]


def group(trainer):
    return optimizer(trainer).param_groups[0]


def loader(trainer):
    return trainer.get_train_dataloader().base_dataloader


def first_batch(batches):
    return len(next(iter(batches))["weight"])


def context(batches):
    return batches.multiprocessing_context and batches.multiprocessing_context.get_start_method()


def steps_of(trainer):
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


def order(trainer):
    return list(trainer._get_train_sampler())


def ddp(trainer):
    return trainer.accelerator.ddp_handler


SEEN_IN_THE_TRAINER = {
    # option: (value, other options, what to inspect, expected value)
    "learning_rate": (0.25, {}, lambda t: group(t)["lr"], 0.25),
    "weight_decay": (0.125, {}, lambda t: group(t)["weight_decay"], 0.125),
    "adam_beta1": (0.5, {}, lambda t: group(t)["betas"], (0.5, 0.999)),
    "adam_beta2": (0.5, {}, lambda t: group(t)["betas"], (0.9, 0.5)),
    "adam_epsilon": (0.5, {}, lambda t: group(t)["eps"], 0.5),
    "optim": ("sgd", {}, lambda t: type(optimizer(t)), torch.optim.SGD),
    "optim_args": ("momentum=0.5", {"optim": "sgd"}, lambda t: group(t)["momentum"], 0.5),
    "lr_scheduler_type": ("linear", {"learning_rate": 1}, rates, [1, 0.95, 0.5, 0.01]),
    "lr_scheduler_kwargs": (
        '{"num_cycles": 1}', {"learning_rate": 1}, lambda t: rates(t, [50, 99])[0] == 0.0, True
    ),
    "warmup_steps": (10, {"lr_scheduler_type": "linear", "learning_rate": 1}, lambda t: rates(t, [0, 5]), [0.0, 0.5]),
    "per_device_train_batch_size": (2, {}, lambda t: first_batch(t.get_train_dataloader()), 2),
    "per_device_eval_batch_size": (5, {}, lambda t: first_batch(t.get_eval_dataloader()), 5),
    "gradient_accumulation_steps": (3, {"max_steps": -1}, steps_of, 6),  # 72 comparisons, 12 in a step
    "num_train_epochs": (2, {"max_steps": -1}, steps_of, 18),
    "max_steps": (5, {}, steps_of, 5),
    "data_seed": (7, {"seed": 1}, lambda t: order(t) != list(range(72)) and len(set(order(t))), 72),
    "dataloader_num_workers": (1, {}, lambda t: loader(t).num_workers, 1),
    "dataloader_persistent_workers": (True, {"dataloader_num_workers": 1}, lambda t: loader(t).persistent_workers, True),
    "dataloader_prefetch_factor": (3, {"dataloader_num_workers": 1}, lambda t: loader(t).prefetch_factor, 3),
    "dataloader_multiprocessing_context": (
        "spawn", {"dataloader_num_workers": 1}, lambda t: context(loader(t)), "spawn"
    ),
    "ddp_find_unused_parameters": (False, {}, lambda t: ddp(t).find_unused_parameters, False),
    "ddp_bucket_cap_mb": (7, {}, lambda t: ddp(t).bucket_cap_mb, 7),
    "ddp_broadcast_buffers": (False, {}, lambda t: ddp(t).broadcast_buffers, False),
    "ddp_static_graph": (True, {}, lambda t: ddp(t).static_graph, True),
    "accelerator_config": (
        '{"gradient_accumulation_kwargs": {"sync_each_batch": true}}', {},
        lambda t: t.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch"), True,
    ),
    "bf16": (True, {}, lambda t: (t.accelerator.mixed_precision, t.args.compute_dtype), ("bf16", torch.bfloat16)),
    "log_level": ("error", {}, lambda t: transformers.logging.get_verbosity(), logging.ERROR),
    "disable_tqdm": (
        True, {}, lambda t: any(isinstance(c, transformers.PrinterCallback) for c in t.callback_handler.callbacks), True
    ),
    "report_to": (
        "tensorboard", {}, lambda t: "TensorBoardCallback" in [type(c).__name__ for c in t.callback_handler.callbacks], True
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN_IN_THE_TRAINER)
def test_the_trainer_has_it(made, name):
    value, others, look, seen = SEEN_IN_THE_TRAINER[name]
    assert look(made(**others, **{name: value})) == seen
    if name not in ("max_steps", "log_level", "disable_tqdm"):
        assert look(made(**others)) != seen or name in ("data_seed",), "the option makes the difference"


def test_seeds_draw_the_order(made):
    by_seed = [order(made(seed=seed)) for seed in (1, 2)]
    assert by_seed[0] != by_seed[1]
    assert order(made(seed=1, data_seed=2)) == by_seed[1]


def test_pinned_memory_is_for_gpus(made):
    trainer = made()
    trainer.args.dataloader_pin_memory = True  # set to false on a CPU
    assert loader(trainer).pin_memory


def test_full_determinism(made):
    try:
        made(full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def weights(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad])


@pytest.mark.slow
def test_gradients_are_clipped(made):
    def moved(**changes):
        trainer = made(optim="sgd", learning_rate=1, lr_scheduler_type="constant", **changes)
        before = weights(trainer)
        trainer.train()
        return (weights(trainer) - before).norm().item()

    assert moved(max_grad_norm=0.01) == pytest.approx(0.01, rel=1e-2)
    assert moved(max_grad_norm=0) > 0.1


@pytest.mark.slow
def test_activations_are_checkpointed_and_its_arguments_handed_on(made, monkeypatch):
    for on, kwargs in (
        ("activation_checkpointing", "activation_checkpointing_kwargs"),
        ("gradient_checkpointing", "gradient_checkpointing_kwargs"),
    ):
        asked = []
        trainer = made(
            **{"activation_checkpointing": None, "gradient_checkpointing": False}
            | {on: True, kwargs: '{"every_n_layers": 2}'}
        )
        monkeypatch.setattr(
            type(trainer.model),
            "activation_checkpointing_enable",
            lambda *_, to=asked, **how: to.append(how),
            raising=False,
        )
        trainer.train()
        assert [how["every_n_layers"] for how in asked] == [2], on


@pytest.mark.slow
def test_noise_and_offloading_act_in_training(made, monkeypatch):
    def loss(**changes):
        trainer = made(share_prefix="false", **changes)
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    assert loss() == loss() != loss(neftune_noise_alpha=50)
    entered = []

    class Context:
        def __enter__(self):
            entered.append(1)

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(reward_trainer, "get_act_offloading_ctx_manager", lambda model: Context())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # the option is refused on a CPU
    with monkeypatch.context() as cpu:
        cpu.setattr(torch.cuda, "is_available", lambda: False)
        trainer = made()
        trainer.args.activation_offloading = True
        trainer.maybe_activation_offload_context = reward_trainer.get_act_offloading_ctx_manager(model=trainer.model)
        trainer.train()
    assert len(entered) == 2, "one for each micro-batch"


def test_the_cache_is_emptied_and_overflow_is_looked_for(made, monkeypatch):
    emptied, watched = [], []
    monkeypatch.setattr("transformers.trainer.clear_device_cache", lambda: emptied.append(1))
    monkeypatch.setattr("transformers.trainer.DebugUnderflowOverflow", watched.append)
    made(torch_empty_cache_steps=1, debug="underflow_overflow").train()
    assert len(emptied) == 2 and len(watched) == 1


@pytest.mark.slow
def test_what_is_logged_and_when(made, capfd):
    trainer = made(
        max_steps=5, logging_steps=2, logging_first_step=True, include_num_input_tokens_seen="all", skip_memory_metrics=False
    )  # fmt: skip
    trainer.train()
    log = trainer.state.log_history
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 4]
    assert trainer.state.num_input_tokens_seen > 0
    assert any("train_mem_cpu_alloc_delta" in entry for entry in log)
    quiet = made(max_steps=2, logging_strategy="no")
    quiet.train()
    assert not [entry for entry in quiet.state.log_history if "loss" in entry]


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_logged_as_zero(made, monkeypatch):
    """transformers' `logging_nan_inf_filter` would log 0.0."""
    trainer = made(max_steps=1)
    real = trainer.compute_loss
    monkeypatch.setattr(trainer, "compute_loss", lambda *a, **k: real(*a, **k) * float("nan"))
    with pytest.raises(UserError, match="gradient of step 1 is not finite"):
        trainer.train()
    assert trainer.state.log_history == [] and not trainer.args.logging_nan_inf_filter


@pytest.mark.slow
def test_when_it_is_evaluated_and_saved(flags, tmp_path):
    main(
        flags(
            max_steps=6, eval_steps=2, eval_delay=3, eval_on_start=True, eval_accumulation_steps=1, save_steps=3,
            save_only_model=True, save_total_limit=1, report_to="tensorboard", run_name="mine",
        )
    )  # fmt: skip
    out = tmp_path / "out"
    state = json.loads((out / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [0, 4, 6, 6]
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-6"]
    assert not (out / "checkpoint-6/optimizer.pt").exists()
    assert list(out.rglob("events.out.tfevents*"))


@pytest.mark.slow
def test_strategies_by_epoch_and_by_the_best(flags, tmp_path):
    main(
        flags(
            max_steps=-1, num_train_epochs=2, per_device_train_batch_size=36, eval_strategy="epoch", save_strategy="best",
            metric_for_best_model="accuracy", load_best_model_at_end=True,
        )
    )  # fmt: skip
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    evaluated = [entry for entry in state["log_history"] if "eval_accuracy" in entry]
    assert [entry["step"] for entry in evaluated[:2]] == [2, 4]
    assert state["best_metric"] == max(entry["eval_accuracy"] for entry in evaluated[:2])


@pytest.mark.parametrize("greater", [True, False])
def test_the_best_is_chosen_by_the_metric(made, greater):
    trainer = made(
        metric_for_best_model="margin",
        greater_is_better=greater,
        save_strategy="best",
        eval_strategy="steps",
        eval_steps=1,
    )
    for margin in (0.5, 0.7, 0.6):
        trainer._determine_best_metric({"eval_margin": margin, "eval_loss": 1 - margin}, None)
    assert trainer.state.best_metric == (0.7 if greater else 0.5)


def test_hosts_log_and_save_on_each_node(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "local_process_index", 0)
    monkeypatch.setattr(TrainingArguments, "process_index", 4)
    for each in (True, False):
        args = TrainingConfig(
            str(tmp_path), log_on_each_node=each, save_on_each_node=each, log_level="info", log_level_replica="error"
        )
        assert args.should_log is args.should_save is each
        assert args.get_process_log_level() == (logging.INFO if each else logging.ERROR)


def test_the_process_group_gets_its_backend_and_timeout(tmp_path, monkeypatch):
    asked = []
    real = transformers.training_args.PartialState

    def recorded(**how):
        asked.append(how)
        return real(**{name: value for name, value in how.items() if name == "cpu"})

    monkeypatch.setattr(transformers.training_args, "PartialState", recorded)
    TrainingArguments(str(tmp_path), ddp_backend="gloo", ddp_timeout=77, report_to="none")
    assert asked[-1]["backend"] == "gloo" and asked[-1]["timeout"] == timedelta(seconds=77)
    TrainingConfig(str(tmp_path), ddp_backend="gloo", use_cpu=True)
    assert asked[-1]["backend"] == "gloo" and asked[-1]["cpu"] is True


@pytest.mark.parametrize("on", [True, False])
def test_tf32_and_fp16_are_set(tmp_path, monkeypatch, on):
    asked = []
    monkeypatch.setattr(transformers.training_args, "is_torch_tf32_available", lambda: True)
    monkeypatch.setattr(transformers.training_args, "enable_tf32", asked.append)
    TrainingConfig(str(tmp_path), tf32=on, bf16=False)
    assert asked == [on]
    assert TrainingConfig(str(tmp_path), fp16=True).compute_dtype == torch.float16


def test_dropout_of_the_backbone(tmp_path):
    folder = save_backbone(tmp_path / "gpt2", "gpt2", small_tokenizer())
    for disabled in (True, False):
        options = parse(
            [
                "--model_name_or_path",
                folder,
                "--quantization",
                "none",
                "--disable_dropout",
                str(disabled),
                "--bf16",
                "false",
            ]
        )
        model = load_model(options, load_tokenizer(folder), fit_max_length(options))
        rates_of = {module.p for module in model.modules() if isinstance(module, nn.Dropout)}
        assert rates_of == ({0.0} if disabled else {0.1})
    assert BackboneConfig().quantization == "4bit"


ELSEWHERE = {
    "output_dir": "tests.training.test_run:test_a_run_leaves_a_model_that_scores_as_it_was_trained",
    "seed": "tests.training.test_options_obeyed:test_seeds_draw_the_order",
    "dataloader_pin_memory": "tests.training.test_options_obeyed:test_pinned_memory_is_for_gpus",
    "full_determinism": "tests.training.test_options_obeyed:test_full_determinism",
    "max_grad_norm": "tests.training.test_options_obeyed:test_gradients_are_clipped",
    **dict.fromkeys(
        ["activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing", "gradient_checkpointing_kwargs"],
        "tests.training.test_options_obeyed:test_activations_are_checkpointed_and_its_arguments_handed_on",
    ),
    **dict.fromkeys(
        ["neftune_noise_alpha", "activation_offloading"],
        "tests.training.test_options_obeyed:test_noise_and_offloading_act_in_training",
    ),
    **dict.fromkeys(
        ["torch_empty_cache_steps", "debug"],
        "tests.training.test_options_obeyed:test_the_cache_is_emptied_and_overflow_is_looked_for",
    ),
    **dict.fromkeys(
        ["logging_strategy", "logging_steps", "logging_first_step", "include_num_input_tokens_seen", "skip_memory_metrics"],
        "tests.training.test_options_obeyed:test_what_is_logged_and_when",
    ),
    **dict.fromkeys(
        [
            "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps", "save_steps", "save_only_model",
            "save_total_limit", "run_name",
        ],
        "tests.training.test_options_obeyed:test_when_it_is_evaluated_and_saved",
    ),
    **dict.fromkeys(
        ["eval_strategy", "save_strategy", "load_best_model_at_end"],
        "tests.training.test_options_obeyed:test_strategies_by_epoch_and_by_the_best",
    ),
    **dict.fromkeys(
        ["metric_for_best_model", "greater_is_better"],
        "tests.training.test_options_obeyed:test_the_best_is_chosen_by_the_metric",
    ),
    **dict.fromkeys(
        ["log_on_each_node", "save_on_each_node", "log_level_replica"],
        "tests.training.test_options_obeyed:test_hosts_log_and_save_on_each_node",
    ),
    **dict.fromkeys(
        ["ddp_backend", "ddp_timeout", "use_cpu"],
        "tests.training.test_options_obeyed:test_the_process_group_gets_its_backend_and_timeout",
    ),
    **dict.fromkeys(["tf32", "fp16"], "tests.training.test_options_obeyed:test_tf32_and_fp16_are_set"),
    **dict.fromkeys(
        ["push_to_hub", "hub_model_id", "hub_token", "hub_private_repo", "hub_revision"],
        "tests.training.test_hub:test_what_is_pushed_is_complete_and_nothing_else",
    ),
    "disable_dropout": "tests.training.test_options_obeyed:test_dropout_of_the_backbone",
    **dict.fromkeys(
        ["train_sampling_strategy", "dataloader_drop_last", "center_rewards_coefficient"],
        "tests.training.test_weights:test_every_order_takes_the_steps_of_plain_pytorch",
    ),
    "resume_from_checkpoint": "tests.training.test_run:test_resume_ends_with_the_very_adapter_of_the_uninterrupted_run",
    "max_length": "tests.training.test_run:test_mistakes_are_told_in_one_message",
    "deepspeed": "tests.training.test_launch:test_two_ranks_end_where_one_process_ends",
    "chat_template_path": "tests.backbone.test_tokenizer:test_chat_template_from_a_file_and_a_folder",
    "eos_token": "tests.backbone.test_tokenizer:test_unknown_eos_token",
    "pad_token": "tests.backbone.test_pad_token:test_the_option_works_through_training_and_what_comes_after",
}  # fmt: skip
"""Options whose effect another test shows: module and test."""

NOT_SHOWN = {
    "optim_target_modules": "galore_torch and apollo_torch are not installed",
    "project": "trackio is not installed",
    "trackio_space_id": "trackio is not installed",
    "trackio_bucket_id": "trackio is not installed",
    "trackio_static_space_id": "trackio is not installed",
    "hub_strategy": "end alone is taken (tests/training/test_hub.py)",
    "trust_remote_code": "no code of others is in the tests",
}
"""Options for which transformers' or TRL's own code is trusted, and why."""


def test_every_option_that_is_obeyed_is_shown_to_be():
    shown = [SEEN_IN_THE_TRAINER.keys(), ELSEWHERE.keys(), NOT_SHOWN.keys()]
    assert set().union(*shown) == {name for name, rule in LIBRARY.items() if rule.kind == "obeyed"}
    assert sum(map(len, shown)) == len(set().union(*shown))
    for place in ELSEWHERE.values():
        module, test = place.split(":")
        assert hasattr(importlib.import_module(module), test), place
