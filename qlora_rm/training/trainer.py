"""TRL's RewardTrainer for comparisons of any number of responses, with fp32 master weights and even micro-batches."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from qlora_rm.backbone.packed import dense_width, model_inputs, row_multiple, sharing_model
from qlora_rm.training.arguments import TrainingConfig
from qlora_rm.training.collate import Collator
from qlora_rm.training.engine import any_process
from qlora_rm.training.finite import FiniteWatch, weights_are_finite
from qlora_rm.training.objective import EVALUATION, Objective, evaluate_batch, summarize
from qlora_rm.training.resumable import ResumableTrainer
from qlora_rm.training.sampling import StepSampler, length_grouped_order, random_order, sequential_order

COLUMNS = ["prompt_ids", "response_ids", "wins", "ties", "margins", "weight", "length", "tokens", "origin"]
"""Columns of the data set that the collator reads, and the sizes that samplers read."""


class PreferenceTrainer(ResumableTrainer):
    """RewardTrainer over tokenized comparisons (the columns of `preferences.load_preferences`).

    It overrides the loss (K responses, weights, ties, rankings) and the preparation of the data (done before). It also
    overrides the order (full steps, even micro-batches) and the evaluation step (exact over uneven batches and ranks).
    `ResumableTrainer` provides complete checkpoints and exact resume.

    Arguments:
        objective: the loss.
    """

    objective: Objective
    loss_is_scaled_for_ga = True  # type: ignore[assignment]  # `compute_loss` divides by the step's comparisons

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: TrainingConfig,
        tokenizer: PreTrainedTokenizerBase,
        train: Dataset,
        held_out: Dataset | None,
        objective: Objective,
        callbacks: list[TrainerCallback] | None = None,
    ):
        self.objective = objective
        self.pad_token_id = tokenizer.pad_token_id
        self.comparisons = len(train)
        self.drop_last = args.dataloader_drop_last
        self._micro_batches: list[Tensor] = []  # sums to log for the current optimizer step
        self.finite = FiniteWatch(str(args.output_dir), fp16=args.fp16)
        self._last_inputs: dict[str, Tensor] | None = None
        args.logging_nan_inf_filter = False  # it would log a loss of 0.0, where this trainer stops
        self.shares_prefix = sharing_model(model) is not None
        with keep_trainables(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=Collator(self.pad_token_id, self.shares_prefix, row_multiple(model), dense_width(model)),
                train_dataset=with_filler(train),
                eval_dataset=held_out,
                processing_class=tokenizer,
                compute_metrics=exact_metrics,
                callbacks=callbacks,
            )

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = COLUMNS  # type: ignore[assignment]

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """Return transformers' loader without `drop_last`: the sampler obeys it, and evaluation reads everything."""
        self.args.dataloader_drop_last = False
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.args.dataloader_drop_last = self.drop_last

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        """Return the order that `--train_sampling_strategy` names, in full optimizer steps."""
        args = self.args
        data: Any = train_dataset if train_dataset is not None else self.train_dataset
        data = data.select(range(self.comparisons))
        seed = args.data_seed if args.data_seed is not None else args.seed
        batches_per_step = args.world_size * args.gradient_accumulation_steps
        loads = None
        if args.train_sampling_strategy == "sequential":
            order = sequential_order(len(data))
        elif args.train_sampling_strategy == "group_by_length":
            order = length_grouped_order(data["length"], self._train_batch_size * batches_per_step, seed)
        else:
            order, loads = random_order(len(data), seed), self._loads(data)
        self.order = StepSampler(
            order,
            len(data),
            self._train_batch_size,
            batches_per_step,
            loads=loads,
            drop_last=self.drop_last,
        )
        return self.order

    def _loads(self, data: Dataset) -> list[int]:
        """Return the tokens that each comparison adds to a micro-batch, given the layout of batches."""
        if self.shares_prefix:
            return list(data["tokens"])
        return [
            len(responses) * longest for responses, longest in zip(data["response_ids"], data["length"], strict=True)
        ]

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Return the comparisons in this optimizer step, over all its micro-batches and ranks."""
        count = torch.stack([batch["counts"].sum() for batch in batch_samples]).sum()
        return self.accelerator.gather(count.to(device)[None]).sum()

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the micro-batch's share in the mean loss of the optimizer step; in evaluation the mean over the batch.

        The engines average gradients over the ranks, hence the factor.
        """
        scores = score_batch(model, inputs)
        losses = self.objective.losses(scores, inputs)
        if return_outputs:
            return losses.mean(), evaluate_batch(scores, losses, inputs)
        self._last_inputs = inputs
        self._log_batch(scores.detach(), losses.detach(), inputs)
        return losses.sum() * self.accelerator.num_processes / num_items_in_batch

    def _log_batch(self, scores: Tensor, losses: Tensor, inputs: dict[str, Any]) -> None:
        """Record running means under TRL's names, over all comparisons of a step, with one gather per step."""
        counts = inputs["counts"]
        scored = counts[inputs["comparison"]]
        least, most = (torch.where(scored, scores, bound) for bound in (math.inf, -math.inf))
        tokens = (inputs["input_ids"] != self.pad_token_id).sum().float()
        sums = evaluate_batch(scores, losses, inputs)[counts].sum(0)
        self._micro_batches.append(torch.cat([sums, torch.stack([least.min(), most.max(), tokens])]))
        self.finite.note(losses, inputs.get("origin", []))
        if not self.accelerator.sync_gradients:
            return
        gathered = self.accelerator.gather(torch.stack(self._micro_batches))
        self._micro_batches.clear()
        self.finite.require_step(gathered[:, : len(EVALUATION)], self.state.global_step + 1)
        step = summarize(gathered[:, : len(EVALUATION)])
        least, most, tokens = gathered[:, len(EVALUATION) :].unbind(-1)
        self._total_train_tokens += int(tokens.sum())
        metrics = self._metrics["train"]
        metrics["num_tokens"] = [self._total_train_tokens]
        metrics["min_reward"].append(least.min().item())
        metrics["max_reward"].append(most.max().item())
        for name in ("accuracy", "margin", "mean_reward"):
            metrics[name].append(step[name])

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, Tensor, Tensor]:
        """Return sums per comparison as predictions; `exact_metrics` computes metrics and loss from them.

        With one row per comparison, padding of the last batch drops out and every pair weighs the same.
        """
        self.termination.end_if_asked(self.args.device)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            _, sums = self.compute_loss(model, inputs, return_outputs=True)
        return None, sums, sums[:, 0]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self.finite.note_norm(norm, self.state.global_step + 1)
        return norm

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self.finite.require_norm()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, and stop the run if a metric is not finite."""
        metrics = super().evaluate(*args, **kwargs)
        self.finite.require_metrics(metrics, self.state.global_step)
        return metrics

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, unless the weights no longer give finite scores: earlier checkpoints then stay as they are."""
        if self.state.global_step != self._saved_step:
            self.finite.require_norm()
            self._require_finite_weights(model)
        super()._save_checkpoint(model, trial)

    def _require_finite_weights(self, model: nn.Module) -> None:
        """Score the last micro-batch with the weights that are about to be saved.

        A step may make them useless although its own loss was finite. The next loss would show this only after older
        checkpoints were deleted.
        """
        fine = weights_are_finite(model)
        if fine and self._last_inputs is not None and self.finite.evaluated_at != self.state.global_step:
            model.eval()
            with torch.no_grad(), self.compute_loss_context_manager():
                fine = bool(score_batch(model, self._last_inputs).isfinite().all())
        self.finite.require_weights(not any_process(not fine, self.args.device), self.state.global_step)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write no model card: TRL's names neither the data nor the scoring contract; the manifest does."""


