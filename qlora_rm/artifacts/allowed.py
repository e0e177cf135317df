"""How far the scores of a manifest's model may move, given what the model has gone through."""

from qlora_rm.artifacts.golden import Tolerance
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.artifacts.noise import layout_tolerance, tolerance


def allowed_drift(manifest: Manifest, computes_in: str) -> Tolerance:
    """How far scores computed in `computes_in` may stand from the golden ones."""
    rounding = [manifest.compute_dtype, manifest.quantization, computes_in]
    stored = [manifest.merge.dtype] if manifest.merge else []
    return tolerance(manifest.golden, manifest.noise, *rounding, *stored)


def allowed_between_layouts(manifest: Manifest, computes_in: str) -> Tolerance:
    """How far two scores of one sequence, computed in `computes_in`, may stand apart: alone or in any batch."""
    return layout_tolerance(manifest.golden, manifest.noise, computes_in, manifest.quantization)
