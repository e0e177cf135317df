"""The run's settings override a checkpoint's own; those that cannot be overridden are kept and reported."""

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qlora_rm.artifacts.load import RewardModel
from qlora_rm.backbone.in_force import disable_dropout
from qlora_rm.backbone.inventory import inventory
from qlora_rm.backbone.load import load_backbone
from qlora_rm.backbone.scoring import score_sequences
from qlora_rm.config import BackboneConfig
from qlora_rm.errors import UserError
from qlora_rm.merging.merge import merge
from qlora_rm.verification.folder import verify
from tests.models_for_tests import save_backbone
from tests.reward_models_for_tests import edit_json, make_reward_model
from tests.tokenizers_for_tests import small_tokenizer

SEQUENCES = [[7, 8, 9, 10], [11, 12]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def save_quantized(base: str, **settings: Any) -> None:
    """Save the backbone in `base` again, quantized, with its other weights in bf16."""
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | settings
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=BitsAndBytesConfig(**settings), dtype=torch.bfloat16
    )
    model.save_pretrained(base)


def quantized(folder: Path, **settings: Any) -> str:
    base = save_backbone(folder, "llama", small_tokenizer())
    save_quantized(base, **settings)
    return base


def load(base: str, dtype: str = "fp32", **options: Any) -> Any:
    config = BackboneConfig(model_name_or_path=base, **options)
    return load_backbone(config, small_tokenizer(), DTYPES[dtype]).model


def layers_of(model: torch.nn.Module) -> list[bnb.nn.Linear4bit]:
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


@pytest.mark.parametrize("brought", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_layers_of_a_4_bit_checkpoint_compute_in_the_dtype_of_the_run(tmp_path, brought, asked):
    model = load(quantized(tmp_path, bnb_4bit_compute_dtype=DTYPES[brought]), asked)
    assert {layer.compute_dtype for layer in layers_of(model)} == {DTYPES[asked]}
    plain = {p.dtype for n, p in model.named_parameters() if p.is_floating_point() and not n.startswith("score")}
    assert plain == {DTYPES[asked]}, "embeddings and norms, which were stored in bf16"
    assert f"quantized: 14 layers (nf4, double quantization, stored as uint8), computed in {asked}" in inventory(model)


def test_the_inventory_reads_the_layers_not_the_options(tmp_path):
    model = load(quantized(tmp_path))
    layers_of(model)[0].compute_dtype = torch.float16
    lines = inventory(model)
    assert any("1 layers (nf4" in line and "computed in fp16" in line for line in lines)
    assert any("13 layers (nf4" in line and "computed in fp32" in line for line in lines)


@pytest.mark.slow
def test_a_model_trained_on_a_4_bit_checkpoint_is_verified_and_merged(tmp_path):
    folder = make_reward_model(
        tmp_path, save_again=lambda base: save_quantized(base, bnb_4bit_compute_dtype=torch.bfloat16)
    )
    assert [str(check) for check in verify(str(folder)) if not check.ok] == []
    record = merge(str(folder), str(tmp_path / "merged"), dtype="fp32")
    assert record.drift < 1e-5
    with pytest.raises(UserError, match=r"--base original: .* is saved in 4bit"):
        merge(str(folder), str(tmp_path / "original"), base="original")


@pytest.mark.slow
def test_scoring_in_another_dtype_reaches_the_layers(tmp_path):
    folder = make_reward_model(tmp_path, save_again=save_quantized)
    assert {layer.compute_dtype for layer in layers_of(RewardModel.load(str(folder)).model)} == {torch.float32}
    in_bf16 = RewardModel.load(str(folder), precision="bf16").model
    assert {layer.compute_dtype for layer in layers_of(in_bf16)} == {torch.bfloat16}


def test_what_the_checkpoint_leaves_out_of_quantization_is_not_the_head(tmp_path):
    model = load(quantized(tmp_path, llm_int8_skip_modules=["lm_head"]))
    assert isinstance(model.score, torch.nn.Linear) and model.score.weight.dtype == torch.float32
    assert model.score.weight.std() < 0.3


def test_another_kind_of_4_bit_is_kept_and_said(tmp_path, capsys):
    base = quantized(tmp_path, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)
    model = load(base)
    assert capsys.readouterr().err.count("saved in 4 bit with fp4 instead of nf4, no double quantization;") == 1
    assert any("layers (fp4, single quantization" in line for line in inventory(model))


@pytest.mark.parametrize(("saved", "asked"), [("4bit", "none"), ("4bit", "8bit"), ("8bit", "4bit"), ("8bit", "none")])
def test_another_quantization_than_that_of_the_checkpoint_is_refused(tmp_path, saved, asked):
    base = quantized(tmp_path, load_in_4bit=saved == "4bit", load_in_8bit=saved == "8bit")
    with pytest.raises(UserError, match=f"saved in {saved[0]} bit, .* pass --quantization {saved}"):
        load(base, quantization=asked)
    assert load(base, quantization=saved).model.embed_tokens.weight.dtype == torch.float32


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    base = save_backbone(tmp_path, "llama", small_tokenizer())
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    for asked in ("none", "4bit"):
        with pytest.raises(UserError, match=r"saved in gptq, .*16 bit"):
            load(base, quantization=asked)


def test_settings_that_change_what_a_forward_pass_returns_are_set(tmp_path):
    base = save_backbone(tmp_path, "llama", small_tokenizer())
    plain = score_sequences(load(base), SEQUENCES, pad_token_id=2)
    edit_json(
        tmp_path / "config.json",
        return_dict=False,
        output_hidden_states=True,
        use_cache=True,
        problem_type="single_label_classification",
        id2label={"0": "good", "1": "bad"},
        dtype="float16",
    )
    model = load(base)
    output = model(input_ids=torch.tensor([[7, 8]]))
    assert output.hidden_states is None and output.past_key_values is None
    assert model.config.problem_type == "regression" and model.config.num_labels == 1
    torch.testing.assert_close(score_sequences(model, SEQUENCES, pad_token_id=2), plain, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {"attention_dropout": 0.5}),
        ("gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
        ("bert", {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.5, "classifier_dropout": 0.5}),
    ],
)
def test_no_dropout_of_the_checkpoint_is_left(tmp_path, architecture, settings):
    base = save_backbone(tmp_path, architecture, small_tokenizer())
    edit_json(tmp_path / "config.json", **settings)
    model = load(base, quantization="none").train()
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    with torch.no_grad():
        drawn = torch.stack([model(input_ids=ids).logits for _ in range(3)])
        assert drawn.std() > 0
        disable_dropout(model)
        torch.testing.assert_close(model(input_ids=ids).logits, model.eval()(input_ids=ids).logits, rtol=0, atol=1e-6)
