"""Small generated backbones, one per architecture, saved as a user would have them."""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as t
from transformers import PreTrainedTokenizerBase

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
ENCODER = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}

SWITCH = 32
"""Length in tokens above which the rotary scaling of `longrope_config` and `dynamic_config` changes."""


def longrope_config(**ids: int | None) -> t.Phi3Config:
    """Return a config with Phi-3's scaling, which has different factors below and above `SWITCH` tokens."""
    factors = {"short_factor": [1.0 + 0.05 * i for i in range(8)], "long_factor": [1.5 + 0.5 * i for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    return t.Phi3Config(**SHAPE, original_max_position_embeddings=SWITCH, rope_parameters=rope, **ids)


def dynamic_config(**ids: int | None) -> t.LlamaConfig:
    """Return a config with dynamic NTK: above `SWITCH` tokens theta grows with the longest sequence of the batch."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
    return t.LlamaConfig(**SHAPE | {"max_position_embeddings": SWITCH}, rope_parameters=rope, **ids)


def modernbert_config(pooling: str, **ids: int | None) -> t.ModernBertConfig:
    """Return a config with local attention narrower than the texts; the score is at the first token or the mean."""
    return t.ModernBertConfig(
        **ENCODER | {"num_hidden_layers": 3}, local_attention=16, classifier_pooling=pooling, **ids
    )


VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

BACKBONES: dict[str, Callable[..., t.PreTrainedModel]] = {
    "llama": lambda **ids: t.LlamaForCausalLM(t.LlamaConfig(**SHAPE, **ids)),
    "llama_far": lambda **ids: t.LlamaForCausalLM(t.LlamaConfig(**SHAPE, rope_parameters=LLAMA3_ROPE, **ids)),
    "qwen2": lambda **ids: t.Qwen2ForCausalLM(t.Qwen2Config(**SHAPE, **ids)),
    "qwen3": lambda **ids: t.Qwen3ForCausalLM(t.Qwen3Config(**SHAPE, head_dim=16, **ids)),
    "mistral": lambda **ids: t.MistralForCausalLM(t.MistralConfig(**SHAPE, **ids)),
    "gemma": lambda **ids: t.GemmaForCausalLM(t.GemmaConfig(**SHAPE, head_dim=16, **ids)),
    "gemma2": lambda **ids: t.Gemma2ForCausalLM(t.Gemma2Config(**SHAPE, head_dim=16, **ids)),
    "phi3": lambda **ids: t.Phi3ForCausalLM(t.Phi3Config(**SHAPE, **ids)),
    "gemma3": lambda **ids: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**SHAPE, head_dim=16, **ids)),
    "gemma3_far": lambda **ids: t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(**SHAPE, head_dim=16, layer_types=list(GEMMA3_ROPE), rope_parameters=GEMMA3_ROPE, **ids)
    ),
    "gemma3_images": lambda **ids: t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(text_config={**SHAPE, "head_dim": 16, **ids}, vision_config=VISION, mm_tokens_per_image=4)
    ),
    "gpt2": lambda **ids: t.GPT2LMHeadModel(t.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=512, **ids)),
    "mixtral": lambda **ids: t.MixtralForCausalLM(t.MixtralConfig(**SHAPE, num_local_experts=4, **ids)),
    "qwen3_moe": lambda **ids: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**SHAPE, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, head_dim=16, **ids)
    ),
    "jetmoe": lambda **ids: t.JetMoeForCausalLM(t.JetMoeConfig(**SHAPE, kv_channels=16, num_local_experts=4, **ids)),
    "distilbert": lambda **ids: t.DistilBertForMaskedLM(
        t.DistilBertConfig(dim=64, n_layers=2, n_heads=4, hidden_dim=128, **ids)
    ),
    "roberta": lambda **ids: t.RobertaForMaskedLM(t.RobertaConfig(**ENCODER, **ids)),
    "bert": lambda **ids: t.BertForMaskedLM(t.BertConfig(**ENCODER, **ids)),
    "xlm_roberta": lambda **ids: t.XLMRobertaForMaskedLM(t.XLMRobertaConfig(**ENCODER, **ids)),
    "electra": lambda **ids: t.ElectraForMaskedLM(t.ElectraConfig(**ENCODER, embedding_size=32, **ids)),
    "deberta_v3": lambda **ids: t.DebertaV2ForMaskedLM(
        t.DebertaV2Config(
            **ENCODER,
            relative_attention=True,
            position_biased_input=False,
            pos_att_type=["p2c", "c2p"],
            position_buckets=32,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
            **ids,
        )
    ),
    "modernbert": lambda **ids: t.ModernBertForMaskedLM(modernbert_config("cls", **ids)),
    "modernbert_mean": lambda **ids: t.ModernBertForMaskedLM(modernbert_config("mean", **ids)),
    "opt": lambda **ids: t.OPTForCausalLM(
        t.OPTConfig(
            ffn_dim=128, word_embed_proj_dim=64, **{k: v for k, v in ENCODER.items() if k != "intermediate_size"}, **ids
        )
    ),
    "phi3_long": lambda **ids: t.Phi3ForCausalLM(longrope_config(**ids)),
    "llama_dynamic": lambda **ids: t.LlamaForCausalLM(dynamic_config(**ids)),
    "bart": lambda **ids: t.BartForConditionalGeneration(
        t.BartConfig(
            d_model=64,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=128,
            decoder_ffn_dim=128,
            decoder_start_token_id=0,
            **ids,
        )
    ),
}
CAUSAL = ("llama", "qwen2", "gemma3", "gpt2")
EXPERTS = ("mixtral", "qwen3_moe")
UNCOVERED = ("jetmoe",)  # its expert weights stay in 16 bit
IMAGES = ("gemma3_images",)  # text never passes through its vision tower
ENCODERS = ("distilbert", "roberta", "bert")
VERIFIED = ("xlm_roberta", "electra", "deberta_v3", "modernbert", "modernbert_mean", "opt")  # test_score_position.py
SWITCHING = ("phi3_long", "llama_dynamic")  # rotary scaling by length
EXPORTED = ("llama_far", "qwen3", "mistral", "gemma", "gemma2", "phi3", "gemma3_far")  # only for the tests of consumers


def save_backbone(
    folder: Path, architecture: str, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, rows: int | None = None
) -> str:
    """Write a random backbone and `tokenizer` to `folder`; `rows` of the embedding default to the tokenizer's size."""
    torch.manual_seed(seed)
    model = BACKBONES[architecture](
        vocab_size=rows or len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id < (rows or len(tokenizer)) else None,
    )
    # a library's initial weights are so small that all attention heads compute nearly the same
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
