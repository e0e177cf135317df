"""Load a backbone with a score head: in 4 bit, with its memory counted, and with no silently initialized weights."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import set_zero3_state
from transformers.utils import logging as transformers_logging

from qlora_rm.backbone.experts import fused_experts, gate_names, quantized_experts
from qlora_rm.backbone.head import compute_in_own_precision, head_modules, initialize, is_in_head
from qlora_rm.backbone.in_force import compute_quantized_layers_in, dequantize_to
from qlora_rm.backbone.inventory import unquantized_share
from qlora_rm.backbone.packed import share_prefixes
from qlora_rm.backbone.paths import require_model
from qlora_rm.backbone.plausible import as_user_error, require_held, require_plausible_config
from qlora_rm.backbone.reach import freeze_unreached
from qlora_rm.backbone.rotary import pinned
from qlora_rm.backbone.saved_quantization import (
    config_of_run,
    kept_settings,
    require_obeyable,
    saved_quantization,
)
from qlora_rm.backbone.zero3_gather import make_whole, shard_like
from qlora_rm.config import BackboneConfig
from qlora_rm.console import say
from qlora_rm.errors import UserError, first_line
from qlora_rm.progress import Phase, counted

WORTH_SAYING = 0.1
"""Share of unquantized weights above which a permitted load reports it; routers and small gates stay below."""

Loading = Callable[[list[str]], AbstractContextManager[None]]
"""Context factory for reading 4-bit weights; its argument lists the modules that must stay as read (the head)."""


@dataclass(frozen=True)
class Backbone:
    """A loaded sequence-classification model with one label.

    Attributes:
        model: the model, frozen or as loaded; its head computes in fp32.
        head: names of the modules that form the score head; they are trained in full and saved.
        has_new_head: False where the checkpoint already was a reward model.
    """

    model: PreTrainedModel
    head: list[str]
    has_new_head: bool


def load_backbone(
    config: BackboneConfig,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    *,
    seed: int = 0,
    trust_remote_code: bool = False,
    full_fine_tuning: bool = False,
    loading: Loading | None = None,
    rotary_length: int | None = None,
    as_saved: bool = False,
) -> Backbone:
    """Load `config.model_name_or_path` as a scalar reward model.

    Arguments:
        tokenizer: sets the pad id; the embedding grows where the tokenizer has more entries than it has rows.
        dtype: compute dtype, and storage dtype of unquantized weights.
        full_fine_tuning: keep unquantized weights in fp32, since they will be trained.
        loading: how 4-bit weights are loaded, unless completely on every process (`zero3.sharded_loading`).
        rotary_length: rotate every sequence as one of this length (`rotary.pinned`); None leaves rotation as it is.
        as_saved: load a quantized checkpoint as it is, whatever `config.quantization` says.

    Raises:
        UserError: there is no model, it is saved in another quantization, it has several labels, its checkpoint lacks
            weights, or more weights stay unquantized than `config.max_unquantized` allows.
    """
    name = config.model_name_or_path
    if not name:
        raise UserError("No backbone given: pass --model_name_or_path FOLDER_OR_HUB_ID.")
    model_config = pinned(read_model_config(name, config.model_revision, trust_remote_code), rotary_length)
    if not as_saved:
        require_obeyable(name, model_config, config.quantization)
    if words := kept_settings(model_config):
        say(f"quantization: {name} is saved in 4 bit with {words}; it is loaded as it is")
    if config.head_init_std is not None and _is_classifier(model_config):
        raise _head_is_kept(name)
    with Phase("loading" if config.quantization == "none" else "loading and quantizing"):
        model, fresh = _load_model(
            config,
            model_config,
            torch.float32 if full_fine_tuning else dtype,
            trust_remote_code=trust_remote_code,
            loading=loading,
        )
    head = head_modules(model)
    _require_whole(name, model, fresh, head)
    has_new_head = bool(fresh)
    if config.head_init_std is not None and not has_new_head:
        raise _head_is_kept(name)
    _prepare_head(model, head, fresh, config.head_init_std, seed)
    _match_tokenizer(model, tokenizer, may_grow=full_fine_tuning)
    compute_quantized_layers_in(model, dtype)
    dequantize_to(model, dtype)
    _to_device(model, config)
    freeze_unreached(model)
    if config.quantization != "none":
        _require_quantized(model, config, saved_quantization(model_config) != "none")
    share_prefixes(model, config.share_prefix, config.attn_implementation)
    return Backbone(model, head, has_new_head)


def read_model_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Return the configuration of a model folder or hub id; raise a `UserError` that describes what was found instead."""
    require_model(name)
    require_plausible_config(name, revision)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"No model could be loaded from {name}: {first_line(error)}") from error
    except Exception as error:  # each architecture checks its own values, or fails on them with its own errors
        raise as_user_error(name, error) from error
    if _is_classifier(config) and config.num_labels != 1:
        raise UserError(f"{name} is a classifier with {config.num_labels} labels; a reward model has one.")
    return config


