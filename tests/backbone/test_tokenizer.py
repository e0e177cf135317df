"""The pad token: never eos, a reserved token before a new one."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from qlora_rm.backbone.load import load_backbone
from qlora_rm.backbone.scoring import score_sequences
from qlora_rm.backbone.tokenizer import load_tokenizer
from qlora_rm.config import BackboneConfig
from qlora_rm.errors import UserError
from tests.models_for_tests import save_backbone
from tests.tokenizers_for_tests import small_tokenizer


def saved(tokenizer, folder, **changes):
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_its_own_pad_is_kept(tmp_path):
    tokenizer = small_tokenizer()
    assert load_tokenizer(saved(tokenizer, tmp_path)).pad_token == tokenizer.pad_token


@pytest.mark.parametrize("pad", ["eos", None])
def test_eos_or_no_pad_becomes_a_reserved_token(tmp_path, pad):
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|reserved_special_token_0|>"]})
    tokenizer = load_tokenizer(saved(tokenizer, tmp_path, pad_token=tokenizer.eos_token if pad == "eos" else None))
    assert tokenizer.pad_token not in (None, tokenizer.eos_token, tokenizer.bos_token)
    assert tokenizer.pad_token_id < len(small_tokenizer()) + 1, "nothing was added to the vocabulary"


def test_a_new_pad_token_grows_the_embedding_and_scores_stay_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr("qlora_rm.backbone.pad_token.RESERVED", __import__("re").compile("no such token"))
    tokenizer = small_tokenizer()
    folder = save_backbone(tmp_path, "llama", tokenizer)
    reloaded = load_tokenizer(saved(tokenizer, tmp_path, pad_token=tokenizer.eos_token))
    assert reloaded.pad_token == "<|pad|>" and reloaded.pad_token_id == len(tokenizer)
    model = load_backbone(BackboneConfig(model_name_or_path=folder), reloaded, torch.float32).model
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) + 1
    ending_in_eos = [[7, 8, tokenizer.eos_token_id], [9, 10, 11, 12, tokenizer.eos_token_id]]
    together = score_sequences(model, ending_in_eos, pad_token_id=reloaded.pad_token_id)
    alone = torch.cat([score_sequences(model, [s], pad_token_id=reloaded.pad_token_id) for s in ending_in_eos])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_chat_template_from_a_file_and_a_folder(tmp_path):
    tokenizer = small_tokenizer()
    folder = saved(tokenizer, tmp_path / "tokenizer")
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    assert load_tokenizer(folder, chat_template_path=str(tmp_path / "mine.jinja")).chat_template.startswith("{% for")
    assert load_tokenizer(folder, chat_template_path=folder).chat_template == tokenizer.chat_template
    with pytest.raises(UserError, match=r"missing\.jinja"):
        load_tokenizer(folder, chat_template_path=str(tmp_path / "missing.jinja"))


def test_unknown_eos_token(tmp_path):
    with pytest.raises(UserError, match="not in the vocabulary"):
        load_tokenizer(saved(small_tokenizer(), tmp_path), eos_token="<never>")


def test_a_stock_reader_scores_the_same_token(tmp_path):
    """The pad id in the config is the one that sequences are padded with."""
    tokenizer = small_tokenizer()
    folder = save_backbone(tmp_path, "llama", tokenizer)
    model = load_backbone(
        BackboneConfig(model_name_or_path=folder, quantization="none"), tokenizer, torch.float32
    ).model
    model.save_pretrained(tmp_path / "whole")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole")
    sequences = [[7, 8, 9], [10, 11, 12, 13, 14]]
    ours = score_sequences(model, sequences, pad_token_id=tokenizer.pad_token_id)
    theirs = score_sequences(stock, sequences, pad_token_id=tokenizer.pad_token_id)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
