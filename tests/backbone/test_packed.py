"""Packed equals plain in scores and gradients on every architecture that shares prompts; others are reported."""

import pytest
import torch
import transformers as t
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoModelForSequenceClassification

from qlora_rm.backbone.packed import (
    PrefixSharing,
    as_tensors,
    block_mask,
    dense_mask,
    forest_batch,
    probe_backward,
    share_prefixes,
    sharing_model,
)
from qlora_rm.backbone.scoring import pad_batch, score_sequences
from qlora_rm.errors import UserError
from qlora_rm.preferences.forest import grow

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "vocab_size": 200, "pad_token_id": 0, "num_labels": 1,
}  # fmt: skip
ALIKE = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
WINDOW = {"sliding_window": 8}  # shorter than the prompts below
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LATENT = {
    "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_group": 1,
    "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "first_k_dense_replace": 1,
}  # fmt: skip

SHARING = {
    "llama": t.LlamaConfig(**SHAPE),
    "qwen2": t.Qwen2Config(**SHAPE),
    "qwen2-mixed": t.Qwen2Config(**SHAPE, **WINDOW, use_sliding_window=True, max_window_layers=2),
    "qwen3": t.Qwen3Config(**SHAPE, head_dim=16),
    "mistral": t.MistralConfig(**SHAPE, **WINDOW),
    "gemma2": t.Gemma2Config(**SHAPE, **WINDOW, head_dim=16),
    "gemma3": t.Gemma3TextConfig(**SHAPE, **WINDOW, head_dim=16),
    "phi3": t.Phi3Config(**SHAPE, **WINDOW),
    "gpt2": t.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=256, vocab_size=200, pad_token_id=0, num_labels=1),
    "gpt_neox": t.GPTNeoXConfig(**ALIKE),
    "olmo2": t.Olmo2Config(**SHAPE),
    "mixtral": t.MixtralConfig(**SHAPE, num_local_experts=4),
    "qwen3_moe": t.Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=16),
    "deepseek_v3": t.DeepseekV3Config(**SHAPE | LATENT),
    "gpt_oss": t.GptOssConfig(**SHAPE, **WINDOW, num_local_experts=4, num_experts_per_tok=2, head_dim=16),
}
PLAIN = {
    "falcon-alibi": t.FalconConfig(**{k: v for k, v in ALIKE.items() if k != "intermediate_size"}, alibi=True),
    "bloom": t.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=200, pad_token_id=0, num_labels=1),
    "jamba": t.JambaConfig(**SHAPE, num_experts=2, mamba_d_state=8, use_mamba_kernels=False),
    "gpt_neo": t.GPTNeoConfig(
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        vocab_size=200,
        pad_token_id=0,
        num_labels=1,
        window_size=8,
        max_position_embeddings=256,
    ),
    "distilbert": t.DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=128, vocab_size=200, num_labels=1),
}

PROMPT = list(range(1, 41))
TURNS = [*PROMPT, 90, 91, 92]
CASES = {
    "pair": [[*PROMPT, 50, 51, 52], [*PROMPT, 60]],
    "nine": [[*PROMPT, 100 + k, *range(150, 150 + k)] for k in range(9)],
    "tree of turns": [[*PROMPT, 50], [*TURNS, 93, 94], [*TURNS, 95], [*TURNS, 93, 96, 97], [*PROMPT, 50, 51]],
    "identical": [[*PROMPT, 50, 51]] * 3,
    "one inside another": [[*PROMPT, 50], [*PROMPT, 50, 51, 52], PROMPT],
    "nothing shared": [[7, 8, 9], [10, 11], [12] * 20],
    "single": [[*PROMPT, 50]],
    "one token": [[7], [8]],
    "padded rows": [[*PROMPT, *PROMPT, 50], [*PROMPT, *PROMPT, 51], *([k, k + 1] for k in range(60, 70))],
}


def build(config, **options):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, **options)
    for parameter in model.parameters():
        if (
            parameter.dim() >= 2
        ):  # initial weights are so small that attention is nearly uniform and masks hardly matter
            parameter.data.normal_(std=0.15)
    return model.eval()


def run(model, inputs):
    """Scores [S] and the gradient of a mixed sum of them for every weight."""
    model.zero_grad()
    scores = model(**inputs).logits[:, 0]
    (scores * torch.linspace(-1, 2, len(scores))).sum().backward()
    return scores.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_alike(model, sequences):
    scores, gradients = run(model, pad_batch(sequences, 0))
    packed_scores, packed_gradients = run(model, forest_batch(sequences, 0))
    torch.testing.assert_close(packed_scores, scores, rtol=1e-5, atol=1e-5)
    assert packed_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # a gradient that is pure rounding (keys' biases, under softmax) is compared with the largest gradient
        scale = max(float(gradient.norm()), 1e-3 * max(float(g.norm()) for g in gradients.values()))
        assert float((packed_gradients[name] - gradient).norm()) <= 1e-4 * scale, name


