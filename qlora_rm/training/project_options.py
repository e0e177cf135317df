"""Rules for the project's own options (`config.py`): with which other options they have an effect."""

import glob
from collections.abc import Set
from pathlib import Path
from typing import Any

from qlora_rm.backbone.adapter import read_adapter_config
from qlora_rm.backbone.paths import is_local
from qlora_rm.config import require
from qlora_rm.training.option_rules import Rule, Values, obeyed, obeyed_if

SAVED_AS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "lora_layers": "layers_to_transform",
    "lora_experts": "target_parameters",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}
"""Options that set the adapter's shape -> their names in adapter_config.json."""


def _may_have_splits(entry: Any) -> bool:
    """Whether a data set may have splits or configurations of its own; files and globs have none."""
    path = entry.get("path") if isinstance(entry, dict) else entry
    return not (isinstance(path, str) and (glob.has_magic(path) or Path(path).expanduser().is_file()))


def _any_with_splits(values: Values) -> bool:
    entries = [*(values["dataset"] or []), *(values["eval_dataset"] or [])]
    return not entries or any(_may_have_splits(entry) for entry in entries)


def _held_out_by_share(values: Values) -> bool:
    return not (values["eval_dataset"] or values["eval_split"])


def _holds_out(values: Values) -> bool:
    return not _held_out_by_share(values) or float(values["eval_fraction"]) > 0


def _backbone_has_revisions(values: Values) -> bool:
    return not values["model_name_or_path"] or not is_local(values["model_name_or_path"])


def _new_head(values: Values) -> bool:
    return not values["adapter"]


def _lora(values: Values) -> bool:
    return bool(values["use_lora"])


def require_shape_of_adapter(values: Values, typed: Set[str]) -> None:
    """Raise a `UserError` if `--adapter` is given and a typed option contradicts that adapter's shape."""
    if not values["adapter"] or not typed & SAVED_AS.keys():
        return
    saved = read_adapter_config(values["adapter"])
    for option in sorted(typed & SAVED_AS.keys()):
        given, has = values[option], saved.get(SAVED_AS[option])
        if option == "lora_experts":
            given, has = bool(given), bool(has)
        if isinstance(given, list) and isinstance(has, list):
            given, has = sorted(given), sorted(has)
        require(
            given == has or (not given and not has),
            f"--{option} {given} has no effect: --adapter {values['adapter']} keeps its own shape, which has {has}. Leave it "
            "out, or train a new adapter.",
        )


def _of_new_adapter(where: str, remedy: str = "Leave it out, or train an adapter.") -> Rule:
    return obeyed_if(_lora, remedy, where)


PROJECT: dict[str, Rule] = {
    # data
    "dataset": obeyed("preferences/sources.py"),
    "dataset_config": obeyed_if(
        _any_with_splits, "Only data sets of the hub have configurations: leave it out.", "preferences/sources.py"
    ),
    "dataset_split": obeyed_if(
        _any_with_splits,
        "Files have no splits: leave it out, or give the rows of that split alone.",
        "preferences/sources.py",
    ),
    "dataset_weights": obeyed("preferences/load.py"),
    "columns": obeyed("preferences/sources.py"),
    "hh_turns": obeyed("preferences/formats.py"),
    "eval_dataset": obeyed("preferences/load.py"),
    "eval_split": obeyed("preferences/load.py"),
    "eval_fraction": obeyed_if(
        _held_out_by_share,
        "--eval_dataset or --eval_split names the held-out rows: leave it out.",
        "preferences/split.py",
    ),
    "max_eval_comparisons": obeyed_if(
        _holds_out, "--eval_fraction 0 holds nothing out: leave it out.", "preferences/load.py"
    ),
    "over_long": obeyed("preferences/tokenization.py"),
    "group_by_prompt": obeyed("preferences/gather.py"),
    "on_bad_row": obeyed("preferences/row_errors.py"),
    "max_row_bytes": obeyed("preferences/row_bytes.py"),
    # backbone
    "model_name_or_path": obeyed("backbone/load.py"),
    "model_revision": obeyed_if(
        _backbone_has_revisions,
        "A folder has no revisions: leave it out, or name a model of the hub.",
        "backbone/load.py",
    ),
    "tokenizer_name_or_path": obeyed("backbone/tokenizer.py"),
    "quantization": obeyed("backbone/load.py"),
    "max_unquantized": obeyed_if(
        lambda o: o["quantization"] != "none",
        "--quantization none quantizes nothing: leave it out.",
        "backbone/load.py",
    ),
    "attn_implementation": obeyed("backbone/load.py"),
    "share_prefix": obeyed("backbone/packed.py"),
    "verify_base": obeyed("artifacts/base_hash.py"),
    "head_init_std": obeyed_if(
        _new_head,
        "--adapter brings its own head: leave it out.",
        "backbone/head.py; backbone/load.py refuses it for a head",
    ),
    # adapter
    "use_lora": obeyed("training/run.py"),
    "adapter": obeyed("training/run.py"),
    "skip_checks": obeyed_if(
        lambda o: bool(o["adapter"]),
        "Only --adapter is compared with a manifest: leave it out.",
        "artifacts/as_written.py",
    ),
    "lora_r": _of_new_adapter("backbone/adapter.py"),
    "lora_alpha": _of_new_adapter("backbone/adapter.py"),
    "lora_dropout": _of_new_adapter("backbone/adapter.py"),
    "lora_target_modules": _of_new_adapter("backbone/target_names.py"),
    "lora_experts": _of_new_adapter("backbone/adapter.py"),
    "lora_layers": _of_new_adapter("backbone/target_names.py"),
    "use_rslora": _of_new_adapter("backbone/adapter.py"),
    "use_dora": _of_new_adapter("backbone/adapter.py"),
    # objective
    "objective": obeyed("training/objective.py"),
    "ties": obeyed("training/objective.py"),
    "tie_threshold": obeyed_if(
        lambda o: o["ties"] == "rao_kupper",
        "Only --ties rao_kupper has a threshold: add it, or leave this out.",
        "training/objective.py",
    ),
    "label_smoothing": obeyed("training/objective.py"),
    # what is printed
    "quiet": obeyed("console.py"),
    "verbose": obeyed("console.py"),
    # the launch
    "engine": obeyed("training/engine.py"),
}
"""Option -> rule, by topic."""
