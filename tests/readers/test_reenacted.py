"""OpenRLHF's and verl's ways of loading and reading, done again from their sources: neither runs without a GPU."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification, AutoTokenizer, PreTrainedModel

from qlora_rm.artifacts.exporting.export import export
from qlora_rm.artifacts.exporting.reader import WITH_SCORE
from qlora_rm.artifacts.exporting.readers import READERS
from qlora_rm.artifacts.golden import SAME, drift, scores_of
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.artifacts.merge import merge
from qlora_rm.backbone.scoring import pad_batch
from tests.reward_models_for_tests import make_reward_model
from tests.tokenizers_for_tests import ENDS_WITH_EOS, small_tokenizer

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3")


def openrlhf_reward_model(folder: str) -> PreTrainedModel:
    """A class made for the occasion: the family's backbone under its prefix, and a bias-free linear head under the
    name the config gives; loaded by `from_pretrained`, so that what the files lack is random."""
    config = AutoConfig.from_pretrained(folder)
    backbone = AutoModel._model_mapping[type(config)]

    class RewardModel(backbone.__base__):
        supports_gradient_checkpointing = True

        def __init__(self, config):
            super().__init__(config)
            setattr(self, self.base_model_prefix, backbone(config))
            self.head = getattr(config, "value_head_prefix", "score")
            setattr(self, self.head, nn.Linear(config.hidden_size, 1, bias=False))
            self.post_init()

        def forward(self, input_ids, attention_mask):
            positions = (attention_mask.long().cumsum(-1) - 1).masked_fill(attention_mask == 0, 1)
            hidden = getattr(self, self.base_model_prefix)(
                input_ids, attention_mask=attention_mask, position_ids=positions
            ).last_hidden_state
            values = getattr(self, self.head)(hidden).squeeze(-1)
            last = attention_mask.size(1) - 1 - attention_mask.long().fliplr().argmax(dim=1, keepdim=True)
            return values.gather(dim=1, index=last).squeeze(1)

    model, info = RewardModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"], info
    return model.eval()


def both_sides(pad: int, score):
    """Scores of right- and of left-padded batches, which both readers build."""
    for side in ("right", "left"):
        with torch.no_grad():
            yield lambda sequences, side=side: score(pad_batch(sequences, pad, side))


def check_openrlhf(folder: str) -> None:
    golden, model = Manifest.load(folder).golden, openrlhf_reward_model(folder)
    pad = AutoTokenizer.from_pretrained(folder).pad_token_id
    for score in both_sides(pad, lambda batch: model(**batch)):
        assert drift(golden, scores_of(golden, score), SAME).ok


def check_critic(folder: str) -> None:
    """verl: num_labels 1, the head's dropout off, values of every token; the last one is the score."""
    golden = Manifest.load(folder).golden
    model, info = AutoModelForTokenClassification.from_pretrained(
        f"{folder}/value", num_labels=1, output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    pad = AutoTokenizer.from_pretrained(f"{folder}/value").pad_token_id

    def last(batch):
        values = model(**batch).logits.squeeze(-1)
        places = torch.arange(values.shape[1]).expand_as(values)
        return values.gather(1, (places * batch["attention_mask"]).argmax(-1, keepdim=True)).squeeze(1)

    for score in both_sides(pad, last):
        assert drift(golden, scores_of(golden, score), SAME).ok
    assert not model.dropout.p, "a critic in training mode would read through dropout"


def test_openrlhf_and_verl_s_critic_give_the_golden_scores(world):
    check_openrlhf(str(world.exported))
    check_critic(str(world.exported))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_they_are_exported_for(architecture, tmp_path):
    tokenizer = small_tokenizer(bos=False, chat_template=ENDS_WITH_EOS)
    model = make_reward_model(tmp_path, architecture, quantization="none", tokenizer=tokenizer, rows=512)
    merge(str(model), str(tmp_path / "merged"), dtype="fp32")
    names = ["openrlhf"] if architecture == "gemma3" else ["openrlhf", "verl-critic"]
    folder = str(tmp_path / "exported")
    exported = export(str(tmp_path / "merged"), names, folder)
    assert exported.ok, [check for check in exported.checks if not check.ok]
    check_openrlhf(folder)
    if "verl-critic" in names:
        check_critic(folder)


def test_the_allow_lists_name_what_was_read_here():
    listed = {reader.name: reader.architectures for reader in READERS}
    assert listed["openrlhf"] == WITH_SCORE
    assert listed["verl-critic"] == WITH_SCORE - {"Gemma3TextForSequenceClassification"}
    assert len(WITH_SCORE) == len(ARCHITECTURES)