@pytest.mark.parametrize("case", CASES)
def test_scores_and_gradients_over_all_kinds_of_sharing(case):
    model = build(SHARING["llama"])
    assert share_prefixes(model, "true")
    assert_alike(model, CASES[case])


@pytest.mark.parametrize("architecture", SHARING)
def test_every_sharing_architecture(architecture, capfd):
    model = build(SHARING[architecture])
    name = type(model).__name__
    assert share_prefixes(model, "true")
    assert "computed once" in capfd.readouterr().err
    assert type(model).__name__ == name, "saved configurations carry the class's own name"
    assert_alike(model, CASES["tree of turns"] + CASES["nothing shared"])


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_both_dense_kernels(kernel):
    model = build(SHARING["mistral"], attn_implementation=kernel)
    assert share_prefixes(model, "auto")
    assert_alike(model, CASES["tree of turns"])


@pytest.mark.parametrize("architecture", PLAIN)
def test_where_packed_is_not_plain_it_falls_back_and_says_so(architecture, capfd):
    model = build(PLAIN[architecture])
    before, kernel = type(model), model.config._attn_implementation
    assert not share_prefixes(model, "auto")
    assert "plain padded batches" in capfd.readouterr().err
    assert (type(model), model.config._attn_implementation) == (before, kernel)
    with pytest.raises(UserError, match="--share_prefix true"):
        share_prefixes(model, "true")


@pytest.mark.long
@pytest.mark.slow
def test_a_kernel_without_a_backward_pass_is_found_before_training(capfd):
    """FlexAttention has none on a CPU: its probe reports here what any failing kernel reports on a GPU."""
    model = build(SHARING["llama"], attn_implementation="sdpa")
    if torch.cuda.is_available():
        pytest.skip("FlexAttention has a backward pass on CUDA")
    assert not share_prefixes(model, "auto", "flex_attention")
    assert "flex_attention attention: " in capfd.readouterr().err
    assert model.config._attn_implementation == "sdpa" and not model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_probe_of_the_backward_pass_leaves_no_trace():
    model = build(SHARING["llama"])
    probe_backward(model)
    assert all(p.grad is None for p in model.parameters()) and not model.training
    assert not model.get_input_embeddings()._forward_hooks


def test_a_kernel_that_takes_no_mask_is_left_alone(capfd):
    model = build(SHARING["llama"])
    assert not share_prefixes(model, "auto", "flash_attention_2")
    assert "takes no mask" in capfd.readouterr().err


def test_false_shares_nothing():
    model = build(SHARING["llama"])
    assert not share_prefixes(model, "false") and sharing_model(model) is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_gradient_checkpointing(reentrant):
    model = build(SHARING["qwen2-mixed"]).train()
    share_prefixes(model, "true")
    _, plain = run(model, forest_batch(CASES["nine"], 0))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    _, checkpointed = run(model, forest_batch(CASES["nine"], 0))
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_a_saved_model_is_the_stock_class(tmp_path):
    model = build(SHARING["llama"])
    share_prefixes(model, "true")
    model.save_pretrained(tmp_path)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert not isinstance(stock, PrefixSharing)
    batch = pad_batch(CASES["pair"], 0)
    torch.testing.assert_close(stock(**batch).logits, model(**batch).logits, rtol=1e-6, atol=1e-6)


def test_scoring_shares_wherever_the_model_does():
    model = build(SHARING["llama"])
    sequences = [s for case in CASES.values() for s in case]
    plain = score_sequences(model, sequences, pad_token_id=0, tokens_per_batch=200)
    share_prefixes(model, "true")
    for tokens_per_batch in (1, 200, 100_000):
        packed = score_sequences(model, sequences, pad_token_id=0, tokens_per_batch=tokens_per_batch)
        torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("window", "chunk"), [(None, None), (5, None), (None, 7)])
def test_the_block_mask_is_the_dense_mask(window, chunk):
    """The mask given to FlexAttention on CUDA, token by token, and through FlexAttention's own arithmetic."""
    forest = as_tensors(grow([s for case in CASES.values() for s in case], 0, multiple_of=128))
    index = forest["position_ids"], forest["subtree_end"], window, chunk
    dense, blocks = dense_mask(*index), block_mask(*index)
    rows, length = forest["input_ids"].shape
    b, q, k = torch.meshgrid(torch.arange(rows), torch.arange(length), torch.arange(length), indexing="ij")
    assert torch.equal(blocks.mask_mod(b, torch.zeros_like(b), q, k), dense[:, 0])
    query, key, value = torch.randn(3, rows, 2, length, 16)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=dense)
    torch.testing.assert_close(flex_attention(query, key, value, block_mask=blocks), expected, rtol=1e-4, atol=1e-5)