def _is_classifier(config: PretrainedConfig) -> bool:
    return any(a.endswith("ForSequenceClassification") for a in config.architectures or [])


def _head_is_kept(name: str) -> UserError:
    return UserError(f"--head_init_std has no effect: {name} is a reward model, whose head is kept. Leave it out.")


def quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """NF4 with double quantization, LLM.int8(), or None.

    The packed storage stays uint8: DeepSpeed's engine casts any other dtype, which silently corrupts the packed bytes.
    """
    if quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=torch.uint8,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if quantization == "8bit" else None


def _load_model(
    config: BackboneConfig,
    model_config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    trust_remote_code: bool,
    loading: Loading | None,
) -> tuple[PreTrainedModel, set[str]]:
    """Return the model and the names of the parameters its checkpoint lacks."""
    name = str(config.model_name_or_path)
    try:
        bones = skeleton(model_config, trust_remote_code)
    except (RuntimeError, TypeError, AttributeError, ArithmeticError, IndexError, KeyError) as error:
        raise as_user_error(name, error) from error
    require_held(name, config.model_revision, bones)
    head = head_modules(bones)
    how: dict[str, Any] = {}
    saved = saved_quantization(model_config)
    quantization = quantization_config(config.quantization, dtype)
    if quantization is not None and saved == "none":
        quantization.llm_int8_skip_modules = head + gate_names(bones)
        how["quantization_config"] = quantization  # a checkpoint saved in 4 bit has its own, which None would hide
    in_4_bit = "4bit" in (saved if saved != "none" else config.quantization)
    sharding = loading(head) if loading and in_4_bit else nullcontext()
    with quiet_transformers(), quantized_experts(), sharding:
        try:
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name,
                config=config_of_run(model_config, dtype, head + gate_names(bones)),
                revision=config.model_revision,
                dtype=dtype,
                attn_implementation=config.attn_implementation,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **how,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"The backbone {name} could not be loaded: {first_line(error)}") from error
    return model, set(info["missing_keys"])


def _require_whole(name: str, model: PreTrainedModel, fresh: set[str], head: list[str]) -> None:
    """Refuse new weights outside the head: they would be random and frozen."""
    lost = sorted(key for key in fresh if not is_in_head(key, head))
    if lost:
        raise UserError(
            f"The checkpoint {name} lacks {len(lost)} weights of its {model.base_model_prefix}, first {lost[0]}; they "
            "would be random. Fetch or save it again."
        )


