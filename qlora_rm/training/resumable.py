"""A trainer that can be interrupted at any moment and resumes as if it had not been.

Beyond transformers' trainer: a checkpoint is complete or does not count; an optimizer step is saved once; sums since
the last log line, a due evaluation and the order within an epoch survive; evaluation draws no random numbers; the
command's learning rate is obeyed; SIGTERM saves first.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback

from qlora_rm.errors import Terminated
from qlora_rm.training.checkpoints import (
    begin,
    checkpoint_folder,
    discard,
    discard_if_possible,
    flush,
    half_written,
    lacks_room,
    mark_whole,
    no_room,
    prune,
    step_of,
    written_whole,
)
from qlora_rm.training.engine import any_process
from qlora_rm.training.permissions import open_to_umask
from qlora_rm.training.quantization_state import without_quantization_state
from qlora_rm.training.ranks import stop_together
from qlora_rm.training.reading_trainer import ReadingTrainer, require_state
from qlora_rm.training.sampling import StepSampler
from qlora_rm.training.termination import Termination, outlive_sigterm
from qlora_rm.training.unlogged import Progress
from qlora_rm.training.wholeness import fault
from qlora_rm.training.zero_resharding import take_share


class ResumableTrainer(ReadingTrainer):
    """`RewardTrainer` with complete checkpoints and exact resume.

    Attributes:
        checkpoint_files: called on the main process with every checkpoint's folder, before it counts as complete.
        replaces_foreign: replace a checkpoint of the same step that another program wrote (`--resume restart`).
        spared: earlier checkpoints that are not usable; they are kept until their step is saved again, and not counted.
        before_save: called on the main process before anything is written or deleted; a reason it returns ends the run.
        termination: whether the run was asked to end; it only notices SIGTERM inside its `watch`.
        order: the training data's sampler, once created.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.checkpoint_files: Sequence[Callable[[Path], None]] = ()
        self.replaces_foreign = False
        self.spared: set[Path] = set()
        self.before_save: Callable[[], str | None] = lambda: None
        self.termination = Termination()
        self.order: StepSampler | None = None
        self._resumed: Path | None = None
        self._saved_step: int | None = None
        self._epoch_ends = False
        self._evaluation_due = False
        self._total_since = 0
        self.add_callback(_TakeUp(self))

    def train(self, resume_from_checkpoint: str | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        if resume_from_checkpoint is not None:
            self._resumed = Path(resume_from_checkpoint)
            require_state(self._resumed)
            self.args.eval_on_start = False  # done before the first step already
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def take_up(self) -> None:
        """Restore, at the start of a resumed training, what the checkpoint holds beyond transformers' state."""
        if self._resumed is None:
            return
        if self._resumed.parent.resolve() == Path(str(self.args.output_dir)).resolve():
            self._saved_step = step_of(self._resumed)
        # use the command's intervals; transformers keeps the checkpoint's, with a warning
        self.state.compute_steps(self.args, self.state.max_steps)
        progress = Progress.load(self._resumed)
        if len(progress.losses) == self.args.world_size:
            mine = progress.losses[self.args.process_index]
        else:
            mine = sum(progress.losses) / len(progress.losses)
        self._tr_loss += mine
        self._globalstep_last_logged = progress.logged_at
        self._total_loss_scalar = progress.total_loss or 0.0
        self._total_since = progress.logged_at if progress.total_loss is None else progress.total_since
        self._metrics["train"].update(progress.metrics)
        self._total_train_tokens = progress.tokens
        if progress.evaluation_due:
            self.control.should_evaluate = True
            super()._maybe_log_save_evaluate(
                self._tr_loss, None, self.model_wrapped, None, self.state.epoch or 0.0, None, time.time()
            )
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(self._resumed)
        if self._saved_step is not None and self.args.should_save:
            self._prune()  # the save may have been interrupted before it pruned

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return a loader whose workers survive a SIGTERM to the entire job; see `outlive_sigterm`."""
        loader: Any = super()._get_dataloader(*args, **kwargs)
        # accelerate 1.15 wraps this loader, and uses its settings to start workers and skip batches
        of_torch = loader.base_dataloader
        of_torch.worker_init_fn = partial(outlive_sigterm, of_torch.worker_init_fn)
        return loader

    def _run_epoch(self, **of: Any) -> None:  # type: ignore[override]
        """Run an epoch, or the rest of it after a resume.

        After skipping batches, accelerate 1.15 does not pass the epoch to the sampler: every resumed epoch would have
        the first one's order. A run resumed at its last step has nothing left to do; transformers 5.23 would take
        another step.
        """
        if self.order is not None:
            self.order.set_epoch(of["epoch"])
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self.termination.agreed(
            self.args.device
        ):  # since the previous step's check, or at the end of its evaluation
            # before the first step there is nothing to save, and the checkpoint's random states are not loaded yet
            if self.state.global_step > self._initial_global_step:
                self._save_checkpoint(of["model"], of["trial"])
            raise Terminated
        super()._run_epoch(**of)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, epoch: Any, *more: Any, **kwargs: Any
    ) -> None:
        """Log, evaluate and save what is due at the end of a step; stop early if the run was asked to end.

        transformers calls this at the end of a step, and again at the end of an epoch (or of training). At an epoch's
        last step, saving waits for the second call, so that the step is saved once, with the epoch's evaluation.
        """
        second, self._epoch_ends = self._epoch_ends, False
        control = self.control
        first_of_two = not second and (
            self.state.epoch == epoch + 1 or control.should_training_stop or control.should_epoch_stop
        )
        save_later = first_of_two and control.should_save
        told = self.termination.agreed(self.args.device)
        self._evaluation_due = second and self._evaluation_due
        if told:
            self._evaluation_due |= control.should_evaluate
            control.should_evaluate = False
        control.should_save = (control.should_save or told) and not first_of_two
        saved = control.should_save
        try:
            super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, *more, **kwargs)
        except Terminated:  # raised during an evaluation
            told, self._evaluation_due = True, True
            control.should_evaluate = False
            if not first_of_two:
                self._save_checkpoint(model, trial)
        if not first_of_two and (told or (saved and self.termination.agreed(self.args.device))):
            raise Terminated
        self._epoch_ends = first_of_two
        self.control.should_save = save_later

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate without drawing random numbers: training continues the same if this is done, repeated or cut short.

        Raises:
            Terminated: the run was asked to end (raised by `prediction_step`).
        """
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        try:
            with torch.random.fork_rng(devices):
                return super().evaluate(*args, **kwargs)
        except Terminated:
            if not self.is_in_train:
                self._save_checkpoint(self.model_wrapped, None)
            raise

    def require_output(self) -> None:
        """Stop all ranks if `before_save` gives a reason not to write to the output folder. Collective."""
        stop_together(self.before_save() if self.args.should_save else None, self.args.world_size)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Remove interrupted checkpoints, save, let the caller add files, mark as complete, then delete older ones.

        A step that is already saved is not saved again: meanwhile there would be no complete checkpoint of it.
        """
        step, writes = self.state.global_step, self.args.should_save
        output_dir = Path(str(self.args.output_dir))
        folder = checkpoint_folder(str(output_dir), step)
        if step == self._saved_step:
            return
        self.require_output()
        if writes:
            for cut_off in half_written(str(self.args.output_dir)):  # before free space is measured
                discard_if_possible(cut_off)
        needed = lacks_room(folder) if writes else None
        if any_process(needed is not None, self.args.device):
            raise no_room(folder, output_dir, needed, "too little room is left")
        with written_whole(folder, output_dir, removed=writes):
            if writes:
                discard(folder, foreign=self.replaces_foreign)
                begin(folder)
            progress = self._progress()  # waits for all: no process writes into a folder that is being removed
            with without_quantization_state(model), self._nothing_deleted():
                super()._save_checkpoint(model, trial)
            if writes:
                progress.save(folder)
                for add in self.checkpoint_files:
                    add(folder)
            self.accelerator.wait_for_everyone()  # other processes of a host write here too
            if self.args.local_process_index == 0:
                open_to_umask(folder)
                flush(folder)
            self.accelerator.wait_for_everyone()
            if writes:
                mark_whole(folder)
        self.spared.discard(folder)
        self._saved_step = step
        if writes:
            self._prune()
        self.accelerator.wait_for_everyone()

    def _load_best_model(self) -> None:
        """Load the best checkpoint's weights, which any number of processes wrote; never save them as the last step.

        Raises:
            UserError: the checkpoint has changed since it was saved.
        """
        best = Path(str(self.state.best_model_checkpoint))
        damaged = fault(best, contents=True) if self.args.process_index == 0 else None
        stop_together(damaged and f"{best}, the best checkpoint, cannot be used: {damaged}.", self.args.world_size)
        if isinstance(self.model_wrapped, DeepSpeedEngine):
            take_share(best, self.accelerator, self.model_wrapped)
        super()._load_best_model()
        self._saved_step = self.state.global_step

    def _finalize_training(self, *args: Any) -> Any:
        """End training without deleting checkpoints.

        With `save_total_limit` 1, transformers 5.23 would delete all checkpoints but the best here. The finished model
        is not saved yet, and a longer run resumes from the last checkpoint.
        """
        self._tr_loss = self.accelerator.gather(self._tr_loss.detach().reshape(1)).mean()
        with self._nothing_deleted():
            return super()._finalize_training(*args)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with `train_loss` as the mean over all steps of the run.

        transformers 5.23 divides the losses since the last log line before the checkpoint by the steps since the
        checkpoint.
        """
        if "train_loss" in logs:
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step - self._total_since, 1)
        super().log(logs, *args, **kwargs)

    @contextmanager
    def _nothing_deleted(self) -> Iterator[None]:
        """Keep transformers from deleting checkpoints inside the block; only `prune` checks which are complete.

        The limit is hidden only inside the block, since loggers and model files record the settings.
        """
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def _prune(self) -> None:
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        prune(str(self.args.output_dir), limit, best, upto=self.state.global_step, spared=self.spared)

    def _progress(self) -> Progress:
        losses = self.accelerator.gather(self._tr_loss.detach().reshape(1))
        return Progress(
            losses.tolist(),
            self._globalstep_last_logged,
            dict(self._metrics["train"]),
            self._total_train_tokens,
            self._evaluation_due,
            self._total_loss_scalar,
            self._total_since,
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; under ZeRO-1 and 2, let PEFT take the adapter from this process, which holds all of it.

        transformers 5.23 would first clone the state of the entire 4-bit model in each process.
        """
        engine = self.model_wrapped
        if (
            isinstance(engine, DeepSpeedEngine)
            and engine.zero_optimization_stage() < 3
            and isinstance(self.model, PeftModel)
        ):
            self._save(output_dir)
        else:
            super().save_model(output_dir, _internal_call)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the scheduler, and keep the command's optimizer settings, which a checkpoint will overwrite."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self._told = [
            {key: value for key, value in group.items() if key != "params"}
            for group in scheduler.optimizer.param_groups
        ]
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the checkpoint's moments and step; keep the command's rate, schedule, weight decay and clipping."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        assert self.optimizer is not None
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        schedule: Any = self.lr_scheduler
        if isinstance(schedule, LambdaLR):  # others depend on the run so far; `resume_terms` refuses to change those
            schedule.base_lrs = [told["initial_lr"] for told in self._told]
            factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
            rates = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
            schedule._last_lr = rates
        for group, told, rate in zip(groups, self._told, rates, strict=True):
            group.update(told | {"lr": rate})
        if isinstance(self.model_wrapped, DeepSpeedEngine):
            self.model_wrapped.optimizer.clip_grad = self.args.max_grad_norm


class _TakeUp(TrainerCallback):
    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.take_up()
