"""The demo's backbone: an ordinary causal LM folder, like a download from a hub."""

import re
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_rm.backbone.tokenizer import load_tokenizer
from qlora_rm.demo.backbone import BOS, EOS, RESERVED, Recipe, batches, write_backbone
from qlora_rm.demo.preferences import preferences
from qlora_rm.preferences.comparison import Message

TINY = Recipe(
    vocab_size=400, hidden_size=64, intermediate_size=64, layers=1, heads=1, steps=4, conversations_per_step=4
)


@pytest.fixture(scope="module")
def corpus() -> list[list[Message]]:
    return [[*row["prompt"], *row["chosen"]] for row in islice(preferences(), 60)]


@pytest.fixture(scope="module")
def folder(corpus: list[list[Message]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "backbone"
    write_backbone(folder, corpus, recipe=TINY)
    return folder


def test_it_loads_as_a_causal_lm_and_predicts(folder: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert type(model).__name__ == "LlamaForCausalLM" and model.dtype == torch.float32
    assert len(tokenizer) <= model.config.vocab_size == len(model.state_dict()["model.embed_tokens.weight"])
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    logits = model(**tokenizer("Hello there.", return_tensors="pt", return_token_type_ids=False)).logits
    assert logits.isfinite().all() and logits.shape[-1] == len(tokenizer)


def test_every_linear_weight_fills_whole_nf4_blocks() -> None:
    shape = Recipe()
    assert shape.hidden_size % 64 == 0 and shape.intermediate_size % 64 == 0


def test_bos_eos_and_the_reserved_token_differ_and_pad_is_left_to_the_pad_rule(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token is None
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)
    assert len({tokenizer.convert_tokens_to_ids(token) for token in (BOS, EOS, RESERVED)}) == 3
    assert load_tokenizer(str(folder)).pad_token == RESERVED


def test_the_chat_template_marks_turns_and_ends_the_answer_with_eos(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": "user", "content": "Süße Grüße 🌻?"}, {"role": "assistant", "content": "Yes."}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    assert text == "<|begin|><|turn|>user\nSüße Grüße 🌻?<|end|><|turn|>assistant\nYes.<|end|>"
    prompt = str(tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))
    assert text.startswith(prompt) and prompt.endswith("assistant\n")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == text


def test_the_seed_decides_the_weights_and_leaves_the_callers_random_numbers_alone(
    folder: Path, corpus: list[list[Message]], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    write_backbone(tmp_path / "again", corpus, recipe=TINY)
    after = torch.rand(1)
    write_backbone(tmp_path / "other", corpus, seed=1, recipe=TINY)
    first, again, other = (
        load_file(at / "model.safetensors") for at in (folder, tmp_path / "again", tmp_path / "other")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1))


def test_pretraining_lowers_the_loss(
    corpus: list[list[Message]], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_backbone(tmp_path, corpus, recipe=Recipe(**{**vars(TINY), "steps": 40, "learning_rate": 1e-2}))
    told = re.search(r"loss (\S+) at first, (\S+) at the end", capsys.readouterr().err)
    assert told
    first, last = map(float, told.groups())
    assert last < first - 1


def test_batches_hold_every_conversation_once_a_round_and_ignore_the_padding() -> None:
    sequences = [[n] * (1 + n % 7) for n in range(1, 17)]
    seen = []
    for input_ids, labels in islice(batches(sequences, 2), 8):
        for ids, wanted in zip(input_ids.tolist(), labels.tolist(), strict=True):
            real = [label for label in wanted if label != -100]
            assert ids[: len(real)] == real and real in sequences
            seen.append(real)
    assert sorted(seen) == sorted(sequences)