def skeleton(
    model_config: PretrainedConfig, trust_remote_code: bool = False, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Build the model with one label and plain layers on the meta device, for facts that shapes and names determine.

    It gets its own copy of the configuration. Under ZeRO-3 transformers would shard and initialize this model too;
    `set_zero3_state` makes it skip that. Remove once transformers leaves models on the meta device alone.
    """
    config = deepcopy(model_config)
    config.num_labels = 1
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"), no_init_weights(), set_zero3_state(), quiet_transformers():
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


def _prepare_head(model: PreTrainedModel, head: list[str], fresh: set[str], std: float | None, seed: int) -> None:
    """Make the full head fp32 in weights and arithmetic, and initialize a new last layer with small seeded weights."""
    for name in head:
        module = model.get_submodule(name)
        make_whole(module)  # under ZeRO-3 transformers shards an unquantized model, including its head
        module.to(torch.float32)
        compute_in_own_precision(module)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and is_in_head(n, head)}
    last, layer = list(linear.items())[-1]
    if f"{last}.weight" in fresh:
        initialize(layer, std, seed)


def _match_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, may_grow: bool) -> None:
    """Set the model's pad id to the tokenizer's, and give its embedding a row for every token.

    Where embeddings are frozen, only a pad token may lack a row: no sequence contains it, so it does not matter that
    its row is random and not saved.
    """
    rows = embedding_rows(model)
    if len(tokenizer) > rows:
        if not may_grow and (len(tokenizer) > rows + 1 or tokenizer.pad_token_id != rows):
            raise UserError(
                f"The tokenizer has {len(tokenizer)} tokens, the backbone embeddings for {rows}: the others would be random and "
                "frozen. Use the backbone's own tokenizer, or fine-tune whole (--no_use_lora)."
            )
        say(f"embedding: grown from {rows} to {len(tokenizer)} rows to hold the tokenizer's new tokens")
        make_whole(model.get_input_embeddings())
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        shard_like(model, model.get_input_embeddings())
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        config.pad_token_id = tokenizer.pad_token_id


def _to_device(model: PreTrainedModel, config: BackboneConfig) -> None:
    """Move the model to this process's GPU, so that the probe runs where training will.

    Quantized weights are already there, and ZeRO-3 places what it shards.
    """
    if torch.cuda.is_available() and config.quantization == "none" and not is_deepspeed_zero3_enabled():
        nn.Module.to(model, torch.device("cuda", torch.cuda.current_device()))


def embedding_rows(model: PreTrainedModel) -> int:
    """Number of token ids with an input embedding. The embedding may have an adapter."""
    embedding = model.get_input_embeddings()
    plain = embedding.get_base_layer() if isinstance(embedding, BaseTunerLayer) else embedding
    assert isinstance(plain, nn.Embedding)
    return plain.num_embeddings


def _require_quantized(model: PreTrainedModel, config: BackboneConfig, was_saved_so: bool) -> None:
    share, largest = unquantized_share(model)
    left = f"{share:.0%} of the backbone's linear and expert weights unquantized, the largest being {largest}"
    if share > config.max_unquantized:
        if was_saved_so:
            raise UserError(
                f"{config.model_name_or_path} was quantized when it was saved, which left {left}. To train all the same pass "
                "--max_unquantized 1; to quantize all of it use a copy in 16 bit."
            )
        instead = "--quantization 4bit takes its experts too. " if config.quantization == "8bit" else ""
        raise UserError(
            f"--quantization {config.quantization} left {left}. {instead if fused_experts(model) else ''}To train all the "
            "same pass --max_unquantized 1; to load without quantization pass --quantization none."
        )
    if share > WORTH_SAYING:
        say(f"quantization: {left}")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' loading report and replace its bar.

    This module checks and reports new and missing weights itself, and counts the weights read in a `Phase`.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    hook = transformers_logging.set_tqdm_hook(_counted)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.set_tqdm_hook(hook)


def _counted(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Replace a bar of transformers: count its items; without items, return a bar that is not drawn."""
    if not args or not isinstance(args[0], Iterable):
        return factory(*args, **kwargs | {"disable": True})
    return counted(args[0], Phase("loading", kwargs.get("total") or len(args[0]), "weights"))  # type: ignore[arg-type]
