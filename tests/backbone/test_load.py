"""Properties of a loaded backbone: all quantized but the head, which is small, in fp32, and kept if it exists."""

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from qlora_rm.backbone.adapter import attach_adapter, linear_names, load_adapter
from qlora_rm.backbone.head import is_in_head
from qlora_rm.backbone.inventory import inventory, unquantized_share
from qlora_rm.backbone.load import load_backbone
from qlora_rm.backbone.scoring import score_sequences
from qlora_rm.config import AdapterConfig, BackboneConfig
from qlora_rm.errors import UserError
from tests.models_for_tests import (
    BACKBONES,
    CAUSAL,
    ENCODERS,
    EXPERTS,
    EXPORTED,
    IMAGES,
    SWITCHING,
    UNCOVERED,
    VERIFIED,
    save_backbone,
)
from tests.tokenizers_for_tests import small_tokenizer

SEQUENCES = [[7, 8, 9, 10], [11, 12], [13] * 9]


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    made = {}

    def folder(architecture):
        if architecture not in made:
            made[architecture] = save_backbone(tmp_path_factory.mktemp(architecture), architecture, tokenizer)
        return made[architecture]

    return folder


def load(path, tokenizer, **options):
    return load_backbone(BackboneConfig(model_name_or_path=path, **options), tokenizer, torch.float32)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
@pytest.mark.parametrize("architecture", [*CAUSAL, *ENCODERS])
def test_everything_linear_is_quantized_but_the_head(folders, tokenizer, architecture, quantization):
    backbone = load(folders(architecture), tokenizer, quantization=quantization)
    quantized = bnb.nn.Linear4bit if quantization == "4bit" else bnb.nn.Linear8bitLt
    for name, module in backbone.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert isinstance(module, quantized) != is_in_head(name, backbone.head), name
    for name in backbone.head:
        assert all(p.dtype == torch.float32 for p in backbone.model.get_submodule(name).parameters())
    assert backbone.has_new_head and unquantized_share(backbone.model)[0] == 0
    assert backbone.model.config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*CAUSAL, *ENCODERS])
def test_adapter_leaves_the_head_alone_and_brings_it_back(folders, tokenizer, architecture, tmp_path):
    backbone = load(folders(architecture), tokenizer)
    assert not any(is_in_head(name, backbone.head) for name in linear_names(backbone))
    model = attach_adapter(backbone, AdapterConfig(lora_r=4))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert not any(
        "lora_" in name and is_in_head(name.removeprefix("base_model.model."), backbone.head) for name in trained
    )
    assert all(p.dtype == torch.float32 for p in trained.values())
    for parameter in trained.values():
        parameter.data.normal_(std=0.1)
    scores = score_sequences(model, SEQUENCES, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(tmp_path)
    again = load_adapter(load(folders(architecture), tokenizer), str(tmp_path), trainable=False)
    torch.testing.assert_close(
        score_sequences(again, SEQUENCES, pad_token_id=tokenizer.pad_token_id), scores, rtol=0, atol=0
    )
    assert not any(p.requires_grad for p in again.parameters())


def test_the_head_is_computed_in_fp32_under_autocast(folders, tokenizer):
    model = load(folders("llama"), tokenizer).model
    hidden = torch.randn(3, 64)
    exact = hidden @ model.score.weight.T
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model.score(hidden), exact, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("std", "expected"), [(None, 65**-0.5), (0.0, 0.0), (0.5, 0.5)])
def test_a_new_head_is_small_and_seeded(folders, tokenizer, std, expected):
    one, two = (load(folders("llama"), tokenizer, head_init_std=std).model.score.weight for _ in range(2))
    assert torch.equal(one, two)
    assert one.std().item() == pytest.approx(expected, rel=0.35)


@pytest.mark.parametrize("quantization", ["4bit", "none"])
def test_a_reward_model_keeps_its_head(folders, tokenizer, tmp_path, quantization):
    model = AutoModelForSequenceClassification.from_pretrained(folders("llama"), num_labels=1)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    backbone = load(str(tmp_path), tokenizer, quantization=quantization)
    assert not backbone.has_new_head
    with pytest.raises(UserError, match=r"--head_init_std has no effect.*whose head is kept"):
        load(str(tmp_path), tokenizer, head_init_std=0.0)
    torch.testing.assert_close(backbone.model.score.weight, model.score.weight, rtol=0, atol=0)


def test_a_classifier_of_two_labels_is_refused(folders, tokenizer, tmp_path):
    AutoModelForSequenceClassification.from_pretrained(folders("llama"), num_labels=2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="2 labels"):
        load(str(tmp_path), tokenizer)


