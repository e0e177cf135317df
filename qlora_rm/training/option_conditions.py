"""Conditions under which library options have an effect, and checks of their values, for `library_options.py`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from qlora_rm.training.option_rules import Values

METRICS = ("loss", "accuracy", "margin", "mean_reward", "std_reward")
"""Metrics that an evaluation computes; each is logged with the prefix eval_."""
ACCELERATOR_KEYS = ("non_blocking", "gradient_accumulation_kwargs")
"""Keys of `--accelerator_config` that do not change the batches."""
SCHEDULES_BY_METRIC = ("reduce_lr_on_plateau", "greedy")


def word_of(values: Values, name: str) -> str:
    """Return an option's value as a lower-case word; an enum member's value is used, not its name."""
    return str(getattr(values[name], "value", values[name])).lower()


def evaluates(values: Values) -> bool:
    return word_of(values, "eval_strategy") != "no"


def checkpoints_activations(values: Values) -> bool:
    asked = values["activation_checkpointing"]
    return bool(values["gradient_checkpointing"] if asked is None else asked)


def has_workers(values: Values) -> bool:
    return int(values["dataloader_num_workers"]) > 0


def pushes(values: Values) -> bool:
    return bool(values["push_to_hub"])


def reports_to(values: Values) -> list[str]:
    asked = values["report_to"]
    names = [asked] if isinstance(asked, str) else list(asked or [])
    return [name for name in names if name != "none"]


def to_trackio(values: Values) -> bool:
    return bool({"trackio", "all"} & set(reports_to(values)))


def chooses_best(values: Values) -> bool:
    """Whether evaluations choose a best checkpoint, which is kept in addition to the latest ones."""
    by_metric = values["load_best_model_at_end"] or word_of(values, "lr_scheduler_type") in SCHEDULES_BY_METRIC
    return evaluates(values) and bool(by_metric or values["metric_for_best_model"])


def several_ranks(_: Values) -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def under_ddp(values: Values) -> bool:
    by_deepspeed = values["deepspeed"] or os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true"
    return several_ranks(values) and not by_deepspeed


def on_gpu(values: Values) -> bool:
    return torch.cuda.is_available() and not values["use_cpu"]


def fp16_needs_a_gpu(value: Any, values: Values) -> str | None:
    if value and not on_gpu(values):
        return "--fp16 true needs a GPU. On a CPU leave it out (fp32), or pass --bf16 true."
    return None


def one_set_of_kwargs(value: Any, values: Values) -> str | None:
    if value and values["gradient_checkpointing_kwargs"]:
        return "--gradient_checkpointing_kwargs is the old name of --activation_checkpointing_kwargs. Give only the latter."
    return None


def known_loggers(_: Any, values: Values) -> str | None:
    names = [name for name in reports_to(values) if name != "all"]
    unknown = [name for name in names if name not in INTEGRATION_TO_CALLBACK]
    if unknown:
        return f"--report_to {unknown[0]} is not known. Choose from none, all, {', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
    missing = [name for name in names if name not in get_available_reporting_integrations()]
    if missing:
        return f"--report_to {missing[0]}: the package is not installed. Install it, or leave the option out."
    return None


def known_metric(value: Any, _: Values) -> str | None:
    name = str(value).removeprefix("eval_")
    if value and name not in METRICS:
        return f"--metric_for_best_model {value} is not measured. Choose from {', '.join(METRICS)}."
    return None


def best_needs_a_metric(value: Any, values: Values) -> str | None:
    if str(getattr(value, "value", value)) != "best":
        return None
    if not values["metric_for_best_model"]:
        return "--save_strategy best needs a metric. Give --metric_for_best_model loss or accuracy."
    if not evaluates(values):
        return "--save_strategy best needs evaluations. Give --eval_strategy steps or epoch."
    return None


def best_needs_evaluations(value: Any, values: Values) -> str | None:
    if value and not evaluates(values):
        return "--load_best_model_at_end needs evaluations. Give --eval_strategy steps or epoch."
    return None


def no_rebalancing(value: Any, _: Values) -> str | None:
    if value == "batch_rebalance":
        return (
            "--train_sampling_strategy batch_rebalance changes the sizes of micro-batches. Use random, which gives the "
            "micro-batches of a step near-equal loads at one size."
        )
    return None


def warm_up_is_obeyed(values: Values) -> bool:
    return word_of(values, "lr_scheduler_type") not in ("constant", *SCHEDULES_BY_METRIC) or not float(
        values["warmup_steps"]
    )


def only_harmless_keys(value: Any, _: Values) -> str | None:
    """Refuse keys that would change the size or order of batches after the sampler has set them."""
    if not value:
        return None
    given = value
    if isinstance(value, str):
        try:
            given = json.loads(value if value.startswith("{") else Path(value).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            return f"--accelerator_config {value} cannot be read: {error}."
    if not isinstance(given, Mapping):
        return f"--accelerator_config {value} is not a mapping."
    accumulation = given.get("gradient_accumulation_kwargs") or {}
    bad = [key for key in given if key not in ACCELERATOR_KEYS] + [
        key for key in accumulation if key != "sync_each_batch"
    ]
    if bad:
        return (
            f"--accelerator_config {bad[0]} would change which comparisons a batch holds. Leave it out; batches follow from "
            "--per_device_train_batch_size and --gradient_accumulation_steps."
        )
    return None


def no_tpu(value: Any, _: Values) -> str | None:
    if "tpu_metrics_debug" in str(value):
        return "--debug tpu_metrics_debug needs a TPU, which is not supported. Leave it out."
    return None


def timeout_is_handed_on(value: Any, values: Values) -> str | None:
    """Refuse a timeout for CPU ranks under DDP: transformers 5.23 passes it only to GPU ranks and DeepSpeed.

    Remove once CPU ranks get it too.
    """
    if int(value) != 1800 and under_ddp(values) and not on_gpu(values):
        return (
            "--ddp_timeout does not reach CPU ranks under DDP, where transformers does not hand it on. Leave it out, or use "
            "DeepSpeed."
        )
    return None
