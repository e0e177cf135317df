"""The summary at the end of a run: how good the model is, where it is, and what to run next."""

import shlex
from pathlib import Path
from typing import Any

from datasets import Dataset

from qlora_rm.config import DataConfig
from qlora_rm.intervals import wilson_interval
from qlora_rm.progress import duration
from qlora_rm.training.arguments import Options

YOUR_ROWS = "HELD_OUT_ROWS.jsonl"


def summary(
    options: Options, metrics: dict[str, float], held_out: Dataset | None, steps: int, seconds: float
) -> list[str]:
    """Return the table that a finished run prints, and the next commands.

    Arguments:
        metrics: of the last evaluation; empty without one.
        steps: optimizer steps of training.
        seconds: duration of the command.
    """
    output = str(options.training.output_dir)
    rows = [("steps", f"{steps:,}"), ("time", duration(seconds)), ("reward model", output)]
    if metrics and held_out is not None:
        wins = sum(map(len, held_out["wins"]))
        low, high = wilson_interval(metrics["eval_accuracy"] * wins, wins)
        rows = [
            ("held-out accuracy", f"{metrics['eval_accuracy']:.4f}, 95 % interval {low:.4f} to {high:.4f}"),
            ("held-out loss", f"{metrics['eval_loss']:.4f}"),
            ("held-out comparisons", f"{len(held_out):,} with {wins:,} ordered pairs"),
            *rows,
        ]
    width = max(len(name) for name, _ in rows)
    table = [f"{name.ljust(width)}  {value}" for name, value in rows]
    return ["", *table, "", "next:", *(f"  {shlex.join(words)}" for words in next_commands(options, output))]


def next_commands(options: Options, output: str) -> list[list[str]]:
    """Return commands to evaluate, merge, verify and score this run's model; without LoRA there is nothing to merge."""
    trust = ["--trust_remote_code"] if options.training.trust_remote_code else []
    whole = f"{Path(output)}_merged" if options.adapter.use_lora else output
    merge = [["qlora-rm", "merge", output, "--output", whole, *trust]] if options.adapter.use_lora else []
    return [
        ["qlora-rm", "eval", output, *_held_out_rows(options.data), *trust],
        *merge,
        ["qlora-rm", "verify", whole, *trust],
        ["qlora-rm", "score", whole, "--prompt", "A question?", "--responses", "An answer.", "Another.", *trust],
    ]


def _held_out_rows(data: DataConfig) -> list[str]:
    """Return `eval`'s options that name the run's held-out rows; a placeholder if a share of all rows was held out."""
    if data.eval_dataset:
        named: list[Any] = data.eval_dataset
    elif data.eval_split:
        named = data.dataset
    else:
        return ["--dataset", YOUR_ROWS]
    if not all(isinstance(entry, str) for entry in named):  # mappings can only be written in YAML
        return ["--dataset", YOUR_ROWS]
    words = ["--dataset", *named]
    if data.dataset_config:
        words += ["--dataset_config", data.dataset_config]
    if data.eval_split:
        words += ["--dataset_split", data.eval_split]
    elif data.dataset_split != DataConfig.dataset_split:
        words += ["--dataset_split", data.dataset_split]
    if data.columns:
        words += ["--columns", *data.columns]
    if data.hh_turns:
        words.append("--hh_turns")
    if data.on_bad_row != DataConfig.on_bad_row:
        words += ["--on_bad_row", data.on_bad_row]
    if data.max_row_bytes != DataConfig.max_row_bytes:
        words += ["--max_row_bytes", str(data.max_row_bytes)]
    return words