def test_a_checkpoint_that_lacks_backbone_weights_is_refused(folders, tokenizer, tmp_path):
    save_backbone(tmp_path, "llama", tokenizer)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 weights .*up_proj"):
        load(str(tmp_path), tokenizer)


def test_an_adapter_without_its_head_is_refused(folders, tokenizer, tmp_path):
    attach_adapter(load(folders("llama"), tokenizer), AdapterConfig(lora_r=4)).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({k: v for k, v in weights.items() if "score" not in k}, path)
    with pytest.raises(UserError, match="saved without its head 'score'"):
        load_adapter(load(folders("llama"), tokenizer), str(tmp_path), trainable=False)
    save_file({k: v[:0] if "score" in k else v for k, v in weights.items()}, path)
    with pytest.raises(UserError, match="empty"):
        load_adapter(load(folders("llama"), tokenizer), str(tmp_path), trainable=False)


def test_an_adapter_of_another_backbone_is_refused(folders, tokenizer, tmp_path):
    attach_adapter(load(folders("llama"), tokenizer), AdapterConfig(lora_r=4)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not fit"):
        load_adapter(load(folders("gpt2"), tokenizer), str(tmp_path), trainable=False)


def test_wrong_folders_are_named(tokenizer, folders, tmp_path):
    with pytest.raises(UserError, match="no folder"):
        load(str(tmp_path / "nowhere"), tokenizer)
    with pytest.raises(UserError, match="not a model folder"):
        load(str(tmp_path), tokenizer)
    attach_adapter(load(folders("llama"), tokenizer), AdapterConfig(lora_r=4)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"holds an adapter.*--adapter"):
        load(str(tmp_path), tokenizer)


def test_new_tokens_of_content_need_a_backbone_that_is_trained_whole(folders):
    """Their embeddings would be random, frozen and not saved; a pad token's row is never used."""
    tokenizer = small_tokenizer()
    tokenizer.add_tokens(["<new>", "<newer>"])
    with pytest.raises(UserError, match="random and frozen"):
        load(folders("llama"), tokenizer)


def test_targets_layers_dora_and_rslora(folders, tokenizer):
    model = attach_adapter(
        load(folders("llama"), tokenizer),
        AdapterConfig(lora_r=4, lora_target_modules=["q_proj"], lora_layers=[1], use_dora=True, use_rslora=True),
    )
    adapted = {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(adapted) == 3 and all("layers.1.self_attn.q_proj" in name for name in adapted)
    with pytest.raises(UserError, match="no layer of that name"):
        attach_adapter(load(folders("llama"), tokenizer), AdapterConfig(lora_target_modules=["no_such_layer"]))


def test_inventory_counts_every_weight_once(folders, tokenizer):
    backbone = load(folders("llama"), tokenizer)
    plain = sum(
        p.numel()
        for p in AutoModelForSequenceClassification.from_pretrained(folders("llama"), num_labels=1).parameters()
    )
    lines = inventory(backbone.model)
    assert any("nf4" in line for line in lines)
    assert f"{plain:,}" in lines[-1]


def test_scores_do_not_depend_on_the_batch(folders, tokenizer):
    model = load(folders("llama"), tokenizer).model
    together = score_sequences(model, SEQUENCES, pad_token_id=tokenizer.pad_token_id)
    alone = torch.cat([score_sequences(model, [s], pad_token_id=tokenizer.pad_token_id) for s in SEQUENCES])
    left = score_sequences(model, SEQUENCES, pad_token_id=tokenizer.pad_token_id, layout="left")
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together, left, atol=1e-5, rtol=1e-5)


def test_every_architecture_here_is_tested():
    tested = {
        *CAUSAL,
        *EXPERTS,
        *UNCOVERED,
        *ENCODERS,
        *EXPORTED,
        *IMAGES,
        *VERIFIED,
        *SWITCHING,
        "bart",
    }  # bart is in test_zero3.py
    assert tested == set(BACKBONES)


def test_an_evaluation_changes_no_gradient(folders, tokenizer):
    """On CPUs with AVX512-BF16 bitsandbytes would repack the weights in eval mode and pass no gradient from then on."""
    model = attach_adapter(load(folders("llama"), tokenizer), AdapterConfig(lora_r=4)).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.1)

    def gradients():
        model.zero_grad()
        model(input_ids=torch.tensor([SEQUENCES[0]] * 2)).logits.sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    before = gradients()
    score_sequences(model, SEQUENCES, pad_token_id=tokenizer.pad_token_id)
    assert model.training
    after = gradients()
    assert before.keys() == after.keys()
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient, rtol=0, atol=0, msg=name)
