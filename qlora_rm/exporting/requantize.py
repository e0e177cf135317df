"""Quantize a merged model to 4 bit again, for serving, and measure the change in its scores."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForSequenceClassification

from qlora_rm.artifacts.folders import artifact_kind, new_folder
from qlora_rm.artifacts.golden import Drift, GoldenItem, Tolerance, drift, scores_of
from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import Manifest, Step
from qlora_rm.artifacts.own_tokenizer import read_tokenizer
from qlora_rm.backbone.experts import fused_experts
from qlora_rm.backbone.head import head_modules
from qlora_rm.backbone.load import quantization_config, quiet_transformers, read_model_config, skeleton
from qlora_rm.backbone.precision import DTYPES
from qlora_rm.errors import UserError, first_line
from qlora_rm.progress import Phase

EVERY_PAIR = Tolerance(absolute=0.1, relative=0.02, flip_margin=0.0)
"""Every change of order counts, however close the two scores are."""


@dataclass(frozen=True)
class Requantized:
    """How scores in 4 bit differ from those before, on the golden items and on the user's own pairs."""

    golden: Drift
    yours: Drift | None

    def __str__(self) -> str:
        parts = [f"golden items: {self.golden}", f"your rows: {self.yours}" if self.yours else ""]
        return "; ".join(filter(None, parts))


def requantize(
    folder: str,
    output: str,
    *,
    yours: Sequence[Sequence[list[int]]] = (),
    trust_remote_code: bool = False,
) -> Requantized:
    """Write the full model in `folder` to `output` in NF4, with its head unchanged.

    Stock transformers loads the result in 4 bit without further options. Its manifest expects the new scores from then on.

    Arguments:
        yours: token ids of the responses to each of the user's prompts, on which changes of order are counted too.

    Raises:
        UserError: `folder` holds no full model of this project, or one already in 4 bit; `output` exists and is not empty.
    """
    if artifact_kind(folder) != "model":
        raise UserError(f"{folder} is an adapter. Merge it first: `qlora-rm merge {folder} --output DIR`.")
    manifest = Manifest.load(folder)
    if any(step.name == "requantize" for step in manifest.history):
        raise UserError(f"{folder} is in 4 bit already.")
    mine = [GoldenItem(None, [None] * len(ids), [list(i) for i in ids], [0.0] * len(ids)) for ids in yours]
    before = RewardModel.load(folder, trust_remote_code=trust_remote_code)
    scores = scores_of(mine, before.score_token_ids)
    mine = [replace(item, scores=old) for item, old in zip(mine, scores, strict=True)]
    del before
    with new_folder(output) as beside:
        _save(folder, str(beside), manifest, trust_remote_code)
        read_tokenizer(folder, trust_remote_code).save_pretrained(beside)
        manifest.save(beside)  # loading reads the contract from it
        after = RewardModel.load(str(beside), trust_remote_code=trust_remote_code)
        new = scores_of(manifest.golden, after.score_token_ids)
        moved = drift(manifest.expected(), new, EVERY_PAIR)
        yours_moved = drift(mine, scores_of(mine, after.score_token_ids), EVERY_PAIR) if mine else None
        settings = {"quantization": "nf4, double quantization"}
        if yours_moved is not None:
            settings |= {"flips_on_your_pairs": f"{yours_moved.flips} of {yours_moved.pairs}"}
        manifest.after(Step.of("requantize", settings, moved, new)).save(beside, Manifest.load(beside).files)
    return Requantized(moved, yours_moved)


def _save(folder: str, output: str, manifest: Manifest, trust_remote_code: bool) -> None:
    dtype = DTYPES[manifest.merge.dtype] if manifest.merge else torch.float32
    settings = quantization_config("4bit", dtype)
    assert settings is not None
    bones = skeleton(read_model_config(folder, trust_remote_code=trust_remote_code), trust_remote_code)
    if fused_experts(bones):
        raise UserError(
            f"{folder} is a mixture of experts, whose experts stock transformers keeps in 16 bit. Serve the adapter on its "
            "4-bit base instead."
        )
    settings.llm_int8_skip_modules = head_modules(bones)
    try:
        with Phase("loading and quantizing"), quiet_transformers():
            model = AutoModelForSequenceClassification.from_pretrained(
                folder, dtype=dtype, quantization_config=settings, trust_remote_code=trust_remote_code
            )
    except (OSError, ValueError) as error:
        raise UserError(f"The model in {folder} could not be loaded in 4 bit: {first_line(error)}") from error
    with Phase("saving"), quiet_transformers():
        model.save_pretrained(output)
