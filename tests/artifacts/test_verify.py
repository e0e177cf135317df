"""Each way of breaking a model on disk fails the check named for it, and none raises."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qlora_rm.artifacts.manifest import FILE_NAME, Manifest
from qlora_rm.config import AdapterConfig
from qlora_rm.errors import UserError
from qlora_rm.merging.merge import merge
from qlora_rm.verification.folder import verify
from tests.models_for_tests import save_backbone
from tests.reward_models_for_tests import as_version_1, copy_of, edit_json, llama_adapter, make_reward_model, seal_again
from tests.tokenizers_for_tests import small_tokenizer


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "fp32"
    merge(str(llama_adapter()), str(folder), dtype="fp32")
    return folder


@pytest.fixture(scope="module")
def merged_in_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained in bf16 and merged to bf16."""
    folder = tmp_path_factory.mktemp("merged") / "bf16"
    merge(str(llama_adapter("bf16")), str(folder), dtype="bf16")
    return folder


def weights_of(folder: Path) -> Path:
    return next(path for path in folder.glob("*model.safetensors"))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(weights_of(folder))
    change(tensors)
    save_file(tensors, weights_of(folder), {"format": "pt"})


def head_name(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if "score" in name)


def drop_head(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(head_name(tensors)))  # type: ignore[arg-type,return-value]


def zero_head(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors[head_name(tensors)].zero_())  # type: ignore[arg-type,return-value]


def nan_weight(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors[max(tensors)].fill_(torch.nan))  # type: ignore[arg-type,return-value]


def extra_tensor(folder: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        prefix = "base_model.model." if "adapter" in weights_of(folder).name else ""
        tensors[f"{prefix}lm_head.weight"] = torch.zeros(2, 2)

    edit_tensors(folder, add)


def lose_a_layer(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.pop(next(n for n in t if "down_proj" in n)))  # type: ignore[arg-type,return-value]


def scale_a_layer(folder: Path) -> None:
    edit_tensors(folder, lambda t: t[next(n for n in t if "down_proj" in n)].mul_(3))  # type: ignore[arg-type,return-value]


def truncate(folder: Path) -> None:
    path = weights_of(folder)
    path.write_bytes(path.read_bytes()[:-1000])


def swap_pad(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", pad_token="<|im_start|>")


def pad_is_eos(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", pad_token="</s>")


def swap_eos(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", eos_token="<|im_end|>")


def edit_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace("<|im_end|>", "<|im_end|> "), encoding="utf-8")


def break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")


def break_manifest(folder: Path) -> None:
    (folder / FILE_NAME).write_text("{", encoding="utf-8")


def pad_in_golden(folder: Path) -> None:
    golden = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))["golden"]
    golden[0]["token_ids"][0][-1] = 2
    edit_json(folder / FILE_NAME, golden=golden)


def move_golden(folder: Path) -> None:
    content = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
    content["golden"][0]["scores"][0] += 0.01 if content["compute_dtype"] == "fp32" else 1.0
    edit_json(folder / FILE_NAME, golden=content["golden"])


def older_rules(folder: Path) -> None:
    contract = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))["contract"]
    edit_json(folder / FILE_NAME, contract=contract | {"eos_rule": "never any eos"})


def no_golden(folder: Path) -> None:
    edit_json(folder / FILE_NAME, golden=[])


def flip_a_bit(folder: Path) -> None:
    """Flip a low bit of a mantissa near the end of the file, which no score shows."""
    path = weights_of(folder)
    content = bytearray(path.read_bytes())
    content[-400] ^= 1
    path.write_bytes(content)


def change_merges(folder: Path) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = content["model"]["merges"][1:]
    path.write_text(json.dumps(content), encoding="utf-8")


def lose_the_tokenizer_s_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


