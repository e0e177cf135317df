"""Disk space that a run's checkpoints need, computed before anything is loaded and compared with the free space."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import PretrainedConfig

from qlora_rm.backbone.adapter import attach_adapter
from qlora_rm.backbone.head import head_modules
from qlora_rm.backbone.inventory import human_bytes
from qlora_rm.backbone.load import Backbone, skeleton
from qlora_rm.errors import UserError
from qlora_rm.training.arguments import Options, TrainingConfig
from qlora_rm.training.checkpoints import checkpoints, half_written

FP32 = 4
ADAMW_STATES = 2 * FP32
"""Bytes of the gradient's mean and variance per trained weight; some optimizers need less."""
SMALL_FILES = 32_000_000
"""Bytes that do not grow with the model: tokenizer (of a large vocabulary), manifest, random generator states."""
STATES = {
    "adamw_torch": ADAMW_STATES,
    "adamw_torch_fused": ADAMW_STATES,
    "paged_adamw": ADAMW_STATES,
    "paged_adamw_32bit": ADAMW_STATES,
}
"""Bytes of optimizer state per trained weight, for optimizers known to keep that many."""


def trained_weights(options: Options, config: PretrainedConfig) -> int:
    """Return the number of trained weights: those of adapter and head, or of the full model without LoRA.

    Counted on a meta-device copy of the model, with the same adapter that training attaches.
    """
    if options.adapter.adapter:
        saved = Path(options.adapter.adapter) / SAFETENSORS_WEIGHTS_NAME
        return saved.stat().st_size // FP32 if saved.exists() else 0
    model = skeleton(config, options.training.trust_remote_code)
    trained: nn.Module = model
    if options.adapter.use_lora:
        with torch.device("meta"):
            trained = attach_adapter(Backbone(model, head_modules(model), True), options.adapter)
    return sum(p.numel() for p in trained.parameters() if p.requires_grad)


def checkpoint_bytes(trained: int, engine: str, states: int = ADAMW_STATES, *, with_optimizer: bool = True) -> int:
    """Return the bytes in one checkpoint that grow with the model, over all ranks.

    They are an fp32 copy of the trained weights, the optimizer states and, under DeepSpeed, fp32 master weights. ZeRO-1
    and ZeRO-2 save the trained weights once more in their engine's state.

    Arguments:
        states: bytes that the optimizer keeps per trained weight.
        with_optimizer: false under `--save_only_model`.
    """
    size = trained * (FP32 + states * with_optimizer)
    if engine.startswith("zero") and with_optimizer:
        size += trained * FP32 * (1 if engine == "zero3" else 2)
    return size


def checkpoints_made(args: TrainingConfig, comparisons: int) -> int:
    """Return how many checkpoints a run saves, given the number of training comparisons."""
    if args.save_strategy == "no":
        return 0
    if args.save_strategy == "epoch" and args.max_steps <= 0:
        return math.ceil(args.num_train_epochs)
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    per_epoch = max(1, math.ceil(comparisons / per_step))
    steps = args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)
    if args.save_strategy == "epoch":
        return math.ceil(steps / per_epoch)
    every = args.save_steps if args.save_steps >= 1 else math.ceil(steps * args.save_steps)
    return math.ceil(steps / every)


@dataclass(frozen=True)
class DiskNeed:
    """Bytes that a run will write under its output folder.

    Attributes:
        checkpoint: lower bound for one checkpoint.
        most: estimate for all that exist at once; an old checkpoint is deleted only after a newer one is complete.
    """

    checkpoint: int
    most: int

    @classmethod
    def of(cls, options: Options, config: PretrainedConfig, engine: str, comparisons: int) -> "DiskNeed":
        args = options.training
        trained = trained_weights(options, config)
        with_optimizer = not args.save_only_model
        least = checkpoint_bytes(trained, engine, STATES.get(_word(args.optim), 0), with_optimizer=with_optimizer)
        one = checkpoint_bytes(trained, engine, with_optimizer=with_optimizer) + SMALL_FILES
        made = checkpoints_made(args, comparisons)
        beside = 1 + (args.metric_for_best_model is not None)  # the one being saved, and the best
        kept = made if args.save_total_limit is None else min(made, args.save_total_limit + beside)
        final = trained * FP32 + SMALL_FILES
        return cls(least if made else trained * FP32, kept * one + final)

    def require_room(self, folder: Path) -> str | None:
        """Return a warning if not everything that is kept will fit.

        Raises:
            UserError: not even one checkpoint fits.
        """
        free = shutil.disk_usage(folder).free
        if free + _bytes(half_written(str(folder))) < self.checkpoint:  # deleted before the next save
            raise UserError(
                f"--output_dir {folder} has {human_bytes(free)} free, and one checkpoint of this run takes at "
                f"least {human_bytes(self.checkpoint)}. Free space there, or choose another folder."
            )
        if free + _bytes(checkpoints(str(folder))) < self.most:
            return (
                f"warning: --output_dir {folder} has {human_bytes(free)} free, and this run will keep up to "
                f"{human_bytes(self.most)} of checkpoints and model there. Free space, or "
                "lower --save_total_limit."
            )
        return None


def _word(optimizer: object) -> str:
    """Return the name of an optimizer, which transformers stores as an enum."""
    return str(getattr(optimizer, "value", optimizer))


def _bytes(folders: list[Path]) -> int:
    return sum(file.stat().st_size for folder in folders for file in folder.rglob("*") if file.is_file())
