"""The LoRA adapter, on the backbone's linear layers. The score head gets no adapter: it is trained in full."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model
from safetensors import safe_open
from transformers.pytorch_utils import Conv1D

from qlora_rm.backbone import targets
from qlora_rm.backbone.experts import PROJECTIONS, expert_weights, fused_experts, gate_names, lora_modules
from qlora_rm.backbone.json_files import read_json
from qlora_rm.backbone.load import Backbone
from qlora_rm.backbone.target_names import is_expression, named_modules
from qlora_rm.backbone.targets import LINEAR
from qlora_rm.config import AdapterConfig
from qlora_rm.errors import UserError, first_line


def attach_adapter(backbone: Backbone, config: AdapterConfig) -> PeftModel:
    """Wrap the backbone in a new LoRA adapter and make its full head trainable (PEFT's `modules_to_save`).

    `task_type` is SEQ_CLS, the only type for which PEFT trains and saves the head. Adapter weights are fp32.
    """
    backbone.model.requires_grad_(False)
    modules, parameters = _targets(backbone, config)
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=modules,
        target_parameters=parameters or None,
        # an expression expands to full names, which already are those of the chosen layers
        layers_to_transform=None if is_expression(config.lora_target_modules) else config.lora_layers,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in backbone.model.modules()),
        # PEFT adds `score` and `classifier` itself
        modules_to_save=[name for name in backbone.head if name not in ("score", "classifier")] or None,
    )
    lora._register_custom_module(lora_modules(backbone.model))  # type: ignore[arg-type]
    expression = " ".join(config.lora_target_modules or []) if is_expression(config.lora_target_modules) else None
    targets.narrow_to_text(backbone.model, backbone.head, lora, expression)
    try:
        model = get_peft_model(backbone.model, lora)
    except ValueError as error:
        raise UserError(f"The adapter could not be attached: {error}") from error
    _train_only(model)
    return model


def _targets(backbone: Backbone, config: AdapterConfig) -> tuple[list[str], list[str]]:
    """PEFT's `target_modules` and `target_parameters`.

    On a mixture of experts, PEFT 0.21 maps names of an expert's projections to the fused experts, as transformers 4 had
    them. A shared expert or a dense layer with such a name would be skipped, and the experts adapted instead (peft
    #3711). Targeting the layer's weight as a parameter is unambiguous and gives the same adapter. Remove once PEFT
    leaves full names alone.
    """
    experts = fused_experts(backbone.model)
    if config.lora_experts and not experts:
        raise UserError("--lora_experts: this backbone has no fused expert weights. Leave the option out.")
    modules = named_modules(backbone.model, backbone.head, config) or linear_names(backbone)
    if not experts:
        return modules, []
    by_weight = [name for name in modules if name.rpartition(".")[2] in PROJECTIONS]
    layers = [
        layer
        for layer, module in backbone.model.named_modules()
        if isinstance(module, LINEAR) and any(f".{layer}".endswith(f".{name}") for name in by_weight)
    ]
    named_whole = [f"{layer}.weight" for layer in layers if layer in by_weight]
    weights = [f"{layer}.weight" for layer in layers if layer not in by_weight]
    if layers and (config.lora_dropout or config.use_dora):
        raise UserError(
            f"--lora_dropout and --use_dora do not go with {', '.join(by_weight)} on a mixture of experts (PEFT has neither "
            "there). Leave them out, or name other layers by --lora_target_modules."
        )
    if config.lora_experts:
        weights += [f"{module}.{name}" for module, holder in experts.items() for name in expert_weights(holder)]
    modules = [name for name in modules if name not in by_weight]
    if not modules and not weights and not named_whole:
        raise UserError(
            f"--lora_target_modules {' '.join(by_weight)} names no linear layer here. For the experts pass --lora_experts."
        )
    return modules, named_whole + _in_layers(weights, config.lora_layers)


def _in_layers(parameters: Iterable[str], layers: list[int] | None) -> list[str]:
    """Full names of the parameters in the given transformer layers; without `layers`, what follows a layer's number."""
    if layers is None:
        return sorted({re.split(r"\.\d+\.", name)[-1] for name in parameters})
    return [name for name in parameters if any(f".{layer}." in name for layer in layers)]


def load_adapter(backbone: Backbone, folder: str, *, trainable: bool) -> PeftModel:
    """Put the adapter of `folder` and its trained head on the backbone it was trained on.

    Raises:
        UserError: the folder holds no adapter, or the adapter has no head or another shape.
    """
    settings = read_adapter_config(folder)
    require_head(folder, backbone)
    _require_rank(folder, settings)
    try:
        config = PeftConfig.from_pretrained(folder)
        if isinstance(config, LoraConfig):
            config._register_custom_module(lora_modules(backbone.model))  # type: ignore[arg-type]
        model = PeftModel.from_pretrained(backbone.model, folder, is_trainable=trainable, config=config)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"The adapter {folder} does not fit this backbone: {first_line(error)}") from error
    _train_only(model) if trainable else model.requires_grad_(False)
    return model


def read_adapter_config(folder: str) -> dict:
    """Return the adapter_config.json of a folder; raise `UserError` where it is missing or unusable."""
    path = Path(folder) / "adapter_config.json"
    try:
        found = read_json(path, "Restore it from the training run's output.")
    except FileNotFoundError:
        raise UserError(f"{folder} holds no adapter: there is no adapter_config.json.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} must hold an object, not {found!r:.60}.")
    if found.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{path} describes an adapter of type {found.get('peft_type')!r:.60}; this project reads LORA.")
    return found


def _require_rank(folder: str, settings: dict) -> None:
    """Refuse a rank larger than any side of the adapter's tensors, before memory for it is allocated."""
    ranks = [settings.get("r"), *(settings.get("rank_pattern") or {}).values()]
    with safe_open(Path(folder) / "adapter_model.safetensors", framework="pt") as file:
        longest = max((max(file.get_slice(name).get_shape(), default=0) for name in file.keys()), default=0)  # noqa: SIM118
    for rank in ranks:
        if type(rank) is not int or not 0 < rank <= longest:
            raise UserError(
                f"The adapter {folder} names rank {rank!r:.60}, and its tensors have at most {longest} rows."
            )


def require_head(folder: str, backbone: Backbone) -> None:
    """Refuse an adapter that was saved without the score head: PEFT would score with a random one."""
    weights = Path(folder) / "adapter_model.safetensors"
    try:
        with safe_open(weights, framework="pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{weights} cannot be read: {error}") from error
    except Exception as error:  # safetensors raises its own error type for a truncated file
        raise UserError(f"{weights} is broken or cut short: {error}") from error
    for module in backbone.head:
        saved = {n: s for n, s in shapes.items() if n.startswith(f"base_model.model.{module}.")}
        if not saved:
            raise UserError(f"The adapter {folder} was saved without its head {module!r}: its scores would be random.")
        empty = [name for name, shape in saved.items() if 0 in shape]
        if empty:
            raise UserError(
                f"The head in {folder} is empty ({empty[0]}): it was saved from a sharded model without gathering."
            )


def linear_names(backbone: Backbone) -> list[str]:
    """Last name parts (q_proj, ...) of all linear layers inside the backbone, without the head's and experts' gates."""
    return targets.linear_names(backbone.model, [*backbone.head, *gate_names(backbone.model)])


def _train_only(model: PeftModel) -> None:
    """Make adapter and head trainable in fp32; freeze everything else."""
    for name, parameter in model.named_parameters():
        trainable = "lora_" in name or ".modules_to_save." in name
        parameter.requires_grad_(trainable)
        if trainable and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
