"""Load a complete model as any consumer does, by transformers' Auto class alone."""

from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from qlora_rm.artifacts.arithmetic import compute_in_fp32, lacks_16_bit_units, to_accelerator
from qlora_rm.backbone.load import quiet_transformers, read_model_config, skeleton
from qlora_rm.backbone.plausible import require_held
from qlora_rm.errors import UserError, first_line
from qlora_rm.progress import Phase


def load_stock(folder: str, trust_remote_code: bool = False) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load the model as any consumer does, by transformers' Auto class alone; return it and its loading report.

    It is loaded in its stored dtype, or widened to fp32 on a CPU without 16-bit units.
    """
    dtype = torch.float32 if lacks_16_bit_units() else "auto"
    config = read_model_config(folder, trust_remote_code=trust_remote_code)
    try:
        require_held(folder, None, skeleton(config, trust_remote_code))
        with Phase("loading"), quiet_transformers():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=dtype,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,  # this project writes only these; loading other weights runs code
            )
    except UserError:
        raise
    except Exception as error:  # safetensors raises its own error type for a truncated file
        raise UserError(f"The model in {folder} could not be loaded: {first_line(error)}") from error
    if dtype is torch.float32:
        compute_in_fp32(model)
    to_accelerator(model).eval()
    return model, info
