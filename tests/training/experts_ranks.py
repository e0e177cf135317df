"""Script that runs `qlora-rm train` and records on each rank where packed expert weights are, for test_experts.py.

It writes OUTPUT_DIR/experts-RANK.json. For each packed weight the file holds its bytes, the bytes this rank keeps, how
often a training forward pass used it gathered, and how many gathered copies were still alive after that pass.
"""

import json
import sys
from pathlib import Path
from typing import Any

from torch.multiprocessing.reductions import StorageWeakRef

from qlora_rm.backbone import expert_linear
from qlora_rm.backbone.experts import expert_weights, fused_experts
from qlora_rm.training import run
from qlora_rm.training.trainer import PreferenceTrainer

used: dict[int, list[StorageWeakRef]] = {}


class Watched(expert_linear._Matrices):
    def __init__(self, weight: Any, *rest: Any):
        super().__init__(weight, *rest)
        used.setdefault(weight.ds_id, []).append(StorageWeakRef(weight.untyped_storage()))


class WatchedTrainer(PreferenceTrainer):
    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        used.clear()
        loss = super().compute_loss(model, *args, **kwargs)
        if model.training:
            notes = [
                {
                    "whole": weight.ds_numel,
                    "at rest": weight.ds_tensor.numel(),
                    "gathered": len(used[weight.ds_id]),
                    "alive after forward": sum(not copy.expired() for copy in used[weight.ds_id]) + weight.numel(),
                }
                for experts in fused_experts(model).values()
                for weight in expert_weights(experts).values()
            ]
            path = Path(str(self.args.output_dir)) / f"experts-{self.accelerator.process_index}.json"
            path.write_text(json.dumps(notes))
        return loss


if __name__ == "__main__":
    expert_linear._Matrices = Watched  # type: ignore[misc]
    run.PreferenceTrainer = WatchedTrainer  # type: ignore[misc]
    run.main(sys.argv[1:])
