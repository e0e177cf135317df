"""The noise of a model's scores is measured without side effects, and determines a copy's tolerance."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qlora_rm.artifacts import noise as measuring
from qlora_rm.artifacts.golden import ROUNDED, SAME, GoldenItem, scores_of
from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import FILE_NAME, Manifest
from qlora_rm.artifacts.noise import LARGEST, TYPICAL, Noise, computing_in, layout_tolerance, measure_noise, tolerance
from qlora_rm.config import AdapterConfig
from qlora_rm.errors import UserError
from qlora_rm.merging.merge import merge
from qlora_rm.verification.folder import verify
from tests.reward_models_for_tests import copy_of, edit_json, llama_adapter, make_reward_model, seal_again

ITEMS = [GoldenItem("", ["a", "b"], [[1], [2]], [-3.0, 3.0])]
"""A standard deviation of 3, so that no tolerance exceeds 1.5."""

small = st.floats(1e-7, 10)
noises = st.builds(Noise, small, small, small)


def bits_of(model: torch.nn.Module) -> list[tuple[str, torch.dtype, int, bytes]]:
    return [
        (name, p.dtype, p.data_ptr(), p.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, p in model.named_parameters()
    ]


class TestMeasuring:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_leaves_no_trace(self, dtype: torch.dtype) -> None:
        model = RewardModel.load(str(llama_adapter())).model
        layers = [m for m in model.modules() if hasattr(m, "compute_dtype")]
        before, computed = bits_of(model), [layer.compute_dtype for layer in layers]
        with computing_in(model, dtype):
            assert {layer.compute_dtype for layer in layers} == {dtype}
            head = {p.dtype for name, p in model.named_parameters() if "score" in name}
            assert head == {torch.float32}, "the head keeps its own precision"
        assert bits_of(model) == before
        assert [layer.compute_dtype for layer in layers] == computed

    @pytest.mark.slow
    def test_computes_without_the_autocast_that_accelerate_wraps_a_model_in(self) -> None:
        model = RewardModel.load(str(llama_adapter())).model
        items = Manifest.load(llama_adapter()).golden
        own = model.forward
        model._original_forward = own
        model.forward = lambda *args, **kwargs: pytest.fail("the autocast of training was in force")
        assert measure_noise(model, items, 2, torch.float32)["fp32"].largest < 1e-4
        with pytest.raises(pytest.fail.Exception):
            model(input_ids=torch.ones(1, 3, dtype=torch.long))

    @pytest.mark.parametrize("trained_in", ["fp32", "bf16"])
    def test_fp32_is_quiet_between_layouts_and_bf16_is_not(self, trained_in: str) -> None:
        noise = Manifest.load(llama_adapter(trained_in)).noise
        assert noise.keys() == {"fp32", "bf16"}
        assert noise["fp32"].layouts < 1e-4 < noise["bf16"].layouts
        assert (noise["fp32"].largest < 1e-4) == (trained_in == "fp32"), "what bf16 rounded in training is noise too"
        assert all(0 < one.typical <= one.largest for one in noise.values())

    @pytest.mark.slow
    def test_fp16_is_measured_where_it_was_trained_in(self) -> None:
        model, items = RewardModel.load(str(llama_adapter())).model, Manifest.load(llama_adapter()).golden
        noise = measure_noise(model, items, 2, torch.float16)
        assert noise["fp32"].largest < noise["fp16"].largest < noise["bf16"].largest

    @pytest.mark.slow
    def test_what_cannot_be_measured_is_said_and_absent(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        model, items = RewardModel.load(str(llama_adapter())).model, Manifest.load(llama_adapter()).golden
        real = measuring.score_sequences

        def score(scored: torch.nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
            dtype = scored.get_input_embeddings().weight.dtype
            if dtype is torch.bfloat16:
                raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'BFloat16'")
            scores = real(scored, *args, **kwargs)  # type: ignore[arg-type]
            return scores * torch.inf if dtype is torch.float16 else scores

        monkeypatch.setattr(measuring, "score_sequences", score)
        assert measure_noise(model, items, 2, torch.float16).keys() == {"fp32"}
        said = capsys.readouterr().err
        assert "bf16: not measured" in said
        assert "not finite in fp16" in said

    def test_without_golden_items_nothing_is_measured(self) -> None:
        assert measure_noise(RewardModel.load(str(llama_adapter())).model, [], 2, torch.float32) == {}


class TestTolerance:
    def test_without_noise_the_constants_apply(self) -> None:
        assert tolerance(ITEMS, {}, "fp32", "4bit", "fp32") == SAME
        for rounded in (("bf16", "4bit", "fp32"), ("fp32", "none", "bf16"), ("fp32", "8bit")):
            assert tolerance(ITEMS, {}, *rounded) == ROUNDED
        assert (ROUNDED.of(1.0), ROUNDED.of(-50.0)) == (0.1, 1.0)

    def test_a_quiet_model_is_held_tighter_and_a_noisy_one_looser(self) -> None:
        quiet = {"fp32": Noise(1e-6, 1e-6, 1e-6), "bf16": Noise(0.004, 0.002, 0.001)}
        allowed = tolerance(ITEMS, quiet, "fp32", "4bit", "bf16")
        assert (allowed.absolute, allowed.typical) == (LARGEST * 0.004, TYPICAL * 0.002)
        assert tolerance(ITEMS, quiet, "fp32", "4bit", "fp32") == SAME
        noisy = {"fp32": Noise(1e-3, 1e-3, 1e-3), "bf16": Noise(0.2, 0.1, 0.2)}
        assert tolerance(ITEMS, noisy, "bf16").absolute == LARGEST * 0.2 > ROUNDED.absolute
        assert tolerance(ITEMS, noisy, "fp32").absolute == LARGEST * 1e-3

    def test_noise_in_fp16_that_was_not_measured_is_that_of_bf16(self) -> None:
        noise = {"fp32": Noise(1e-6, 1e-6, 1e-6), "bf16": Noise(0.01, 0.01, 0.01)}
        assert tolerance(ITEMS, noise, "fp16") == tolerance(ITEMS, noise, "bf16")

    def test_8_bit_is_never_held_tighter_than_the_constants(self) -> None:
        noise = {"fp32": Noise(1e-6, 1e-6, 1e-6), "bf16": Noise(0.01, 0.01, 0.01)}
        assert tolerance(ITEMS, noise, "fp32", "8bit") == ROUNDED
        assert layout_tolerance(ITEMS, noise, "fp32", "8bit") == ROUNDED
        noisy = {"fp32": Noise(1e-6, 1e-6, 1e-6), "bf16": Noise(0.2, 0.1, 0.2)}
        assert tolerance(ITEMS, noisy, "fp32", "8bit") == ROUNDED, "noise in bf16 is none of LLM.int8()'s in fp32"
        its_own = {"fp32": Noise(0.2, 0.1, 0.2), "bf16": Noise(0.2, 0.1, 0.2)}
        assert tolerance(ITEMS, its_own, "fp32", "8bit") == ROUNDED, "what LLM.int8() rounds, no merged model rounds"

    def test_batches_in_fp32_are_held_tight_after_training_in_bf16(self) -> None:
        noise = {"fp32": Noise(0.1, 0.05, 1e-6), "bf16": Noise(0.1, 0.05, 0.08)}
        assert layout_tolerance(ITEMS, noise, "fp32", "4bit") == SAME
        assert layout_tolerance(ITEMS, noise, "bf16", "4bit").absolute == LARGEST * 0.08

    @given(noises, noises, st.sampled_from([("fp32",), ("bf16",), ("fp32", "bf16"), ("fp16",), ("bf16", "8bit")]))
    def test_never_leaves_its_bounds(self, fp32: Noise, bf16: Noise, rounding: tuple[str, ...]) -> None:
        allowed = tolerance(ITEMS, {"fp32": fp32, "bf16": bf16}, *rounding)
        assert SAME.absolute <= allowed.absolute <= (0.01 if rounding == ("fp32",) else 1.5)
        assert allowed.flip_margin == 2 * allowed.absolute
        assert allowed.typical is None or SAME.absolute <= allowed.typical <= 1.5

    @given(noises, noises, st.floats(1, 10))
    def test_grows_with_the_noise(self, fp32: Noise, bf16: Noise, factor: float) -> None:
        louder = Noise(*(factor * value for value in (bf16.largest, bf16.typical, bf16.layouts)))
        one, other = (tolerance(ITEMS, {"fp32": fp32, "bf16": n}, "bf16") for n in (bf16, louder))
        assert one.absolute <= other.absolute
        assert one.typical is not None and other.typical is not None and one.typical <= other.typical


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter trained in bf16 with scores ten times as large: its noise far exceeds the constant of 0.1."""
    folder = make_reward_model(tmp_path_factory.mktemp("noisy"), compute="bf16")

    def louder(tensors: dict[str, torch.Tensor]) -> None:
        tensors[next(name for name in tensors if "score" in name)].mul_(10)

    edit(folder, louder)
    model = RewardModel.load(str(folder), precision="bf16", skip_checks=True)
    manifest = Manifest.load(folder)
    scores = scores_of(manifest.golden, model.score_token_ids)
    golden = [replace(item, scores=new) for item, new in zip(manifest.golden, scores, strict=True)]
    noise = measure_noise(model.model, golden, model.tokenizer.pad_token_id, torch.bfloat16)
    replace(manifest, golden=golden, noise=noise).save(folder)
    return folder


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def negated_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[next(name for name in tensors if "score" in name)].mul_(-1)


