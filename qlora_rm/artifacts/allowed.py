"""How far the scores of a manifest's model may move, given the model's history."""

from qlora_rm.artifacts.golden import Tolerance
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.artifacts.noise import layout_tolerance, tolerance


def allowed_drift(manifest: Manifest, computes_in: str) -> Tolerance:
    """Allowed distance of scores computed in `computes_in` from the golden ones."""
    rounding = [manifest.compute_dtype, manifest.quantization, computes_in]
    stored = [manifest.merge.dtype] if manifest.merge else []
    return tolerance(manifest.golden, manifest.noise, *rounding, *stored)


def allowed_between_layouts(manifest: Manifest, computes_in: str) -> Tolerance:
    """Allowed distance between two scores of one sequence, alone or in any batch, computed in `computes_in`."""
    return layout_tolerance(manifest.golden, manifest.noise, computes_in, manifest.quantization)
