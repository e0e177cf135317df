"""Make one stock model from an adapter and its base: dequantize, add in fp32, cast, and prove the scores."""

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Literal

from qlora_rm.artifacts.allowed import allowed_drift
from qlora_rm.artifacts.as_written import require_as_written
from qlora_rm.artifacts.folders import artifact_kind, new_folder
from qlora_rm.artifacts.golden import GoldenItem, drift, make_golden, scores_of
from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import Manifest, Merge, Step
from qlora_rm.artifacts.noise import tolerance
from qlora_rm.artifacts.own_tokenizer import read_tokenizer
from qlora_rm.backbone.load import read_model_config
from qlora_rm.backbone.precision import DTYPES
from qlora_rm.backbone.saved_quantization import saved_quantization
from qlora_rm.config import Quantization
from qlora_rm.console import say
from qlora_rm.errors import UserError
from qlora_rm.merging.in_memory import merge_in_memory
from qlora_rm.merging.reference_scores import fits, read_adapter, read_back
from qlora_rm.merging.stream import Source, Stream
from qlora_rm.merging.weight_plan import NotStreamable
from qlora_rm.progress import Phase
from qlora_rm.verification.checks import check_golden_ids, check_tokenizer

MergeDtype = Literal["bf16", "fp32"]
MergeBase = Literal["dequantized", "original"]
METHODS = {
    "dequantized": "base dequantized, adapter added in fp32, cast",
    "original": "adapter added in fp32 to the base as it was before quantization, cast",
}


def merge(
    folder: str,
    output: str,
    *,
    dtype: MergeDtype = "bf16",
    base: MergeBase = "dequantized",
    base_model: str | None = None,
    trust_remote_code: bool = False,
) -> Merge:
    """Merge `folder`'s adapter into its base and write the model to `output`.

    The base's files are read, changed and written weight by weight. Peak memory is about two copies of the largest weight.
    The result loads with transformers' Auto classes and holds tokenizer, template and manifest. It is renamed into place
    only after its scores, read back from disk, have been verified.

    Arguments:
        base: "dequantized" applies training's quantization to the base and gives the golden scores. On "original" weights
            an adapter gives other scores. They are compared with those of the adapter on its unquantized base, and the
            merged model's manifest expects them from then on.
        base_model: where the base is, if not where the manifest says.

    Raises:
        UserError: `folder` holds no adapter, or one that changed since training; its base is another one; `output` is
            not empty, the disk is too full, or the merged scores are wrong. No files remain in any of these cases.
    """
    if artifact_kind(folder) != "adapter":
        raise UserError(f"{folder} already is one whole model: there is nothing to merge.")
    with new_folder(output) as beside:
        job = _Job(folder, beside, dtype, base, base_model, trust_remote_code)
        return job.run()


