"""transformers' Auto class and pipeline, and PEFT's Auto class, load their exports."""

from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qlora_rm.artifacts.golden import ROUNDED, SAME, drift, scores_of
from qlora_rm.backbone.scoring import pad_batch
from qlora_rm.exporting.export import export
from qlora_rm.preferences import Candidates
from tests.consumers.snippets import run_snippet

WHY = [{"role": "user", "content": "Why?"}]
BECAUSE = [{"role": "assistant", "content": "Because."}]


def test_auto_class_gives_the_golden_scores_in_one_batch(world):
    model = AutoModelForSequenceClassification.from_pretrained(world.exported).eval()
    pad = AutoTokenizer.from_pretrained(world.exported).pad_token_id
    for side in ("right", "left"):

        def score(sequences, side=side):
            with torch.no_grad():
                return model(**pad_batch(sequences, pad, side)).logits[:, 0]

        assert drift(world.manifest.golden, scores_of(world.manifest.golden, score), SAME).ok


def test_card_s_code_for_auto_class_and_pipeline_gives_our_scores(world, ours):
    found = run_snippet(world.exported, "transformers")
    wanted = ours.score_candidates([Candidates(WHY, (BECAUSE,))])[0][0]
    assert found["score"] == pytest.approx(wanted, abs=1e-4)
    assert found["same_score"] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("repacks", [True, False], ids=["as it comes", "kept to fp32"])
def test_card_s_code_for_peft_gives_the_golden_scores(world, tmp_path: Path, repacks: bool):
    """On a CPU with AVX512-BF16, bitsandbytes 0.50 computes 4-bit layers in bf16 unless this is turned off.

    Any remaining difference would be the consumer's.
    """
    folder = tmp_path / "for_peft"
    exported = export(str(world.adapter), ["peft"], str(folder))
    assert exported.ok, exported.checks
    found = run_snippet(folder, "peft")
    assert isinstance(found["model"], PeftModel)
    for module in found["model"].modules():
        if isinstance(module, bnb.nn.Linear4bit) and not repacks:
            module.support_avx512bf16_for_cpu = False

    def score(sequences):
        with torch.no_grad():
            return found["model"](**pad_batch(sequences, found["tokenizer"].pad_token_id)).logits[:, 0]

    moved = drift(world.manifest.golden, scores_of(world.manifest.golden, score), ROUNDED if repacks else SAME)
    assert moved.ok, moved
