"""Every word of --lora_target_modules and index of --lora_layers matches a layer, or gives an error that lists some."""

import re

import pytest
import torch

from qlora_rm.backbone.adapter import attach_adapter
from qlora_rm.backbone.head import head_modules
from qlora_rm.backbone.load import Backbone, skeleton
from qlora_rm.config import AdapterConfig
from qlora_rm.errors import UserError
from tests.models_for_tests import BACKBONES


def adapted(architecture, **options):
    """Names of the modules that get an adapter; the model has no weights."""
    with torch.device("meta"):
        config = BACKBONES[architecture](vocab_size=100, pad_token_id=0).config
    model = skeleton(config)
    with torch.device("meta"):
        model = attach_adapter(Backbone(model, head_modules(model), True), AdapterConfig(lora_r=2, **options))
    names = {re.split(r"\.lora_(?:embedding_)?A", n)[0] for n, _ in model.named_parameters() if "_A" in n}
    return sorted(name.removeprefix("base_model.model.") for name in names)


def in_layers(*names, layers=(0, 1)):
    return sorted(f"model.layers.{i}.{name}" for i in layers for name in names)


QV = ("self_attn.q_proj", "self_attn.v_proj")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"lora_target_modules": ["q_proj", "v_proj"]}, in_layers(*QV)),
        ({"lora_target_modules": ["self_attn.q_proj"]}, in_layers("self_attn.q_proj")),
        ({"lora_target_modules": ["model.layers.1.self_attn.q_proj"]}, in_layers("self_attn.q_proj", layers=[1])),
        ({"lora_target_modules": ["q_proj", "v_proj"], "lora_layers": [1]}, in_layers(*QV, layers=[1])),
        ({"lora_target_modules": [r".*self_attn\.(q|v)_proj"]}, in_layers(*QV)),
        ({"lora_target_modules": r".*self_attn\.(q|v)_proj"}, in_layers(*QV)),
        ({"lora_target_modules": [r".*\.(q|v)_proj"], "lora_layers": [0]}, in_layers(*QV, layers=[0])),
        ({"lora_target_modules": [r"model\.layers\.1\..*_proj"]}, None),
        ({"lora_target_modules": ["embed_tokens", "q_proj"]}, ["model.embed_tokens", *in_layers("self_attn.q_proj")]),
    ],
    ids=str,
)
def test_what_the_words_name_is_adapted(options, expected):
    names = adapted("llama", **options)
    if expected is None:
        assert len(names) == 7 and all(name.startswith("model.layers.1.") for name in names)
    else:
        assert names == sorted(expected)


@pytest.mark.parametrize("word", ["all-linear", "all_linear", "All-Linear"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "roberta", "mixtral"])
def test_all_linear_means_unset(architecture, word):
    everything = adapted(architecture)
    assert everything and adapted(architecture, lora_target_modules=[word]) == everything
    assert adapted(architecture, lora_target_modules=word) == everything


@pytest.mark.parametrize(
    ("architecture", "options", "told"),
    [
        ("llama", {"lora_target_modules": ["q_proj", "v_porj"]}, r"v_porj: .* no layer of that name.*mean v_proj.*o_proj"),
        ("llama", {"lora_target_modules": ["no_such_layer"]}, r"no_such_layer: .*Choose from .*q_proj.*all-linear"),
        ("gpt2", {"lora_target_modules": ["q_proj"]}, r"q_proj: .*c_attn"),
        ("llama", {"lora_target_modules": ["q_proj", "score"]}, r"score names the score head"),
        ("roberta", {"lora_target_modules": ["classifier.dense"]}, r"classifier.dense names the score head"),
        ("llama", {"lora_target_modules": ["self_attn"]}, r"self_attn is a LlamaAttention, which LoRA cannot adapt"),
        ("llama", {"lora_target_modules": ["q_proj,v_proj"]}, r"q_proj,v_proj: separate names by spaces"),
        ("llama", {"lora_target_modules": [r".*\.query"]}, r"matches no layer.*model\..*fullmatch.*q_proj"),
        ("llama", {"lora_target_modules": [r"q_proj|v_proj"]}, r"matches no layer"),
        ("llama", {"lora_target_modules": ["(q_proj"]}, r"no regular expression: missing \)"),
        ("llama", {"lora_target_modules": [".*q_proj", "v_proj"]}, r"A regular expression stands alone"),
        ("llama", {"lora_layers": [1, 2]}, r"--lora_layers 2: .*layers 0 to 1"),
        ("llama", {"lora_layers": [-1]}, r"--lora_layers -1: .*layers 0 to 1"),
        ("bert", {"lora_layers": [7]}, r"--lora_layers 7: .*layers 0 to 1"),
        ("mixtral", {"lora_layers": [5], "lora_experts": True}, r"--lora_layers 5: .*layers 0 to 1"),
        ("llama", {"lora_layers": [0], "lora_target_modules": ["model.layers.1.self_attn.q_proj"]}, r"--lora_layers have none"),
        ("llama", {"lora_layers": [0, 1], "lora_target_modules": [r".*\.1\..*q_proj"]}, r"--lora_layers 0: .*nothing in that"),
        ("mixtral", {"lora_target_modules": ["w1"]}, r"w1 names no linear layer here.*--lora_experts"),
        ("mixtral", {"lora_target_modules": ["q_proj", "gate_up_proj"]}, r"gate_up_proj names no linear.*--lora_experts"),
    ],
    ids=str,
)  # fmt: skip
def test_what_matches_nothing_is_an_error(architecture, options, told):
    with pytest.raises(UserError, match=told) as error:
        adapted(architecture, **options)
    assert "exclude_modules" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"lora_target_modules": ["all-linear", "embed_tokens"]}, "all-linear takes all linear layers"),
        ({"lora_target_modules": []}, "--lora_target_modules is empty"),
        ({"lora_layers": []}, "--lora_layers is empty"),
    ],
    ids=str,
)
def test_lists_that_say_nothing_are_errors(options, told):
    with pytest.raises(UserError, match=told):
        AdapterConfig(**options)


def test_an_expression_on_a_mixture_of_experts_keeps_to_what_it_matches():
    """Shared experts' layers are targeted as parameters (see `_targets`), those of one layer too."""
    from transformers import Qwen2MoeConfig

    config = Qwen2MoeConfig(
        vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=64, pad_token_id=0,
    )  # fmt: skip
    for words in ([r".*layers\.0\..*shared_expert\.up_proj"], ["model.layers.0.mlp.shared_expert.up_proj"]):
        model = skeleton(config)
        with torch.device("meta"):
            model = attach_adapter(
                Backbone(model, head_modules(model), True), AdapterConfig(lora_r=2, lora_target_modules=words)
            )
        names = [n for n, _ in model.named_parameters() if "lora_A" in n]
        assert len(names) == 1 and "layers.0.mlp.shared_expert.up_proj" in names[0], words
