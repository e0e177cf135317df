"""Whatever 16-bit units a CPU has: fp32 unless asked otherwise, and bf16 that works when asked for."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from qlora_rm.artifacts.allowed import allowed_drift
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.backbone.precision import best_dtype
from qlora_rm.cli import main as qlora_rm
from tests.training.conftest import preference_rows, write_rows

UNITS = [(True, True), (True, False), (False, True), (False, False)]


@pytest.fixture
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[bool, bool]:
    """A simulated CPU with or without AMX tiles, and with or without AVX512-BF16."""
    tiles, avx512 = request.param
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: avx512)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return request.param


@pytest.mark.parametrize("units", UNITS, ids=str, indirect=True)
def test_fp32_is_the_default_on_every_cpu(units: tuple[bool, bool]) -> None:
    dtype, reason = best_dtype()
    assert dtype is torch.float32
    assert "CPU" in reason


@pytest.mark.slow
@pytest.mark.parametrize("units", [UNITS[0], UNITS[-1]], ids=str, indirect=True)
@pytest.mark.parametrize("asked", [None, True], ids=["default", "bf16"])
def test_the_way_from_rows_to_scores(units: tuple[bool, bool], asked: bool | None, flags, tmp_path, capsys) -> None:
    """Train, evaluate, merge in both dtypes, verify and score from the command line, with `--bf16 true` or without."""
    computes, model = "bf16" if asked else "fp32", str(tmp_path / "out")
    rows = write_rows(tmp_path / "held_out.jsonl", preference_rows(16, seed=7))
    assert qlora_rm(["train", *flags(bf16=asked, max_steps=12, eval_steps=12, save_steps=12)]) == 0
    assert f"engine: single, 1 process on cpu, {computes};" in capsys.readouterr().err
    manifest = Manifest.load(model)
    assert manifest.compute_dtype == computes
    assert manifest.noise.keys() == {"fp32", "bf16"}
    assert qlora_rm(["verify", model]) == 0
    for dtype in ("bf16", "fp32"):
        merged = str(tmp_path / dtype)
        assert qlora_rm(["merge", model, "--output", merged, "--dtype", dtype]) == 0
        assert qlora_rm(["verify", merged]) == 0
    capsys.readouterr()
    for folder, precision in ((model, "auto"), (merged, "bf16")):
        assert qlora_rm(["eval", folder, "--dataset", rows, "--precision", precision, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["overall"]["wins"] == 16
    assert qlora_rm(["score", model, "--prompt", "1: name the cat. ", "--responses", "a cat", "a dog, no"]) == 0


@pytest.mark.slow
def test_trainable_weights_stay_fp32_in_bf16(flags, tmp_path: Path) -> None:
    assert qlora_rm(["train", *flags(bf16=True, max_steps=2)]) == 0
    from safetensors.torch import load_file

    assert {w.dtype for w in load_file(tmp_path / "out/adapter_model.safetensors").values()} == {torch.float32}


@pytest.mark.long
@pytest.mark.slow
def test_a_merged_model_read_in_bf16_stays_within_what_training_measured(flags, tmp_path: Path) -> None:
    """As a consumer on a GPU loads it: bf16 weights and arithmetic, which this project never chooses on a CPU."""
    from qlora_rm.artifacts.golden import drift, scores_of
    from qlora_rm.backbone.scoring import score_sequences

    for asked in (None, True):
        out, merged = tmp_path / f"out-{asked}", tmp_path / f"merged-{asked}"
        assert qlora_rm(["train", *flags(bf16=asked, output_dir=str(out), max_steps=12)]) == 0
        assert qlora_rm(["merge", str(out), "--output", str(merged), "--dtype", "bf16"]) == 0
        manifest = Manifest.load(merged)
        model = AutoModelForSequenceClassification.from_pretrained(merged, dtype=torch.bfloat16).eval()
        scores = scores_of(manifest.golden, lambda ids, m=model: score_sequences(m, ids, pad_token_id=2))
        moved = drift(manifest.golden, scores, allowed_drift(manifest, "bf16"))
        assert moved.ok, moved