class _Job:
    """One merge into the folder `beside`."""

    def __init__(
        self,
        folder: str,
        beside: Path,
        dtype: MergeDtype,
        base: MergeBase,
        base_model: str | None,
        trust_remote_code: bool,
    ):
        self.folder, self.beside, self.dtype, self.base, self.trusted = folder, beside, dtype, base, trust_remote_code
        self.manifest, self.base_model = Manifest.load(folder), base_model
        require_as_written(folder, self.manifest)
        self.tokenizer = read_tokenizer(folder, trust_remote_code)
        self._require_tokenizer()
        self.changes = self.manifest.base.changes(base_model)
        self.stream = self._stream()
        self._require_original()

    def run(self) -> Merge:
        golden = self.manifest.golden or self._golden_of_adapter()
        if self.changes:
            self._require_own_scores(self._load())
            say(
                f"{' and '.join(self.changes)} of the base changed since training; its golden scores are given all the same"
            )
        sealed = self._write()
        self.tokenizer.save_pretrained(self.beside)
        with Phase("verifying"):
            record, step = self._prove(golden)
        manifest = replace(self.manifest, golden=golden)
        manifest.after(step, merge=record).save(self.beside, sealed)
        return record

    def _require_tokenizer(self) -> None:
        """Require that text gives the token ids of training."""
        checks = check_tokenizer(self.manifest, self.tokenizer), check_golden_ids(self.manifest, self.tokenizer)
        for check in chain.from_iterable(checks):  # one by one: later checks assume that earlier ones passed
            if not check.ok and self.manifest.golden:
                raise UserError(f"{self.folder} fails the check {check.name!r}: {check.detail}.")

    def _require_original(self) -> None:
        """Require unquantized base weights where `base` is "original"."""
        if self.base == "dequantized":
            return
        name, revision = self._base()
        saved = saved_quantization(read_model_config(name, revision, self.trusted))
        if saved != "none":
            raise UserError(
                f"--base original: {name} is saved in {saved}, so its weights before quantization are not there. Pass "
                "--base_model with a copy in 16 bit, or merge with --base dequantized."
            )

    def _golden_of_adapter(self) -> list[GoldenItem]:
        """Make golden items for an adapter that has none."""
        if self.changes:
            raise UserError(
                f"{' and '.join(self.changes)} of the base of {self.folder} changed since training, and without "
                "golden scores nothing can tell whether they still fit. Pass --base_model with the base it was "
                "trained on."
            )
        adapted = self._load()
        return make_golden([], adapted.tokenization, adapted.score_token_ids)

    def _load(self, quantization: Quantization | None = None) -> RewardModel:
        return RewardModel.load(
            self.folder,
            base=self.base_model,
            quantization=quantization,
            trust_remote_code=self.trusted,
            compare=False,
        )

    def _require_own_scores(self, adapted: RewardModel) -> None:
        """Require that the loaded adapter gives its golden scores. Otherwise its base is another one."""
        allowed = allowed_drift(self.manifest, adapted.computes_in)
        moved = drift(self.manifest.golden, scores_of(self.manifest.golden, adapted.score_token_ids), allowed)
        if not moved.ok:
            raise UserError(
                f"The adapter {self.folder} does not give its golden scores on this base ({moved}; allowed {allowed}). "
                "Its base has changed: pass --base_model with the one it was trained on."
            )

    def _base(self) -> tuple[str, str | None]:
        """Return the base's name or path, and its revision."""
        if self.base_model:
            return self.base_model, None
        return self.manifest.base.name_or_path, self.manifest.base.revision

    def _stream(self) -> Stream | None:
        """Plan the merge weight by weight. Return None where that is not possible."""
        manifest, (base, revision) = self.manifest, self._base()
        source = Source(
            adapter=self.folder,
            base=base,
            revision=revision,
            quantization=manifest.quantization,
            dtype=DTYPES[manifest.compute_dtype],
            dequantized=self.base == "dequantized",
            pad=self.tokenizer.pad_token_id,
            tokens=len(self.tokenizer),
            trusted=self.trusted,
            rotary_length=manifest.contract.rotary_length,
        )
        try:
            return Stream(source, DTYPES[self.dtype])
        except NotStreamable as reason:
            say(f"merging in the memory of the whole model in fp32, since {reason}")
            return None

    def _write(self) -> dict[str, str]:
        """Write the merged weights and config. Return the hashes that are known from writing them."""
        if self.stream is not None:
            return self.stream.run(self.beside)
        adapted = self._load(None if self.base == "dequantized" else "none")
        with Phase("merging"):
            merge_in_memory(adapted, self.folder, self.beside, DTYPES[self.dtype])
        return {}

    def _prove(self, golden: list[GoldenItem]) -> tuple[Merge, Step]:
        """Read the merged model back as any consumer would and compare its golden scores."""
        manifest, reference = self.manifest, golden
        if self.base == "original":
            reference = [replace(item, scores=new) for item, new in zip(golden, self._unquantized(golden), strict=True)]
        found = read_back(str(self.beside), reference, self.tokenizer.pad_token_id, self.trusted)
        quantization = manifest.quantization if self.base == "dequantized" else "none"
        rounding = (manifest.compute_dtype, quantization, self.dtype, found.computed_in)
        allowed = tolerance(golden, manifest.noise, *rounding)
        moved = drift(reference, found.scores, allowed)
        if not moved.ok:
            if manifest.golden:
                self._require_own_scores(self._load())
            raise UserError(
                f"The merged model's scores drift from the golden ones ({moved}; allowed {allowed}); it was not kept. "
                + _way_out(manifest.quantization, self.dtype)
            )
        settings = {"base": self.base, "dtype": self.dtype}
        if self.base == "dequantized":
            return Merge(METHODS[self.base], self.dtype, found.computed_in, moved.largest), Step.of(
                "merge", settings, moved
            )
        since_training = drift(golden, found.scores, allowed)
        record = Merge(METHODS[self.base], self.dtype, found.computed_in, since_training.largest, self.base)
        return record, Step.of("merge", settings, since_training, found.scores)

    def _unquantized(self, golden: list[GoldenItem]) -> list[list[float]]:
        """Return the scores of the adapter on its unquantized base."""
        base, revision = self._base()
        can_be_offloaded = self.stream is not None and self.stream.adapter.is_plain
        if not can_be_offloaded or fits(base, revision):
            return scores_of(golden, self._load("none").score_token_ids)
        pad = self.tokenizer.pad_token_id
        rotary_length = self.manifest.contract.rotary_length
        return read_adapter(
            self.folder, base, revision, self.beside.parent, golden, pad, self.trusted, rotary_length=rotary_length
        ).scores


def _way_out(quantization: str, dtype: MergeDtype) -> str:
    if quantization == "8bit":
        return "LLM.int8() rounds activations too, which no merged model does: use the adapter on its 8-bit base."
    return "Merge with --dtype fp32." if dtype == "bf16" else "Use the adapter on its base instead."
