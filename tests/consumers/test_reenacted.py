"""Load and score as OpenRLHF and verl do, reproduced from their sources, since neither runs without a GPU."""

import json

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForTokenClassification, AutoTokenizer, PreTrainedModel

from qlora_rm.artifacts.golden import SAME, drift, scores_of
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.backbone.scoring import pad_batch
from qlora_rm.exporting.consumers import READERS
from tests.consumers.conftest import BACKBONES


def openrlhf_reward_model(folder: str) -> PreTrainedModel:
    """Load the model as OpenRLHF does: the family's backbone under its prefix, and a bias-free linear head named by the config.

    `from_pretrained` initializes weights that the files lack at random.
    """
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
    """Yield scorers of right- and of left-padded batches, which both consumers build."""
    for side in ("right", "left"):
        with torch.no_grad():
            yield lambda sequences, side=side: score(pad_batch(sequences, pad, side))


def check_openrlhf(folder: str) -> None:
    golden, model = Manifest.load(folder).golden, openrlhf_reward_model(folder)
    pad = AutoTokenizer.from_pretrained(folder).pad_token_id
    for score in both_sides(pad, lambda batch: model(**batch)):
        assert drift(golden, scores_of(golden, score), SAME).ok


def check_critic(folder: str) -> None:
    """Check verl's critic: num_labels 1, no dropout in the head, a value for every token. The last value is the score."""
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


@pytest.mark.slow
def test_openrlhf_and_verl_s_critic_give_the_golden_scores(world):
    check_openrlhf(str(world.exported))
    check_critic(str(world.exported))


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name != "gpt2"])
def test_every_architecture_they_are_exported_for(backbone, toy):
    check_openrlhf(str(toy(backbone)))
    assert (toy(backbone) / "value").exists() == (not backbone.startswith("gemma3"))
    if not backbone.startswith("gemma3"):
        check_critic(str(toy(backbone)))


def test_the_allow_lists_name_what_is_read_here(toy):
    listed = {reader.name: reader.architectures for reader in READERS}
    configs = [
        json.loads((toy(name) / "config.json").read_text(encoding="utf-8")) for name in BACKBONES if name != "gpt2"
    ]
    assert listed["openrlhf"] == {config["architectures"][0] for config in configs}
    assert listed["verl-critic"] == listed["openrlhf"] - {"Gemma3TextForSequenceClassification"}
