"""Merge and verify one trained artifact on this device, and score it by the CPU in fp32 and by the GPU in bf16.

    python -m benchmarks.gpu.artefact FOLDER PRECISION

prints the golden scores of a folder as JSON. With the GPU hidden, it computes on the CPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu.passes import free
from benchmarks.gpu.resume import trained
from benchmarks.gpu.suite import ROOT, Finding, Setting
from qlora_rm.artifacts.load import RewardModel
from qlora_rm.errors import UserError
from qlora_rm.merging.merge import merge
from qlora_rm.verification.folder import verify
from qlora_rm.verification.golden_proof import prove

Precision = Literal["bf16", "fp32"]


def artefact(setting: Setting, finding: Finding) -> None:
    """Check the artifact of the run in `resume`."""
    finding.tolerance = "verify's own checks; golden scores as the manifest allows them for the dtypes in play"
    adapter = trained(setting)
    folders = {"adapter": adapter}
    for dtype in ("fp32", "bf16"):
        folders[f"merged {dtype}"] = setting.scratch / f"merged_{dtype}"
        record = merge(str(adapter), str(folders[f"merged {dtype}"]), dtype=dtype)  # type: ignore[arg-type]
        finding.result[f"merge {dtype}"] = {"compared in": record.compared_in, "drift": record.drift}
    for name, folder in folders.items():
        free()
        checks = verify(str(folder))
        failed = [f"{check.name}: {check.detail}" for check in checks if not check.ok]
        finding.result[f"verify {name}"] = {"checks": len(checks), "failed": failed}
        finding.require(not failed, f"verify {name}: {failed[:1]}")
    for name in ("adapter", "merged bf16"):
        _compare(setting, finding, name, folders[name])


def _compare(setting: Setting, finding: Finding, name: str, folder: Path) -> None:
    """Compare CPU fp32 with GPU bf16 and GPU fp32. Each must give the golden scores within the manifest's tolerance."""
    sides = {
        "cpu fp32": on_the_cpu(setting, folder, "fp32"),
        f"{setting.device} bf16": golden_scores(folder, "bf16"),
        f"{setting.device} fp32": golden_scores(folder, "fp32"),
    }
    reference = sides["cpu fp32"]["scores"]
    finding.result[f"scores of the {name}"] = {
        "golden scores": len(reference),
        "largest score": max(map(abs, reference)),
        "to cpu fp32": {side: largest(found["scores"], reference) for side, found in sides.items()},
        "proof": {side: found["proof"] for side, found in sides.items()},
    }
    for side, found in sides.items():
        finding.require(found["ok"], f"{name} on {side}: {found['proof']}")


def golden_scores(folder: Path, precision: Precision) -> dict[str, Any]:
    """Score the golden sequences here, and return the scores and whether they prove the model."""
    free()
    model = RewardModel.load(str(folder), precision=precision)
    assert model.manifest is not None
    items = model.manifest.golden
    try:
        proof = prove(model, str(folder))
        said, ok = f"{proof.drift}; allowed {proof.allowed}", True
    except UserError as error:
        said, ok = str(error), False
    scores = model.score_token_ids([ids for item in items for ids in item.token_ids])
    return {"ok": ok, "proof": said, "scores": scores.tolist()}


def on_the_cpu(setting: Setting, folder: Path, precision: Precision) -> dict[str, Any]:
    """Compute golden scores on the CPU, in a separate process without a GPU where this one has one."""
    if not setting.on_gpu:
        return golden_scores(folder, precision)
    command = [sys.executable, "-m", "benchmarks.gpu.artefact", str(folder), precision]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def largest(scores: list[float], others: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(scores, others, strict=True))


if __name__ == "__main__":
    print(json.dumps(golden_scores(Path(sys.argv[1]), sys.argv[2])))  # type: ignore[arg-type]
