"""The end of a run: evaluate once more, then save model, tokenizer, manifest with golden scores, and curves."""

import math
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from qlora_rm.artifacts.golden import GoldenItem, make_golden
from qlora_rm.artifacts.manifest import FILE_NAME as MANIFEST
from qlora_rm.artifacts.manifest import Manifest, Reward
from qlora_rm.artifacts.noise import Noise, measure_noise
from qlora_rm.backbone.precision import DTYPES, DtypeName
from qlora_rm.backbone.scoring import score_sequences
from qlora_rm.console import WARNING, say
from qlora_rm.preferences import PreferenceData, Tokenization
from qlora_rm.progress import Phase
from qlora_rm.training.checkpoints import flush, last_whole, written_whole
from qlora_rm.training.curves import draw_curves
from qlora_rm.training.finite import require_finite_scores
from qlora_rm.training.permissions import open_to_umask
from qlora_rm.training.trainer import PreferenceTrainer

WEIGHTS = (SAFETENSORS_WEIGHTS_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
"""Weight files, one of which every saved model has: an adapter's, a full model's, or the index of its shards."""


def finish(
    trainer: PreferenceTrainer, manifest: Manifest, data: PreferenceData, tokenization: Tokenization
) -> dict[str, float]:
    """Evaluate once more, and save model, tokenizer, manifest and curves.

    The manifest is written last: if it exists, so does everything else. Without it the run is not complete, and
    resuming from its last checkpoint calls this function again.

    Every rank computes the golden scores, since a forward pass under ZeRO-3 needs all ranks. If they are not finite,
    nothing is saved, and an earlier model in the folder stays as it is.
    """
    output = Path(str(trainer.args.output_dir))
    metrics = trainer.evaluate() if data.held_out is not None else {}
    golden = make_golden(data.golden_candidates, tokenization, partial(_score, trainer))
    require_finite_scores([score for item in golden for score in item.scores], trainer.state.global_step)
    with written_whole(output, output, removed=False):
        trainer.require_output()
        if trainer.args.should_save:
            (output / MANIFEST).unlink(missing_ok=True)  # of an earlier, shorter run in this folder
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(output))
        if trainer.args.should_save:
            _require_weights(output)
            open_to_umask(output, below=False)
        noise = _noise(trainer, golden, DTYPES[manifest.compute_dtype])
        trainer.require_output()
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            trainer.save_state()
            draw_curves(trainer.state.log_history, output / "curves.png")
            flush(output, below=False)
            after_training(manifest, trainer.state.global_step, golden, noise, metrics, data).save(output)
            flush(output, below=False)
    trainer.accelerator.wait_for_everyone()
    return metrics


def _require_weights(output: Path) -> None:
    """Check that weights were saved, before the manifest is written.

    transformers 5.23 may save no file, or a file without weights, and only log a warning.

    Raises:
        RuntimeError: no weights were saved.
    """
    for file in (output / name for name in WEIGHTS if (output / name).exists()):
        if file.suffix == ".json":
            return
        with safe_open(file, framework="pt") as opened:
            if opened.keys():
                return
    raise RuntimeError(
        f"the model was saved to {output} without an error, but none of {', '.join(WEIGHTS)} is there with weights; the last "
        f"whole checkpoint is {last_whole(str(output))}"
    )


def _score(trainer: PreferenceTrainer, sequences: list[list[int]]) -> torch.Tensor:
    """Return scores as training computes them, through the engine's own forward pass and autocast."""
    with Phase("golden scores"):
        return score_sequences(trainer.model_wrapped, sequences, pad_token_id=trainer.pad_token_id)


def _noise(trainer: PreferenceTrainer, golden: list[GoldenItem], trained_in: torch.dtype) -> dict[DtypeName, Noise]:
    """Measure how far rounding moves the golden scores, by dtype; print it, since it decides which dtypes can serve."""
    if is_deepspeed_zero3_enabled():
        say("noise of the golden scores: not measured on sharded weights; fixed tolerances apply")
        return {}
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    with Phase("noise of the golden scores"):
        noise = measure_noise(model, golden, trainer.pad_token_id, trained_in)
    for name in [name for name, one in noise.items() if not all(map(math.isfinite, astuple(one)))]:
        del noise[name]  # JSON has no infinite numbers
        say(f"{WARNING}scores in {name} overflow: no noise is noted for it, and fixed tolerances apply")
    if noise:
        spread = ", ".join(f"{one.largest:.2g} in {name}" for name, one in noise.items())
        say(f"noise of the golden scores: at most {spread}")
    return noise


def after_training(
    manifest: Manifest,
    steps: int,
    golden: list[GoldenItem],
    noise: dict[DtypeName, Noise],
    metrics: dict[str, float],
    data: PreferenceData,
) -> Manifest:
    """Return the manifest of a finished run."""
    assert manifest.training is not None
    reward = None
    if data.held_out is not None:
        n = sum(len(responses) for responses in data.held_out["response_ids"])
        reward = Reward(metrics["eval_mean_reward"], metrics["eval_std_reward"], n)
    trained = replace(manifest.training, steps=steps)
    return replace(manifest, training=trained, golden=golden, noise=noise, reward=reward)
