"""Fused experts in 4 bit: equal to the dequantized model at a quarter of its bytes, with LoRA as in PEFT."""

import copy
import json
import shutil
import warnings

import pytest
import torch
import transformers as t
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from qlora_rm.backbone.adapter import attach_adapter, linear_names, load_adapter
from qlora_rm.backbone.expert_linear import ONE_BY_ONE, ExpertLinear
from qlora_rm.backbone.experts import expert_weights, fused_experts, gate_names, pack, quantized_experts
from qlora_rm.backbone.inventory import inventory, stored_bytes, unquantized_share
from qlora_rm.backbone.load import load_backbone, quantization_config
from qlora_rm.backbone.packed import PrefixSharing
from qlora_rm.config import AdapterConfig, BackboneConfig
from qlora_rm.errors import UserError
from qlora_rm.merging.in_memory import dequantize
from tests.backbone.test_packed import CASES, EXPERTS, LATENT, SHAPE, SHARING, assert_alike, build
from tests.models_for_tests import save_backbone
from tests.reward_models_for_tests import edit_json
from tests.tokenizers_for_tests import small_tokenizer

VOCABULARY = 512  # room for the tests' tokenizer
SHALLOW = SHAPE | {"num_hidden_layers": 2, "vocab_size": VOCABULARY}
SHARED = EXPERTS | {"shared_expert_intermediate_size": 64}
CLASSIFIERS = {
    **{name: SHARING[name] for name in ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")},
    "qwen2_moe": t.Qwen2MoeConfig(**SHALLOW | SHARED),
    "qwen3_next": t.Qwen3NextConfig(
        **SHALLOW | SHARED, head_dim=16, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    ),
    "deepseek_v2": t.DeepseekV2Config(**SHALLOW | LATENT),
    "mistral4": t.Mistral4Config(**SHALLOW | LATENT, qk_head_dim=16, head_dim=16),
    "axk2": t.AXK2Config(**SHALLOW | LATENT),
    "hunyuan_v1_moe": t.HunYuanMoEV1Config(**SHALLOW, num_experts=4, moe_topk=2, head_dim=16),
    "minimax": t.MiniMaxConfig(**SHALLOW, num_local_experts=4, head_dim=16),
    "phimoe": t.PhimoeConfig(**SHALLOW, num_local_experts=4),
    "jamba": t.JambaConfig(
        **SHALLOW, num_experts=4, mamba_d_state=8, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1
    ),
}  # fmt: skip
LANGUAGE_MODELS = {  # transformers has no sequence classification class for these
    "olmoe": t.OlmoeConfig(**SHALLOW, num_experts=4, num_experts_per_tok=2),
    "glm4_moe": t.Glm4MoeConfig(**SHALLOW | LATENT, head_dim=16),
    "ernie4_5_moe": t.Ernie4_5_MoeConfig(**SHALLOW, moe_num_experts=4, moe_k=2, moe_intermediate_size=64),
    "granitemoe": t.GraniteMoeConfig(**SHALLOW, num_local_experts=4, num_experts_per_tok=2),
    "nemotron_h": t.NemotronHConfig(  # experts without a gate
        **SHALLOW | LATENT, head_dim=16, layers_block_type=["attention", "moe"], moe_shared_expert_intermediate_size=64
    ),
}  # fmt: skip
ADAPTED = ("mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe")
IDS = torch.randint(5, 200, (3, 17), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Reward models of the architectures above, saved as their makers do: most of them expert by expert."""
    made = {}

    def folder(architecture):
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp(architecture)
            config = copy.deepcopy(CLASSIFIERS[architecture])
            config.vocab_size = VOCABULARY
            build(config).save_pretrained(made[architecture])
        return str(made[architecture])

    return folder


def load(folder, tokenizer, **options):
    tokenizer.pad_token_id = 0
    config = BackboneConfig(model_name_or_path=folder, **{"share_prefix": "false"} | options)
    return load_backbone(config, tokenizer, torch.float32)


def states_and_gradient(model):
    """Last hidden states, and the gradient of their squares at the embeddings."""
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    states = model.eval().base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    states.pow(2).sum().backward()
    return states.detach(), embeddings.grad


def close(one, two, rtol):
    return bool((one - two).norm() <= rtol * two.norm())


def assert_equals_its_dequantized_self(model):
    assert fused_experts(model)
    for experts in fused_experts(model).values():
        assert experts.config._experts_implementation == ONE_BY_ONE
        assert all(isinstance(weight, Params4bit) for weight in expert_weights(experts).values())
    for name in gate_names(model):
        assert not isinstance(model.get_submodule(name), Linear4bit)
    states, gradient = states_and_gradient(model)
    dequantize(model)
    for implementation in ("eager", "grouped_mm"):
        for experts in fused_experts(model).values():
            experts.config._experts_implementation = implementation
        plain_states, plain_gradient = states_and_gradient(model)
        assert close(states, plain_states, 1e-5) and close(gradient, plain_gradient, 1e-5), implementation


@pytest.mark.parametrize("architecture", CLASSIFIERS)
def test_states_and_gradients_are_those_of_the_dequantized_model(folders, tokenizer, architecture):
    model = load(folders(architecture), tokenizer).model
    assert not [name for name, p in model.named_parameters() if p.dim() == 3 and "conv" not in name]
    assert_equals_its_dequantized_self(model)


@pytest.mark.parametrize("architecture", LANGUAGE_MODELS)
def test_further_architectures_work_by_the_same_mechanism(tmp_path, architecture):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LANGUAGE_MODELS[architecture]).save_pretrained(tmp_path)
    quantization = quantization_config("4bit", torch.float32)
    with quantized_experts():
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, quantization_config=quantization)
    assert_equals_its_dequantized_self(model)


@pytest.mark.parametrize("shape", [(4, 128, 64), (3, 64, 32), (2, 96, 160)])
@pytest.mark.parametrize("double", [True, False])
def test_bytes_are_the_librarys_own_and_slices_are_exact(shape, double):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = pack(weight, "nf4", double)
    whole, state = quantize_4bit(weight, blocksize=64, compress_statistics=double, quant_type="nf4")
    assert torch.equal(packed.data, whole) and torch.equal(packed.quant_state.absmax, state.absmax)
    assert packed.quant_state.shape == weight.shape
    state.shape = (weight.numel() // 64, 64)  # in rows of one block: the CPU kernel is wrong where blocks straddle rows
    exact = dequantize_4bit(whole, state).view(shape)
    for e in range(shape[0]):
        rows = [0] * shape[0]
        rows[e] = shape[2]
        out = ExpertLinear.apply(torch.eye(shape[2]), rows, packed, None, False, None, None, 0.0)
        assert torch.equal(out.T, exact[e])


def test_memory_is_half_a_byte_a_weight_and_its_constants():
    packed = pack(torch.randn(8, 512, 256), "nf4", True)
    n = 8 * 512 * 256
    constants = n // 64 + 4 * (n // 64 // 256) + 4 * (16 + 256)  # 8-bit scales, their fp32 scales, two code books
    assert stored_bytes(packed) == n // 2 + constants < 0.52 * n


def test_inventory_and_share_count_them(folders, tokenizer):
    model = load(folders("mixtral"), tokenizer).model
    plain = AutoModelForSequenceClassification.from_pretrained(folders("mixtral"), num_labels=1)
    lines = inventory(model)
    assert f"{sum(p.numel() for p in plain.parameters()):,}" in lines[-1]
    experts = sum(p.numel() for p in plain.parameters() if p.dim() == 3)
    nf4 = next(int(line.split()[2].replace(",", "")) for line in lines if " nf4 " in line)
    assert nf4 == experts + sum(m.weight.numel() for n, m in plain.named_modules() if n.endswith("_proj"))
    share, largest = unquantized_share(model)
    assert share < 0.01 and largest.endswith("mlp.gate.weight")


@pytest.mark.slow
@settings(max_examples=40)
@given(
    rows=st.lists(st.integers(0, 4), min_size=1, max_size=4).filter(any),
    transposed=st.booleans(),
    biased=st.booleans(),
    adapted=st.booleans(),
    seed=st.integers(0, 9),
)
def test_the_derivative_is_right(rows, transposed, biased, adapted, seed):
    torch.manual_seed(seed)
    E, inner, outer, r = len(rows), 3, 5, 2
    double = {"dtype": torch.float64}
    x = torch.randn(sum(rows), inner, **double, requires_grad=True)
    weight = nn.Parameter(torch.randn(E, outer, inner, **double), requires_grad=False)
    stored = nn.Parameter(weight.transpose(1, 2).contiguous(), requires_grad=False) if transposed else weight
    bias = torch.randn(E, outer, **double) if biased else None
    A, B = (torch.randn(E * r, inner, **double), torch.randn(outer, r * E, **double)) if adapted else (None, None)
    for factor in (A, B) if adapted else ():
        factor.requires_grad_()

    def function(x, A, B):
        return ExpertLinear.apply(x, rows, stored, bias, transposed, A, B, 0.5)

    assert torch.autograd.gradcheck(function, (x, A, B))
    expert = torch.repeat_interleave(torch.arange(E), torch.tensor(rows))
    update = 0 if A is None else 0.5 * torch.einsum("ore,eri->eoi", B.view(outer, r, E), A.view(E, r, inner))
    expected = torch.einsum("si,soi->so", x, (weight + update)[expert]) + (bias[expert] if biased else 0)
    torch.testing.assert_close(function(x, A, B), expected)


@pytest.mark.parametrize("lora", [False, True])
def test_a_forward_pass_keeps_no_copy_of_the_experts_for_backward(tokenizer, tmp_path, lora):
    shape = SHALLOW | {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4}
    build(t.MixtralConfig(**shape, num_local_experts=8)).save_pretrained(tmp_path)
    model = attach_adapter(load(str(tmp_path), tokenizer), AdapterConfig(lora_r=2, lora_experts=lora)).train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=IDS[:1, :8]).logits.sum()
    one_expert_in_16_bit = 2 * 3 * 128 * 256
    assert max(kept.values()) < one_expert_in_16_bit and sum(kept.values()) < 4 * one_expert_in_16_bit
    loss.backward()


@pytest.mark.slow
@pytest.mark.parametrize("lora_experts", [False, True])
@pytest.mark.parametrize("architecture", ADAPTED)
def test_the_adapter_is_one_that_stock_peft_reads_and_merges(folders, tokenizer, tmp_path, architecture, lora_experts):
    folder = folders(architecture)
    model = attach_adapter(load(folder, tokenizer), AdapterConfig(lora_r=4, lora_experts=lora_experts))
    torch.manual_seed(1)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data.normal_(std=0.1)
    scores = model.eval()(input_ids=IDS).logits
    scores.pow(2).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in trained.values())
    assert any(".experts." in name for name in trained) == lora_experts
    model.save_pretrained(tmp_path)
    again = load_adapter(load(folder, tokenizer), str(tmp_path), trainable=False).eval()
    assert torch.equal(again(input_ids=IDS).logits, scores)

    plain = load(folder, tokenizer).model
    dequantize(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT warns of missing keys
        stock = PeftModel.from_pretrained(plain, tmp_path, is_trainable=True).eval()
    stock_scores = stock(input_ids=IDS).logits
    stock_scores.pow(2).sum().backward()
    assert close(stock_scores, scores, 2e-5)
    gradients = {name: p.grad for name, p in stock.named_parameters() if p.requires_grad}
    assert gradients.keys() == trained.keys()
    for name, gradient in gradients.items():
        assert close(trained[name].grad, gradient, 1e-4), name
    assert close(stock.merge_and_unload(safe_merge=True)(input_ids=IDS).logits, scores, 5e-5)


def test_shared_experts_are_adapted_and_routers_are_not(folders, tokenizer, tmp_path):
    """PEFT alone would take a shared expert's names for the fused experts', and skip it."""
    backbone = load(folders("qwen2_moe"), tokenizer)
    assert gate_names(backbone.model) == [f"model.layers.{i}.mlp.shared_expert_gate" for i in range(2)]
    assert "shared_expert_gate" not in linear_names(backbone)
    as_wide_as_experts_are_many = copy.deepcopy(CLASSIFIERS["qwen2_moe"])
    as_wide_as_experts_are_many.num_experts = 64
    with torch.device("meta"):
        skeleton = AutoModelForSequenceClassification.from_config(as_wide_as_experts_are_many)
    assert gate_names(skeleton) == gate_names(backbone.model)
    model = attach_adapter(backbone, AdapterConfig(lora_r=4))
    adapted = {name.split(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    assert {name.rpartition("layers.0.")[2] for name in adapted if "layers.0.mlp" in name} == {
        f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")
    }
    layer = model.base_model.model.model.layers[0].mlp.shared_expert.up_proj
    assert isinstance(layer.base_layer, Linear4bit) and not hasattr(layer, "parameter_name")
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "mlp.shared_expert.up_proj.weight" in written["target_parameters"]
    assert not written["rank_pattern"] and not any("_proj" in n and "shared" in n for n in written["target_modules"])


def test_chosen_layers_and_modules(folders, tokenizer):
    def adapted(architecture, **options):
        model = attach_adapter(load(folders(architecture), tokenizer), AdapterConfig(lora_r=2, **options))
        return sorted(name.split("model.layers.")[1] for name, _ in model.named_parameters() if "lora_A" in name)

    assert adapted("mixtral", lora_experts=True, lora_layers=[1], lora_target_modules=["q_proj"]) == [
        "1.mlp.experts.base_layer.lora_A.default.weight",
        "1.mlp.experts.lora_A.default.weight",
        "1.self_attn.q_proj.lora_A.default.weight",
    ]
    assert adapted("qwen2_moe", lora_target_modules=["up_proj"], lora_layers=[0]) == [
        "0.mlp.shared_expert.up_proj.lora_A.default.weight"
    ]


def test_what_cannot_be_adapted_is_told(folders, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"names no linear layer here.*--lora_experts"):
        attach_adapter(load(folders("mixtral"), tokenizer), AdapterConfig(lora_target_modules=["w1", "down_proj"]))
    with pytest.raises(UserError, match="--use_dora do not go with"):
        attach_adapter(load(folders("qwen2_moe"), tokenizer), AdapterConfig(use_dora=True))
    with pytest.raises(UserError, match="cannot be combined with --lora_dropout"):
        AdapterConfig(lora_experts=True, lora_dropout=0.1)
    dense = load(save_backbone(tmp_path, "llama", tokenizer), tokenizer)
    with pytest.raises(UserError, match="no fused expert weights"):
        attach_adapter(dense, AdapterConfig(lora_experts=True))


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss"])
def test_forests_give_the_scores_and_gradients_of_padded_batches(folders, tokenizer, architecture):
    backbone = load(folders(architecture), tokenizer, share_prefix="true")
    assert isinstance(backbone.model, PrefixSharing)
    model = attach_adapter(backbone, AdapterConfig(lora_r=4, lora_experts=True))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    assert_alike(model.eval(), CASES["tree of turns"] + CASES["nothing shared"])


def test_checkpointing_changes_no_gradient(folders, tokenizer):
    model = attach_adapter(load(folders("mixtral"), tokenizer), AdapterConfig(lora_r=4, lora_experts=True)).train()

    def gradients():
        model.zero_grad()
        model(input_ids=IDS).logits.sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    plain = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, gradient in gradients().items():
        assert torch.equal(gradient, plain[name]), name


def test_autocast_computes_the_experts_in_its_dtype(folders, tokenizer):
    model = attach_adapter(load(folders("mixtral"), tokenizer), AdapterConfig(lora_r=4, lora_experts=True))
    seen = set()
    for experts in fused_experts(model).values():
        experts.act_fn.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    exact = model(input_ids=IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        scores = model(input_ids=IDS).logits
    scores.sum().backward()
    assert seen == {torch.float32, torch.bfloat16} and close(scores, exact, 0.1)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_forms_that_are_not_covered_end_in_a_clear_error(folders, tokenizer, tmp_path):
    """JetMoE has its own class of experts; LLM.int8() supports no experts; experts must be whole numbers of blocks."""
    jetmoe = save_backbone(tmp_path / "jetmoe", "jetmoe", tokenizer)
    with pytest.raises(UserError, match=r"left \d\d% .*unquantized, the largest being .*--max_unquantized 1"):
        load(jetmoe, tokenizer)
    with pytest.raises(UserError, match=r"left \d\d% .*experts.*--quantization 4bit takes its experts too"):
        load(folders("mixtral"), tokenizer, quantization="8bit")
    odd = t.MixtralConfig(**SHALLOW | {"hidden_size": 60, "intermediate_size": 20}, num_local_experts=4)
    build(odd).save_pretrained(tmp_path / "odd")
    with pytest.raises(UserError, match=r"left \d\d% .*experts"):
        load(str(tmp_path / "odd"), tokenizer)


def test_a_checkpoint_in_another_quantization_is_refused(folders, tokenizer, tmp_path):
    """gpt-oss is published in MXFP4, DeepSeek-V3 in FP8."""
    folder = shutil.copytree(folders("gpt_oss"), tmp_path / "published")
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(UserError, match=r"saved in mxfp4.*16 bit"):
        load(str(folder), tokenizer)


def test_a_checkpoint_saved_with_experts_in_16_bit_is_counted_and_told(folders, tokenizer, tmp_path, capfd):
    stock = AutoModelForSequenceClassification.from_pretrained(
        folders("mixtral"), num_labels=1, quantization_config=quantization_config("4bit", torch.float32)
    )
    stock.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"left 8\d% .*experts"):
        load(str(tmp_path), tokenizer)
    capfd.readouterr()
    model = load(str(tmp_path), tokenizer, max_unquantized=1.0).model
    said = capfd.readouterr().err
    assert f"{unquantized_share(model)[0]:.0%} of the backbone's linear and expert weights unquantized" in said
