"""Adapters go on layers that text passes through and later commands can merge; others are refused before training."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForSequenceClassification

from qlora_rm.artifacts.load import RewardModel
from qlora_rm.backbone.adapter import attach_adapter, load_adapter
from qlora_rm.backbone.inventory import inventory, unquantized_share
from qlora_rm.backbone.load import Backbone, load_backbone, read_model_config, skeleton
from qlora_rm.backbone.reach import unreached
from qlora_rm.backbone.scoring import score_sequences
from qlora_rm.config import AdapterConfig, BackboneConfig
from qlora_rm.errors import UserError
from qlora_rm.merging.merge import merge
from qlora_rm.planning.skeleton import build
from qlora_rm.verification.folder import verify
from tests.models_for_tests import save_backbone
from tests.reward_models_for_tests import make_reward_model
from tests.serving.servers_for_tests import served
from tests.tokenizers_for_tests import small_tokenizer

TOWERS = ["model.vision_tower", "model.multi_modal_projector"]


def load(folder: Path, architecture: str, **options) -> Backbone:
    tokenizer = small_tokenizer()
    base = save_backbone(folder, architecture, tokenizer)
    return load_backbone(BackboneConfig(model_name_or_path=base, **options), tokenizer, torch.float32)


def adapted(model: nn.Module) -> set[str]:
    return {name.partition(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_an_adapter_on_the_embedding_is_verified_merged_and_served(tmp_path, architecture):
    names = ["wte", "c_attn"] if architecture == "gpt2" else ["embed_tokens", "q_proj"]
    config = AdapterConfig(lora_r=4, lora_target_modules=names)
    folder = make_reward_model(tmp_path, architecture, adapter=config)
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert any("lora_embedding_B" in name for name in file.keys())  # noqa: SIM118
    plain = RewardModel.load(str(folder))
    for module in plain.model.modules():
        if hasattr(module, "lora_embedding_B"):
            for factor in module.lora_embedding_B.values():
                factor.data.zero_()
    golden = plain.manifest.golden[0]
    assert plain.score_token_ids(golden.token_ids).tolist() != pytest.approx(golden.scores, abs=1e-3)
    assert [check for check in verify(str(folder)) if not check.ok] == []
    assert merge(str(folder), str(tmp_path / "merged"), dtype="fp32").drift < 1e-5
    assert [check for check in verify(str(tmp_path / "merged")) if not check.ok] == []
    merge(str(folder), str(tmp_path / "original"), dtype="fp32", base="original")
    with served(RewardModel.load(str(folder)), folder) as service:  # proves the golden scores first
        assert service.reader.vocabulary == 455


@pytest.mark.parametrize(
    ("architecture", "config", "message"),
    [
        ("llama", AdapterConfig(lora_target_modules=["q_proj", "score"]), "score names the score head"),
        ("bert", AdapterConfig(lora_target_modules=["pooler.dense"]), "names the score head"),
        ("llama", AdapterConfig(lora_target_modules=["embed_tokens"], use_dora=True), "no DoRA on the embedding"),
        ("llama", AdapterConfig(lora_target_modules=["input_layernorm"]), "is a LlamaRMSNorm, which LoRA cannot adapt"),
        ("llama", AdapterConfig(lora_target_modules=["mlp"]), "is a LlamaMLP, which LoRA cannot adapt"),
        ("bart", AdapterConfig(lora_target_modules=["embed_tokens"]), "shares its weight with"),
        (
            "gemma3_images",
            AdapterConfig(lora_target_modules=["q_proj", "fc1"]),
            "fc1: .*vision_tower, which text never",
        ),
        (
            "gemma3_images",
            AdapterConfig(lora_target_modules=["patch_embedding"]),
            "is a Conv2d, which LoRA cannot adapt",
        ),
    ],
)
def test_targets_that_cannot_be_are_refused(tmp_path, architecture, config, message):
    backbone = load(tmp_path, architecture, quantization="none")
    with pytest.raises(UserError, match=message):
        attach_adapter(backbone, config)


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.conv = nn.MultiheadAttention(8, 2), nn.Conv2d(1, 1, 1)


@pytest.mark.parametrize(("name", "message"), [("conv", "is a Conv2d"), ("attention", "MultiheadAttention")])
def test_other_kinds_that_peft_would_take_are_refused(tmp_path, name, message):
    backbone = load(tmp_path, "llama", quantization="none")
    backbone.model.model.layers[0].odd = Attends()
    for target in (name, "out_proj") if name == "attention" else (name,):
        with pytest.raises(UserError, match=message):
            attach_adapter(backbone, AdapterConfig(lora_target_modules=["q_proj", target]))


def test_only_layers_that_text_passes_through_are_adapted(tmp_path, capsys):
    backbone = load(tmp_path, "gemma3_images")
    assert unreached(backbone.model) == TOWERS
    assert unquantized_share(backbone.model)[0] == 0, "a tower's own weights do not count"
    capsys.readouterr()
    model = attach_adapter(backbone, AdapterConfig(lora_r=4))
    said = capsys.readouterr().err
    assert "text never passes through them" in said and "model.vision_tower" in said
    assert len(adapted(model)) == 2 * 7, "seven linear layers in each of two layers"
    assert all(".language_model." in name for name in adapted(model))
    lines = inventory(model)
    assert any(line.startswith("not reached by text") for line in lines)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.1)
    sequences = [[7, 8, 9], [10, 11, 12, 13]]
    scores = score_sequences(model, sequences, pad_token_id=2)
    model.save_pretrained(tmp_path / "adapter")
    again = load_adapter(load(tmp_path / "again", "gemma3_images"), str(tmp_path / "adapter"), trainable=False)
    assert adapted(again) == adapted(model)
    torch.testing.assert_close(score_sequences(again, sequences, pad_token_id=2), scores, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["q_proj", r".*\.q_proj"])
def test_a_name_that_stands_on_both_sides_means_the_language_model(tmp_path, name):
    model = attach_adapter(load(tmp_path, "gemma3_images"), AdapterConfig(lora_target_modules=[name]))
    assert len(adapted(model)) == 2 and all(".language_model." in name for name in adapted(model))


def test_the_plan_counts_what_training_adapts(tmp_path):
    base = save_backbone(tmp_path, "gemma3_images", small_tokenizer())
    config = read_model_config(base)
    planned = build(config, BackboneConfig(), AdapterConfig(lora_r=4), torch.float32)
    assert len(adapted(planned)) == 14
    assert unreached(skeleton(config)) == TOWERS


def test_towers_stay_as_they_are_where_all_else_is_trained(tmp_path):
    tokenizer = small_tokenizer()
    base = save_backbone(tmp_path, "gemma3_images", tokenizer)
    config = BackboneConfig(model_name_or_path=base, quantization="none")
    model = load_backbone(config, tokenizer, torch.float32, full_fine_tuning=True).model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and not any(name.startswith(tuple(TOWERS)) for name in trained)


def test_an_expert_that_no_token_was_sent_to_counts_as_reached(tmp_path):
    """Unfused experts in a list, as some models have them: four tokens do not reach all."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Sequential(nn.Linear(64, 64)) for _ in range(4))
            self.unused = nn.ModuleList([nn.Linear(64, 64)])

        def forward(self, x):
            return self.experts[1](x)

    base = save_backbone(tmp_path, "gemma3_images", small_tokenizer())
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model.model.language_model.layers[1].mlp = Experts()
    assert set(unreached(model)) == {*TOWERS, "model.language_model.layers.1.mlp.unused"}
