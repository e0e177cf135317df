"""Where a score is read and how positions are numbered, found by watching a model, determines the required layouts."""

from types import MethodType
from typing import Any

import pytest
import torch
import transformers as t
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from qlora_rm.backbone.layouts import ALL, FIRST, LAST, layouts_of, score_position
from qlora_rm.backbone.limits import positions_of_config
from qlora_rm.backbone.packed import share_prefixes
from qlora_rm.backbone.positions import usable_positions
from qlora_rm.backbone.scoring import Layout, score_sequences

IDS: dict[str, Any] = {"vocab_size": 200, "pad_token_id": 1, "eos_token_id": 3, "num_labels": 1}
SHAPE = IDS | {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 96,
}  # fmt: skip
GPT = IDS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96}
MODERN = SHAPE | {"cls_token_id": 0, "bos_token_id": 0, "sep_token_id": 2, "local_attention": 8}
RELATIVE = {"relative_attention": True, "position_biased_input": False, "pos_att_type": ["p2c", "c2p"]}
BART = IDS | {
    "d_model": 64, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 96, "decoder_start_token_id": 3,
}  # fmt: skip
T5 = IDS | {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1}
OPT = IDS | {
    "hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 96,
}  # fmt: skip

MODELS: dict[str, tuple[PretrainedConfig, str, bool, int | None]] = {
    # where the score is read, whether left padding is required, and the number of positions
    "llama": (t.LlamaConfig(**SHAPE), LAST, True, None),
    "qwen3": (t.Qwen3Config(**SHAPE, num_key_value_heads=2, head_dim=16), LAST, True, None),
    "mixture": (t.Qwen3MoeConfig(**SHAPE, num_experts=4, num_experts_per_tok=2, head_dim=16), LAST, True, None),
    "bloom": (t.BloomConfig(**IDS, hidden_size=64, n_layer=2, n_head=4), LAST, True, None),
    "gptj": (t.GPTJConfig(**GPT, rotary_dim=8), LAST, True, 96),  # rotary, by a table of sines
    "gpt2": (t.GPT2Config(**GPT), LAST, False, 96),
    "ctrl": (t.CTRLConfig(**GPT, dff=128), LAST, False, 96),
    "opt": (t.OPTConfig(**OPT, word_embed_proj_dim=32), LAST, True, 96),  # positions are counted by the mask
    "bert": (t.BertConfig(**SHAPE), FIRST, False, 96),
    "distilbert": (
        t.DistilBertConfig(**IDS, dim=64, n_layers=2, n_heads=4, hidden_dim=128, max_position_embeddings=96),
        FIRST, False, 96,
    ),
    "electra": (t.ElectraConfig(**SHAPE, embedding_size=32), FIRST, False, 96),
    "roberta": (t.RobertaConfig(**SHAPE), FIRST, False, 94),
    "xlm_roberta": (t.XLMRobertaConfig(**SHAPE), FIRST, False, 94),
    "longformer": (t.LongformerConfig(**SHAPE, attention_window=8), FIRST, False, 94),
    "deberta_v3": (t.DebertaV2Config(**SHAPE, **RELATIVE, pooler_hidden_size=64), FIRST, False, None),
    "deberta_absolute": (t.DebertaV2Config(**SHAPE, pooler_hidden_size=64), FIRST, False, 96),
    "modernbert": (t.ModernBertConfig(**MODERN), FIRST, False, None),
    "modernbert_mean": (t.ModernBertConfig(**MODERN, classifier_pooling="mean"), ALL, True, None),
    "bart": (t.BartConfig(**BART), LAST, False, 96),
    "t5": (t.T5Config(**T5), LAST, False, None),
}  # fmt: skip


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(MODELS[name][0])
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(std=0.15)
    model.config.use_cache = False
    return model.eval()


def apart(model: PreTrainedModel, layout: Layout) -> float:
    """Largest distance between a score in a batch and the same score alone."""
    draw = torch.Generator().manual_seed(1)
    sequences = [[*torch.randint(5, 200, (n,), generator=draw).tolist(), 3] for n in (5, 9, 17, 30, 3)]
    alone = score_sequences(model, sequences, pad_token_id=1, layout="right", tokens_per_batch=1)
    return float((score_sequences(model, sequences, pad_token_id=1, layout=layout) - alone).abs().max())


@pytest.mark.parametrize("name", MODELS)
def test_what_is_required_holds(name: str) -> None:
    _, where, left, positions = MODELS[name]
    model = build(name)
    assert score_position(model) == where
    assert layouts_of(model) == (("right", "left") if left else ("right",))
    assert all(apart(model, layout) < 1e-4 for layout in layouts_of(model))
    assert usable_positions(model) == positions
    assert not any(p.grad is not None for p in model.parameters()) and not model.training


@pytest.mark.parametrize("name", MODELS)
def test_positions_are_known_before_there_are_weights(name: str) -> None:
    assert positions_of_config(MODELS[name][0]) == MODELS[name][3]


def test_the_whole_of_the_positions_can_be_scored_and_no_more() -> None:
    for name in ("gpt2", "roberta", "opt"):
        model, positions = build(name), MODELS[name][3]
        score_sequences(model, [[5] * positions], pad_token_id=1)
        with pytest.raises((IndexError, RuntimeError)):
            score_sequences(model, [[5] * (positions + 1)], pad_token_id=1)


def test_forests_are_required_of_models_that_take_them() -> None:
    model = build("llama")
    share_prefixes(model, "true")
    assert layouts_of(model) == ("right", "left", "forest")


def test_a_new_head_of_zeros_says_as_much_as_a_trained_one() -> None:
    model = build("llama")
    model.score.weight.data.zero_()
    assert score_position(model) == LAST
    assert not model.score.weight.any()


def test_a_model_whose_padding_leaks_still_has_to_do_with_left_padding() -> None:
    """Attention that sees the padding: only the scores reveal it, not the model's class."""
    model = build("llama")
    own = type(model.base_model).forward

    def forward(self: Any, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        return own(self, input_ids=input_ids, attention_mask=torch.ones_like(input_ids), **kwargs)

    model.base_model.forward = MethodType(forward, model.base_model)
    assert layouts_of(model) == ("right", "left")
    assert apart(model, "right") < 1e-4 and apart(model, "left") > 0.01
