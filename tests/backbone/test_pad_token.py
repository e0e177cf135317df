"""A pad token that no text contains, for every kind of tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.backbone.tokenizer import load_tokenizer
from qlora_rm.errors import UserError
from qlora_rm.preferences import Candidates, Tokenization
from qlora_rm.training.run import main
from qlora_rm.verification.folder import verify
from tests.models_for_tests import save_backbone
from tests.reward_models_for_tests import make_reward_model
from tests.tokenizers_for_tests import ENDS_WITH_EOS, small_tokenizer, word_piece_tokenizer

TURNS = [{"role": "user", "content": "Hi"}]
ANSWERS = tuple([{"role": "assistant", "content": text}] for text in ("Yes.", "No!"))
BY_NAME = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def saved(folder: Path, tokenizer: Any = None, added: tuple[str, ...] = (), **changes: Any) -> str:
    tokenizer = tokenizer or small_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=True) for token in added])
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("pad", "reason"),
    [
        ("<s>", "its bos token"),
        ("</s>", "its eos token"),
        ("<|im_end|>", "the chat template writes it"),
        ("!", "it is ordinary text"),
        ("Ġthe", "it is ordinary text"),
    ],
)
def test_a_pad_token_that_texts_contain_is_replaced_and_said_once(tmp_path, capsys, pad, reason):
    tokenizer = load_tokenizer(saved(tmp_path, pad_token=pad))
    assert tokenizer.pad_token == "<pad>", "the vocabulary's own unused one"
    said = capsys.readouterr().err
    assert said.count("pad token:") == 1 and repr(pad) in said and reason in said
    tokenization = Tokenization(tokenizer)
    found = tokenization.tokenize(
        [Candidates(TURNS, ANSWERS), Candidates("the end! ", ("Yes.", "No!"))]  # would raise pad_in_content otherwise
    )
    assert all(tokenizer.pad_token_id not in ids for tokens in found for ids in tokens.sequences)


def test_names_that_a_template_puts_together_are_not_taken(tmp_path):
    added = ("<|user|>", "<|assistant|>", "<|reserved_1|>")
    folder = saved(tmp_path, added=added, pad_token="<|assistant|>", chat_template=BY_NAME)
    assert load_tokenizer(folder).pad_token == "<pad>"


def test_unknown_characters_are_text(tmp_path):
    folder = saved(tmp_path, word_piece_tokenizer(), pad_token="[UNK]")
    assert load_tokenizer(folder).pad_token == "[PAD]"
    for pad in ("[CLS]", "[SEP]"):
        assert load_tokenizer(saved(tmp_path, word_piece_tokenizer(), pad_token=pad)).pad_token == "[PAD]"


@pytest.mark.parametrize("pad", ["<|padding|>", "<pad>", "<|endoftext|>", "<unk>"])
def test_a_pad_token_that_no_text_contains_is_kept(tmp_path, capsys, pad):
    changes = {"unk_token": "<unk>"} if pad == "<unk>" else {}
    folder = saved(tmp_path, added=() if pad == "<pad>" else (pad,), pad_token=pad, **changes)
    assert load_tokenizer(folder).pad_token == pad
    assert "pad token" not in capsys.readouterr().err


def test_a_new_token_has_a_name_that_is_free(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.chat_template = ENDS_WITH_EOS + "<|pad|><pad>"
    loaded = load_tokenizer(saved(tmp_path, tokenizer, added=("<|pad|>",), pad_token="<s>"))
    assert loaded.pad_token == "<|pad_0|>" and loaded.pad_token_id == len(tokenizer)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("<never>", "no token of the vocabulary"),
        ("<pad> <pad>", "no token of the vocabulary"),
        ("<padd>", "Did you mean '<pad>'"),
        ("<s>", "its bos token"),
        ("</s>", "its eos token"),
        ("<|im_start|>", "the chat template writes it"),
        ("!", "ordinary text"),
    ],
)
def test_a_pad_token_that_cannot_be_is_refused(tmp_path, asked, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(saved(tmp_path), pad_token=asked)


def test_a_foreign_reward_model_that_pads_with_bos_is_scored_at_its_last_token(tmp_path, capsys):
    base = save_backbone(tmp_path / "base", "llama", small_tokenizer())
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    nn.init.normal_(model.score.weight)
    model.config.pad_token_id = small_tokenizer().bos_token_id
    model.save_pretrained(tmp_path / "foreign")
    loaded = RewardModel.load(saved(tmp_path / "foreign", pad_token="<s>"))
    assert "which texts contain (its bos token)" in capsys.readouterr().err
    asked = [Candidates("Name it. ", ("a cat", "a dog, no, a very long one"))]
    together = loaded.score_candidates(asked)[0]
    alone = [loaded.score_candidates([Candidates("Name it. ", (answer,))])[0][0] for answer in asked[0].responses]
    assert together == pytest.approx(alone, abs=1e-5)


@pytest.mark.slow
def test_a_model_that_was_trained_with_such_a_pad_token_keeps_its_contract(tmp_path):
    """Older versions used bos if no text began with it."""
    tokenizer = small_tokenizer(bos=False)
    tokenizer.bos_token = tokenizer.pad_token = "<s>"
    folder = make_reward_model(tmp_path, tokenizer=tokenizer)
    contract = Manifest.load(folder).contract
    assert RewardModel.load(str(folder)).tokenizer.pad_token == "<s>"
    assert [check.name for check in verify(str(folder)) if not check.ok] == []
    assert load_tokenizer(str(folder), trained_pad=contract.pad_token_id).pad_token == "<s>"
    assert load_tokenizer(str(folder)).pad_token == "<pad>"


def rows(folder: Path) -> str:
    path = folder / "rows.jsonl"
    row = {"prompt": "Name it. ", "chosen": "a cat", "rejected": "a dog, no"}
    path.write_text("".join(json.dumps(row | {"prompt": f"{i}: name it. "}) + "\n" for i in range(16)))
    return str(path)


@pytest.mark.slow
@pytest.mark.long
def test_the_option_works_through_training_and_what_comes_after(tmp_path):
    """The base pads with its bos token; `--pad_token` names another; resuming and a further adapter keep it."""
    tokenizer = small_tokenizer()
    tokenizer.add_tokens([AddedToken("<|mine|>", special=True)])
    base = save_backbone(tmp_path / "base", "llama", tokenizer)
    saved(tmp_path / "base", tokenizer, pad_token="<s>")

    def train(output: str, *more: str) -> Path:
        flags = f"--dataset {rows(tmp_path)} --eval_fraction 0 --eval_strategy no --max_steps 2 --save_steps 1"
        flags += " --per_device_train_batch_size 2 --gradient_accumulation_steps 1 --disable_tqdm true"
        main([*flags.split(), "--output_dir", str(tmp_path / output), *more])
        return tmp_path / output

    first = train("first", "--model_name_or_path", base, "--pad_token", "<|mine|>")
    mine = tokenizer.convert_tokens_to_ids("<|mine|>")
    assert Manifest.load(first).contract.pad_token_id == mine
    assert AutoTokenizer.from_pretrained(first).pad_token == "<|mine|>"
    assert [check.name for check in verify(str(first)) if not check.ok] == []
    assert RewardModel.load(str(first)).tokenizer.pad_token_id == mine
    (first / "rm_manifest.json").unlink()
    train("first", "--model_name_or_path", base, "--resume", "auto", "--max_steps", "3")  # without the option
    assert Manifest.load(first).contract.pad_token_id == mine
    second = train("second", "--adapter", str(first))
    assert Manifest.load(second).contract.pad_token_id == mine
    third = train("third", "--model_name_or_path", base)
    assert AutoTokenizer.from_pretrained(third).pad_token == "<pad>"