def other_head(tensors: dict[str, torch.Tensor]) -> None:
    head = tensors[next(name for name in tensors if "score" in name)]
    head.copy_(head[:, torch.randperm(head.shape[1], generator=torch.Generator().manual_seed(0))])


def lost_adapter(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()


def lost_layer(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if "layers.1" in name and "lora_B" in name:
            tensor.zero_()


class TestNoisyScores:
    """Scores that bf16 moves by more than the constant of 0.1."""

    @pytest.mark.slow
    def test_a_sound_model_holds_and_merges(self, noisy: Path, tmp_path: Path) -> None:
        assert Manifest.load(noisy).noise["bf16"].largest > 0.3
        assert [check for check in verify(str(noisy)) if not check.ok] == []
        merge(str(noisy), str(tmp_path / "merged"), dtype="bf16")
        assert [check for check in verify(str(tmp_path / "merged")) if not check.ok] == []

    @pytest.mark.slow
    @pytest.mark.parametrize("tamper", [negated_head, other_head, lost_adapter, lost_layer])
    def test_a_tampered_one_is_caught_by_its_scores_alone(
        self, noisy: Path, tmp_path: Path, tamper: Callable[[dict[str, torch.Tensor]], None]
    ) -> None:
        folder = copy_of(noisy, tmp_path / "model")
        edit(folder, tamper)
        seal_again(folder)
        failed = {check.name for check in verify(str(folder)) if not check.ok}
        assert "golden scores are given again" in failed
        with pytest.raises(UserError, match=r"drift from the golden ones|does not give its golden scores"):
            merge(str(folder), str(tmp_path / "merged"), dtype="bf16")

    def test_noise_in_the_manifest_buys_no_more_than_its_bounds(self, noisy: Path, tmp_path: Path) -> None:
        folder = copy_of(noisy, tmp_path / "model")
        edit(folder, lost_adapter)
        huge = {"largest": 9.0, "typical": 9.0, "layouts": 9.0}
        seal_again(folder)
        edit_json(folder / FILE_NAME, noise={"fp32": huge, "bf16": huge})
        assert "golden scores are given again" in {check.name for check in verify(str(folder)) if not check.ok}


@pytest.mark.slow
def test_a_model_trained_whole_has_its_noise_measured(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path, adapter=AdapterConfig(use_lora=False), quantization="none")
    noise = Manifest.load(folder).noise
    assert noise["fp32"].largest < 1e-4 < noise["bf16"].largest
