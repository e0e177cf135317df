"""Console display of training and evaluation, in place of transformers' progress bars and printed logs."""

from types import TracebackType
from typing import Any, Self

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import has_length

from qlora_rm.console import is_main_process, say, verbosity
from qlora_rm.progress import SHOWN_AFTER, Phase, display, duration

NOTED = {"loss": ("loss", ".3f"), "learning_rate": ("learning rate", ".1e"), "accuracy": ("accuracy", ".3f")}
"""Entries of a training log that are shown after the step count, with their labels and formats."""


class Live(TrainerCallback):
    """Callback that shows phases for training and evaluation, and one line for each evaluation.

    It is also a context manager, which ends the phases that an error leaves open. Attached to a trainer, it is the only
    callback that prints.
    """

    def __init__(self) -> None:
        self._training: Phase | None = None
        self._evaluating: Phase | None = None
        self._may_draw = display.may_draw

    @classmethod
    def of(cls, trainer: Trainer) -> Self:
        """Attach one to `trainer` in place of transformers' callbacks, which print from one process of every host."""
        live = cls()
        for printer in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(printer)
        display.may_draw = not trainer.args.disable_tqdm
        if is_main_process():
            trainer.add_callback(live)
        return live

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_evaluation(kind)
        self._end_training(kind)
        display.may_draw = self._may_draw

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._training = Phase("training", state.max_steps, "steps", done=state.global_step)
        self._training.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._training is not None:
            self._training.done = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        logs = logs or {}
        if verbosity() == "verbose":
            entries = (f"{name} {_short(value)}" for name, value in logs.items() if name != "total_flos")
            say(f"step {state.global_step}: {', '.join(entries)}")
        if self._training is not None and "loss" in logs:
            known = {name: how for name, how in NOTED.items() if name in logs}
            self._training.note = ", ".join(f"{name} {logs[key]:{form}}" for key, (name, form) in known.items())

    def on_prediction_step(self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **_: Any) -> None:
        if self._evaluating is None:
            total = len(eval_dataloader) if has_length(eval_dataloader) else None
            self._evaluating = Phase("evaluating", total, "batches", ends=self._training is None)
            self._evaluating.__enter__()
        self._evaluating.advance()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **_: Any
    ) -> None:
        if self._evaluating is None:
            return
        took = f" ({duration(self._evaluating.age)})" if self._evaluating.age >= SHOWN_AFTER else ""
        self._end_evaluation()
        if self._training is not None and metrics and "eval_accuracy" in metrics:
            say(
                f"step {state.global_step:,} of {state.max_steps:,}: held-out accuracy {metrics['eval_accuracy']:.4f}, "
                f"loss {metrics['eval_loss']:.4f}{took}"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._end_training()

    def _end_evaluation(self, kind: type[BaseException] | None = None) -> None:
        phase, self._evaluating = self._evaluating, None
        if phase is not None:
            phase.__exit__(kind, None, None)

    def _end_training(self, kind: type[BaseException] | None = None) -> None:
        phase, self._training = self._training, None
        if phase is not None:
            phase.__exit__(kind, None, None)


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
