"""Steps rehearsed without numbers: the memory they keep follows the laws of real steps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig

from qlora_rm.config import AdapterConfig, BackboneConfig
from qlora_rm.planning.rehearsal import Batch, Rehearsal, Step
from qlora_rm.planning.skeleton import build

COMMON = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
}
SHAPES = {
    "llama": {"model_type": "llama", "num_hidden_layers": 6, **COMMON},
    "gemma3": {"model_type": "gemma3_text", "num_hidden_layers": 7, "head_dim": 64, "sliding_window": 32, **COMMON},
    "mixtral": {"model_type": "mixtral", "num_hidden_layers": 5, "num_local_experts": 4, **COMMON},
    "gpt2": {"model_type": "gpt2", "n_layer": 6, "n_embd": 256, "n_head": 4},
}  # fmt: skip


def rehearsal(
    name: str, dtype: torch.dtype = torch.float32, kernel: str = "sdpa", lora_r: int = 16, **changes
) -> Rehearsal:
    config = AutoConfig.for_model(**(SHAPES[name] | changes))
    return Rehearsal(build(config, BackboneConfig(), AdapterConfig(lora_r=lora_r), dtype), dtype, kernel)


LLAMA = rehearsal("llama")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "kernel"),
    [("llama", torch.bfloat16, "flex_attention"), ("gemma3", torch.float32, "sdpa"), ("mixtral", torch.bfloat16, "sdpa"), ("gpt2", torch.float32, "sdpa")],
)  # fmt: skip
@pytest.mark.parametrize("checkpointing", [False, True])
def test_few_layers_stand_for_all(name: str, dtype: torch.dtype, kernel: str, checkpointing: bool) -> None:
    model = rehearsal(name, dtype, kernel)
    batch = Batch(2, 128, 4)
    counts = {kind: model.kinds.count(kind) for kind in set(model.kinds)}
    assert model.step(batch, checkpointing=checkpointing) == model._run(counts, batch, checkpointing, False)
    assert len(counts) == (2 if name == "gemma3" else 1)


@pytest.mark.long
@pytest.mark.slow
@given(rows=st.integers(1, 6), length=st.sampled_from([16, 48, 128]), packed=st.booleans())
@settings(max_examples=3)
def test_checkpointing_keeps_less(rows: int, length: int, packed: bool) -> None:
    batch = Batch(rows, length, rows, packed)
    plain, saved = (LLAMA.step(batch, checkpointing=on, accumulates=True) for on in (False, True))
    assert saved.kept < plain.kept
    assert saved.peak <= plain.peak


@pytest.mark.slow
@given(rows=st.integers(1, 6), length=st.sampled_from([16, 48, 128]), checkpointing=st.booleans())
@settings(max_examples=3)
def test_a_larger_batch_never_takes_less_and_the_line_between_two_is_not_below(
    rows: int, length: int, checkpointing: bool
) -> None:
    few, some, many = (
        LLAMA.step(Batch(n, length, n), checkpointing=checkpointing, accumulates=True)
        for n in (rows, rows + 1, rows + 4)
    )
    assert few.peak < some.peak < many.peak
    assert few.towards(many, 1 / 4).peak >= some.peak


@pytest.mark.slow
def test_nothing_is_left_over() -> None:
    """A leak in the meter would make the second of two equal steps larger."""
    batch = Batch(2, 64, 4)
    first = LLAMA._run({LLAMA.kinds[0]: 2}, batch, True, False)
    assert LLAMA._run({LLAMA.kinds[0]: 2}, batch, True, False) == first
    assert isinstance(first, Step) and first.kept > 0


@pytest.mark.slow
def test_adapters_rank_and_experts_per_token_count() -> None:
    batch = Batch(1, 64, 2)
    thin, thick = (rehearsal("llama", lora_r=r).step(batch, checkpointing=False).kept for r in (8, 72))
    # seven products a layer keep x A, 64 numbers wider
    assert thick - thin == 6 * 7 * 64 * 64 * 4
    one, two = (rehearsal("mixtral", num_experts_per_tok=k).step(batch, checkpointing=False).kept for k in (1, 2))
    # gate and up (one tensor), the activation and the expert's output, for 64 more rows of 5 layers; a frozen product's
    # input is not kept
    assert two - one == pytest.approx(5 * 64 * (3 * 512 + 256) * 4, rel=0.01)


@pytest.mark.slow
def test_flex_attention_keeps_no_mask() -> None:
    growth = {}
    for kernel in ("sdpa", "flex_attention"):
        model = rehearsal("llama", torch.bfloat16, kernel)
        short, long = (model.step(Batch(1, n, 2), checkpointing=False).kept for n in (1024, 2048))
        growth[kernel] = long - 2 * short
    # SDPA converts the mask to bf16 again in each of 6 layers; the only other square tensor is the forest's own mask
    assert growth["sdpa"] >= 0.95 * 6 * 2 * (2048**2 - 2 * 1024**2)
    assert growth["flex_attention"] < 0.2 * growth["sdpa"]