BREAKS: list[tuple[Callable[[Path], None], str, str]] = [
    (drop_head, "model loads", "head 'score'"),
    (zero_head, "score head is not zero", "score"),
    (nan_weight, "weights are finite", "training run's output"),
    (extra_tensor, "no tensor is unread", "lm_head"),
    (lose_a_layer, "no tensor is missing", "down_proj"),
    (scale_a_layer, "golden scores are given again", "outside the tolerance"),
    (truncate, "model loads", "broken or cut short"),
    (swap_pad, "pad token is the trained one", "tokenizer 3, manifest 2"),
    (pad_is_eos, "pad token is not eos", "pad 1, eos 1"),
    (swap_eos, "bos and eos are the trained ones", "restore"),
    (edit_template, "chat template is the trained one", "text has changed"),
    (edit_template, "golden texts give the golden token ids", "template have changed"),
    (break_tokenizer, "tokenizer loads", "could not be loaded"),
    (break_manifest, "manifest is readable", FILE_NAME),
    (pad_in_golden, "no pad token in golden ids", "1 sequences"),
    (move_golden, "golden scores are given again", "1 of 17"),
    (older_rules, "eos rule and score position are this version's", "never any eos"),
    (no_golden, "golden items are there", "finish the run"),
    (flip_a_bit, "files are those that were written", "safetensors has changed"),
    (change_merges, "files are those that were written", "tokenizer.json has changed"),
    (lose_the_tokenizer_s_template, "files are those that were written", "chat_template.jinja is gone"),
]
OTHERWISE_MERGED = {
    "drop_head": ("no tensor is missing", "score.weight"),
}


@pytest.mark.slow
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["adapter", "merged"])
@pytest.mark.parametrize(("break_it", "name", "detail"), BREAKS, ids=[f"{b.__name__}-{n}" for b, n, _ in BREAKS])
def test_names_what_was_broken(
    tmp_path: Path,
    merged: Path,
    merged_in_bf16: Path,
    kind: str,
    compute: str,
    break_it: Callable[[Path], None],
    name: str,
    detail: str,
) -> None:
    whole = merged if compute == "fp32" else merged_in_bf16
    folder = copy_of(llama_adapter(compute) if kind == "adapter" else whole, tmp_path / "model")
    if kind == "merged":
        name, detail = OTHERWISE_MERGED.get(break_it.__name__, (name, detail))
    break_it(folder)
    failed = {check.name: check.detail for check in verify(str(folder)) if not check.ok}
    assert name in failed, failed
    assert detail in failed[name]


MERGE_SAYS = {
    drop_head: "without its head",
    zero_head: "adapter_model.safetensors has changed",
    nan_weight: "adapter_model.safetensors has changed",
    extra_tensor: "has no place for: base_model.model.lm_head.weight",
    lose_a_layer: "does not fit its base: it lacks",
    scale_a_layer: "adapter_model.safetensors has changed",
    truncate: "broken or cut short",
    swap_pad: "'pad token is the trained one'",
    pad_is_eos: "'pad token is the trained one'",
    swap_eos: "'bos and eos are the trained ones'",
    edit_template: "'chat template is the trained one'",
    break_tokenizer: "could not be loaded",
    break_manifest: FILE_NAME,
    pad_in_golden: "'no pad token in golden ids'",
    older_rules: "eos_rule is 'never any eos'",
    flip_a_bit: "adapter_model.safetensors has changed",
    change_merges: "'golden texts give the golden token ids'",
    lose_the_tokenizer_s_template: "'chat template is the trained one'",
}


