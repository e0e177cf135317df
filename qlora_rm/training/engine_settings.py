"""Check for DeepSpeed settings that would silently spoil a run, before it begins."""

import os
from typing import Any

from transformers import PretrainedConfig

from qlora_rm.backbone.saved_quantization import saved_quantization, saved_settings
from qlora_rm.config import Quantization
from qlora_rm.errors import UserError
from qlora_rm.training.arguments import Options, TrainingConfig


def require_sound_settings(options: Options, config: PretrainedConfig, engine: dict[str, Any]) -> None:
    """Raise a `UserError` that names every unsound setting of the DeepSpeed configuration `engine`."""
    unsound = unsound_settings(
        engine,
        quantization=loaded_in(config, options.backbone.quantization),
        storage=stored_as(config),
        adapter=options.adapter.use_lora,
        args=options.training,
        ranks=options.training.world_size,
        ranks_here=options.training.ranks_here,
    )
    if unsound:
        file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE") or options.training.deepspeed
        where = f" {file}" if isinstance(file, str) and file != "none" else ""
        raise UserError(f"The DeepSpeed configuration{where} cannot train this model right: {'; '.join(unsound)}.")


def unsound_settings(
    engine: dict[str, Any],
    *,
    quantization: Quantization,
    storage: str,
    adapter: bool,
    args: TrainingConfig,
    ranks: int,
    ranks_here: int,
) -> list[str]:
    """Return DeepSpeed settings that spoil 4-bit weights or an fp32 adapter, or save no model, each with its remedy.

    Most of them fail silently.

    Arguments:
        engine: the DeepSpeed configuration, with "auto" for values that the trainer fills in.
        quantization: of the loaded weights.
        storage: dtype of the packed bytes in a pre-quantized checkpoint; uint8 otherwise.
        adapter: whether LoRA is trained, not the full model.
        ranks: processes of the job, `ranks_here` of them on this machine.
    """
    zero = engine.get("zero_optimization", {})
    found = []
    if quantization == "8bit" and zero.get("stage") == 3:
        # bitsandbytes 0.50 keeps the weight in `Linear8bitLt.state.CB`, not a parameter; each forward restores it
        found.append(
            "stage 3 shards no 8-bit weights, of which bitsandbytes keeps a whole copy in every process: use --quantization "
            "4bit, or stage 2"
        )
    if quantization != "none":
        for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights"):
            if zero.get(name):
                found.append(f"{name} rounds the packed 4-bit bytes once more and destroys them: take it out")
        if zero.get("stage3_use_all_reduce_for_fetch_params"):
            found.append(
                "stage3_use_all_reduce_for_fetch_params gathers weights of one dtype only, and a quantized model has several: "
                "take it out"
            )
        if (zero.get("offload_param") or {}).get("device") == "nvme":
            found.append(
                "offload_param to nvme has not been shown to bring packed bytes back as they were: use the device cpu, as "
                "ds_configs/zero3_offload.json does"
            )
        if storage != "uint8":
            found.append(
                f"the checkpoint keeps its packed bytes as {storage} (bnb_4bit_quant_storage), which the engine casts and "
                "so corrupts: quantize the 16-bit checkpoint while loading, or one stored as uint8"
            )
    if not adapter and zero.get("stage") == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        found.append(
            "without stage3_gather_16bit_weights_on_model_save no process gathers the whole model, and what is saved holds no "
            "weights: set it to true, as ds_configs/zero3.json does (weights keep their dtype, whatever its name says)"
        )
    for name, asked in (("bf16", args.bf16), ("fp16", args.fp16)):
        enabled = engine.get(name, {}).get("enabled", False)
        if adapter and (asked if enabled == "auto" else enabled):
            found.append(
                f"{name}.enabled casts adapter and head to 16 bit: set it to false and give torch_autocast, as "
                "ds_configs/zero3.json does"
            )
    second = min(zero.get("zero_hpz_partition_size", 1), ranks)  # DeepSpeed caps it at the number of ranks
    if zero.get("stage") == 3 and second > 1 and ranks_here % second:
        found.append(
            f"zero_hpz_partition_size {zero['zero_hpz_partition_size']} does not divide the {ranks_here} processes of a machine, "
            f"within which the second copy of the shards is to stay: set it to {ranks_here}"
        )
    optim = str(getattr(args.optim, "value", args.optim))
    if "optimizer" in engine and optim != type(args).__dataclass_fields__["optim"].default:
        found.append(f"optimizer takes the place of --optim {optim}: take it out")
    if "scheduler" in engine:
        found.append("scheduler takes the place of --lr_scheduler_type and --warmup_steps: take it out")
    clip = engine.get("gradient_clipping", "nothing")
    if clip not in ("auto", args.max_grad_norm):
        found.append(f'gradient_clipping says {clip}, --max_grad_norm {args.max_grad_norm}: set it to "auto"')
    return found


def loaded_in(config: PretrainedConfig, asked: Quantization) -> Quantization:
    """Return the quantization of the loaded weights; a checkpoint saved quantized always keeps its own."""
    saved = saved_quantization(config)
    return saved if saved in ("4bit", "8bit") else asked  # type: ignore[return-value]


def stored_as(config: PretrainedConfig) -> str:
    """Return the dtype of the packed bytes in a checkpoint saved in 4 bit; otherwise uint8, which this project uses."""
    return str(saved_settings(config).get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
