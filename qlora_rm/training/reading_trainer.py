"""A trainer that runs no code from the checkpoints it reads, and names a file that it cannot read."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import transformers.trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from trl import RewardTrainer

from qlora_rm.config import require
from qlora_rm.training.checkpoints import step_of
from qlora_rm.training.safe_loading import loading_safely, reading


class ReadingTrainer(RewardTrainer):
    """`RewardTrainer` that reads checkpoints through `safe_loading`."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Prepare for training, with safe loading: DeepSpeed's engine reads its checkpoint during this call."""
        load_by_engine = transformers.trainer.deepspeed_load_checkpoint

        def load(engine: Any, path: str, **how: Any) -> None:
            with reading(path):
                load_by_engine(engine, path, **how)

        with loading_safely(), patch.object(transformers.trainer, "deepspeed_load_checkpoint", load):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with reading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with reading(checkpoint or ""):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        with reading(checkpoint or ""):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(checkpoint or ""):
            super()._load_rng_state(checkpoint)

    def _load_best_model(self) -> None:
        with reading(str(self.state.best_model_checkpoint)):
            super()._load_best_model()


def require_state(checkpoint: Path) -> None:
    """Refuse a checkpoint whose `trainer_state.json` transformers cannot resume from.

    Raises:
        UserError: the file cannot be read, or belongs to another step.
    """
    with reading(checkpoint):
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        step = step_of(checkpoint)
        require(
            isinstance(state.global_step, int) and (step is None or state.global_step == step),
            f"{checkpoint / TRAINER_STATE_NAME} is that of step {state.global_step!r:.40}. Go on from another checkpoint.",
        )
        float(state.epoch or 0), list(state.log_history), float(state.best_metric or 0)
