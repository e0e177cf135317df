"""A sequence has one score despite its neighbours and earlier batches, with rotary scaling that depends on length."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from qlora_rm.backbone.packed import forest_batch, share_prefixes
from qlora_rm.backbone.rotary import depends_on_length, pinned, rotary_length, rotates_as_short
from qlora_rm.backbone.scoring import Layout, score_sequences
from tests.models_for_tests import SWITCH, dynamic_config, longrope_config

LONGEST = 60
PROMPT = list(range(40, 60))
SEQUENCES = [
    [*PROMPT, 5],
    [*PROMPT, *range(60, 100)],  # a pair: short chosen, long rejected
    [7, 8, 9],
    list(range(100, 100 + SWITCH)),
    list(range(100, 101 + SWITCH)),
    list(range(30, 30 + SWITCH + 10)),
]
CONFIGS = {"longrope": longrope_config, "dynamic": dynamic_config}


def config_of(kind: str) -> PretrainedConfig:
    return CONFIGS[kind](vocab_size=200, pad_token_id=0, num_labels=1)


def build(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.normal_(std=0.15)
    return model.eval()


def fresh_alone(config: PretrainedConfig, sequence: list[int]) -> float:
    """The score by transformers alone, in a model that has seen nothing else."""
    with torch.no_grad():
        return float(build(config)(torch.tensor([sequence])).logits[0, 0])


def scored(model: PreTrainedModel, sequences: list[list[int]], **how: Any) -> torch.Tensor:
    return score_sequences(model, sequences, pad_token_id=0, **how)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_long_neighbour_changes_stock_scores(kind: str) -> None:
    """The fault that the rest of this file is about."""
    config = config_of(kind)
    together = torch.tensor([SEQUENCES[0] + [0] * (LONGEST - len(SEQUENCES[0])), SEQUENCES[1]])
    with torch.no_grad():
        score = float(build(config)(together, attention_mask=together != 0).logits[0, 0])
    assert abs(score - fresh_alone(config, SEQUENCES[0])) > 0.01


@pytest.mark.parametrize("layout", ["right", "left", "forest"])
@pytest.mark.parametrize("max_length", [SWITCH, LONGEST])
@pytest.mark.parametrize("kind", CONFIGS)
def test_pinned_alone_is_in_batch_is_packed(kind: str, max_length: int, layout: Layout) -> None:
    model = build(pinned(config_of(kind), max_length))
    assert share_prefixes(model, "true")
    alone = scored(model, SEQUENCES, layout="right", tokens_per_batch=1)
    torch.testing.assert_close(scored(model, SEQUENCES, layout=layout), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_rotation_kept_is_the_model_s_own_for_its_longest_sequence(kind: str) -> None:
    config = config_of(kind)
    longest, short = SEQUENCES[1], SEQUENCES[0]
    assert len(longest) == LONGEST
    assert fresh_alone(pinned(config, LONGEST), longest) == pytest.approx(fresh_alone(config, longest), abs=1e-5)
    assert fresh_alone(pinned(config, SWITCH), short) == pytest.approx(fresh_alone(config, short), abs=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_saved_configuration_carries_the_rule_to_stock_readers(kind: str, tmp_path: Any) -> None:
    config = pinned(config_of(kind), LONGEST)
    assert not depends_on_length(config)
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.max_position_embeddings >= LONGEST, "engines take no longer sequences than this"
    read.num_labels = 1
    ours = scored(build(config), SEQUENCES)
    assert [fresh_alone(read, sequence) for sequence in SEQUENCES] == pytest.approx(ours.tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_gradients_of_a_pair_on_both_sides_of_the_switch(kind: str) -> None:
    """However training packs the pair, its gradient is that of its sequences alone."""
    model = build(pinned(config_of(kind), LONGEST))
    share_prefixes(model, "true")

    def gradients(scores: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        torch.nn.functional.softplus(scores[1] - scores[0]).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    packed = gradients(model(**forest_batch(SEQUENCES[:2], 0)).logits[:, 0])
    alone = gradients(torch.cat([model(torch.tensor([ids])).logits[:, 0] for ids in SEQUENCES[:2]]))
    assert packed.keys() == alone.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_of_others_gives_what_stock_code_gives_alone(kind: str) -> None:
    """Another project's model is not pinned: sequences share a batch only if rotated alike; none affects later ones."""
    config = config_of(kind)
    model = build(config)
    wanted = [fresh_alone(config, sequence) for sequence in SEQUENCES]
    for order in (SEQUENCES, SEQUENCES[::-1]):
        found = dict(zip(map(tuple, order), scored(model, order).tolist(), strict=True))
        assert [found[tuple(sequence)] for sequence in SEQUENCES] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_probe_of_shared_prompts_goes_beyond_the_switch(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert not share_prefixes(build(config_of(kind)), "auto")
    assert "packed and plain hidden states differ" in capfd.readouterr().err


@pytest.mark.parametrize("kind", CONFIGS)
def test_which_length_is_kept(kind: str) -> None:
    config = config_of(kind)
    assert rotary_length(config, 48) == 48
    assert rotary_length(config, None) == (512 if kind == "longrope" else 8 * SWITCH)
    assert rotary_length(pinned(config, 48), 48) is None
    assert rotates_as_short(config, SWITCH) and not rotates_as_short(config, SWITCH + 1)