def with_filler(train: Dataset) -> Dataset:
    """Return the comparisons followed by a zero-weight row with one response and no pairs, which pads the last step."""
    shortest = min(range(len(train)), key=train["length"].__getitem__)
    row = train[shortest]
    nothing: dict[str, Any] = {
        "response_ids": row["response_ids"][:1],
        "wins": [],
        "ties": [],
        "margins": [],
        "weight": 0.0,
        **({"origin": ""} if "origin" in row else {}),
    }
    return concatenate_datasets([train, Dataset.from_list([row | nothing], features=train.features)])


def score_batch(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the scores of the batch's sequences, float32 [S]."""
    return model(**model_inputs(inputs)).logits[:, 0].float()


def exact_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """Return means over all held-out comparisons, from the gathered rows of `evaluate_batch`."""
    return summarize(torch.as_tensor(prediction.predictions))


@contextmanager
def keep_trainables(model: nn.Module) -> Iterator[None]:
    """Undo a cast of the trainable weights made inside the block.

    TRL casts every trainable weight of a quantized model to bf16, including the score head and a loaded adapter's fp32
    weights. At usual learning rates most updates are then smaller than a bf16 step and vanish (trl #7268: 22 % of a
    run's progress lost, measured). Remove once TRL leaves adapters alone.
    """
    quantized = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad} if quantized else {}
    masters = {name: p.detach().clone() for name, p in trainable.items()}
    yield
    for name, parameter in model.named_parameters():
        if name in masters:
            parameter.data = masters[name].to(parameter.device)
