"""Loading the weights of a finished reward model: an adapter on its base, or a complete model."""

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from qlora_rm.artifacts.manifest import Manifest, hash_of_config
from qlora_rm.backbone.adapter import load_adapter
from qlora_rm.backbone.load import Backbone, load_backbone, read_model_config
from qlora_rm.backbone.precision import DTYPES
from qlora_rm.config import BackboneConfig, Quantization, SharePrefix
from qlora_rm.console import say
from qlora_rm.errors import UserError


class BaseIsMissing(UserError):
    """The adapter's base cannot be found or read, so that nothing can be scored."""


def load_adapter_on_base(
    folder: str,
    manifest: Manifest,
    tokenizer: PreTrainedTokenizerBase,
    base: str | None,
    quantization: Quantization | None,
    share_prefix: SharePrefix,
    trust_remote_code: bool,
) -> nn.Module:
    """Load the adapter on its base, which is quantized from the same dtype as in training."""
    name = base or manifest.base.name_or_path
    revision = None if base else manifest.base.revision
    try:
        read_model_config(name, revision, trust_remote_code)
    except UserError as error:
        raise BaseIsMissing(
            f"The base of the adapter {folder} is not there: {error} Pass --base FOLDER_OR_HUB_ID."
        ) from error
    if hash_of_config(name, revision) != manifest.base.config_sha256:
        say(f"warning: the config.json of the base {name} is not the one the adapter was trained on")
    config = BackboneConfig(
        model_name_or_path=name,
        model_revision=revision,
        quantization=quantization or manifest.quantization,
        max_unquantized=1,
        share_prefix=share_prefix,
    )
    backbone: Backbone = load_backbone(
        config,
        tokenizer,
        DTYPES[manifest.compute_dtype],
        trust_remote_code=trust_remote_code,
        rotary_length=manifest.contract.rotary_length,
        as_saved=quantization is None,
    )
    return load_adapter(backbone, folder, trainable=False)


def load_whole_model(
    folder: str,
    manifest: Manifest | None,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    quantization: Quantization | None,
    share_prefix: SharePrefix,
    trust_remote_code: bool,
) -> nn.Module:
    """Load a complete model; a fully fine-tuned one keeps its fp32 weights, as in training."""
    architecture = (read_model_config(folder, trust_remote_code=trust_remote_code).architectures or ["unknown kind"])[0]
    if not architecture.endswith("ForSequenceClassification"):
        raise UserError(
            f"{folder} is no reward model: a {architecture} has no score head. Train one on it with `qlora-rm train`."
        )
    config = BackboneConfig(
        model_name_or_path=folder, quantization=quantization or "none", max_unquantized=1, share_prefix=share_prefix
    )
    trained_whole = manifest is not None and manifest.merge is None
    backbone = load_backbone(
        config,
        tokenizer,
        dtype,
        trust_remote_code=trust_remote_code,
        full_fine_tuning=trained_whole,
        rotary_length=manifest.contract.rotary_length if manifest else None,
        as_saved=quantization is None,
    )
    if backbone.has_new_head:
        raise UserError(
            f"{folder} lacks weights of its score head ({', '.join(backbone.head)}): its scores would be random."
        )
    return backbone.model