@pytest.mark.parametrize("break_it", MERGE_SAYS, ids=lambda break_it: break_it.__name__)
def test_merge_names_what_was_broken(tmp_path: Path, break_it: Callable[[Path], None]) -> None:
    """Even if the hashes were updated and show nothing."""
    folder = copy_of(llama_adapter(), tmp_path / "model")
    break_it(folder)
    says = MERGE_SAYS[break_it]
    if not says.endswith("has changed") and break_it is not break_manifest:
        seal_again(folder)
    with pytest.raises(UserError, match=re.escape(says)):
        merge(str(folder), str(tmp_path / "merged"))
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("break_it", [zero_head, nan_weight, scale_a_layer, swap_pad, edit_template, change_merges])
def test_merge_refuses_what_hashes_would_have_shown_without_them(
    tmp_path: Path, break_it: Callable[[Path], None]
) -> None:
    """As for an artifact with a manifest of version 1."""
    folder = copy_of(llama_adapter(), tmp_path / "model")
    break_it(folder)
    as_version_1(folder)
    with pytest.raises(UserError):
        merge(str(folder), str(tmp_path / "merged"), dtype="fp32")
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.slow
@given(st.floats(0, 1, exclude_max=True), st.sampled_from(["adapter", "merged", "base"]))
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_file_cut_short_anywhere_is_found(tmp_path_factory: Any, merged: Path, share: float, kind: str) -> None:
    tmp_path = tmp_path_factory.mktemp("cut")
    folder = copy_of(merged if kind == "merged" else llama_adapter(), tmp_path / "model")
    cut = folder
    if kind == "base":
        cut = copy_of(llama_adapter().parent / "base", tmp_path / "base")
    path = weights_of(cut)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    base = str(cut) if kind == "base" else None
    failed = {check.name: check.detail for check in verify(str(folder), base=base) if not check.ok}
    assert "model loads" in failed
    if kind != "merged":
        with pytest.raises(UserError, match=r"cut short|could not be loaded|has changed"):
            merge(str(folder), str(tmp_path / "out"), base_model=base)
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_adapter_of_other_shapes_is_foreign(tmp_path: Path) -> None:
    narrower = make_reward_model(tmp_path / "other", adapter=AdapterConfig(lora_r=4))
    folder = copy_of(llama_adapter(), tmp_path / "model")
    shutil.copy(weights_of(narrower), weights_of(folder))
    assert "model loads" in {check.name for check in verify(str(folder)) if not check.ok}
    seal_again(folder)
    with pytest.raises(UserError, match="does not fit its base"):
        merge(str(folder), str(tmp_path / "out"))


@pytest.mark.slow
def test_a_base_of_the_same_shapes_is_foreign(tmp_path: Path) -> None:
    base = save_backbone(tmp_path / "base", "llama", small_tokenizer(), seed=5)
    failed = {check.name: check.detail for check in verify(str(llama_adapter()), base=base) if not check.ok}
    assert "its weights changed since training; pass --base" in failed["base is the trained one"]
    assert "golden scores are given again" in failed


def test_a_merged_model_s_pad_id_is_checked_in_its_config(merged: Path, tmp_path: Path) -> None:
    folder = copy_of(merged, tmp_path / "model")
    edit_json(folder / "config.json", pad_token_id=5)
    assert "model pads as the tokenizer does" in {check.name for check in verify(str(folder)) if not check.ok}


def test_quantization_leftovers_are_found(merged: Path, tmp_path: Path) -> None:
    folder = copy_of(merged, tmp_path / "model")
    edit_json(folder / "config.json", quantization_config={"load_in_4bit": True, "quant_method": "bitsandbytes"})
    failed = {check.name: check.detail for check in verify(str(folder)) if not check.ok}
    assert "quantization_config" in failed["no quantization leftovers"]


@pytest.mark.slow
def test_a_base_that_is_gone_is_said(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    failed = {check.name: check.detail for check in verify(str(folder)) if not check.ok}
    assert list(failed) == ["model loads"]
    assert "--base" in failed["model loads"]
    assert all(check.ok for check in verify(str(folder), base=str(tmp_path / "elsewhere")))


@pytest.mark.slow
def test_sound_models_hold(merged: Path, merged_in_bf16: Path) -> None:
    for folder in (llama_adapter(), merged, llama_adapter("bf16"), merged_in_bf16):
        checks = verify(str(folder))
        assert [check for check in checks if not check.ok] == []
        assert len(checks) >= 18
        assert len({check.name for check in checks}) == len(checks)


@pytest.mark.slow
def test_a_model_trained_whole_holds(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path, adapter=AdapterConfig(use_lora=False), quantization="none")
    assert [check for check in verify(str(folder)) if not check.ok] == []


@pytest.mark.slow
def test_positions_counted_from_the_left_are_not_padded_left(tmp_path: Path) -> None:
    folder = make_reward_model(tmp_path, "gpt2")
    left = next(check for check in verify(str(folder)) if "left padded" in check.name)
    assert left.ok
    assert "not tried" in left.detail


def test_a_folder_of_something_else_is_the_user_s_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no reward model"):
        verify(str(tmp_path))


def test_the_manifest_under_test_is_the_one_that_was_saved() -> None:
    assert Manifest.load(llama_adapter()).golden
