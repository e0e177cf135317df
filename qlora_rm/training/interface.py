"""Training from Python: the same run as `qlora-rm train`, with options in a mapping."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qlora_rm.libraries import quiet_libraries
from qlora_rm.surroundings import prepare_caches
from qlora_rm.training.run import Outcome, main


def train(options: Mapping[str, Any] | None = None, *, config: str | Path | None = None) -> Outcome:
    """Train a reward model in this process, on one GPU or on the CPU. For several GPUs use `accelerate launch`.

    Arguments:
        options: by name, as in a YAML file of `qlora-rm train --config`; docs/options.md lists them.
        config: a YAML file of options; `options` beat it.

    Returns: the output folder and the metrics of the last evaluation.

    Raises:
        UserError: an option or the data cannot be used; the message names it and the remedy.

    Example:
        >>> from qlora_rm import train
        >>> outcome = train({"model_name_or_path": "runs/demo/backbone", "dataset": "runs/demo/data/train.jsonl",
        ...                  "output_dir": "runs/mine", "max_steps": 100})
    """
    prepare_caches()
    quiet_libraries()
    given = {name: str(value) if isinstance(value, Path) else value for name, value in (options or {}).items()}
    return main([] if config is None else ["--config", str(config)], given)
