"""Merging weight by weight equals PEFT's merge of a fully loaded model, in the memory of one weight."""

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
)

from benchmarks import merge_memory
from qlora_rm.artifacts import safetensors_writer as shards_module
from qlora_rm.artifacts.golden import scores_of
from qlora_rm.artifacts.load import RewardModel
from qlora_rm.artifacts.manifest import Manifest
from qlora_rm.artifacts.safetensors_writer import Shards, Wanted
from qlora_rm.backbone.safetensors_reader import Checkpoint
from qlora_rm.config import AdapterConfig
from qlora_rm.errors import UserError
from qlora_rm.merging import kernel
from qlora_rm.merging import reference_scores as reading
from qlora_rm.merging.in_memory import merge_in_memory
from qlora_rm.merging.merge import merge
from qlora_rm.merging.nf4 import PIECE, Rounded, pieces
from qlora_rm.merging.stream import Source, Stream
from qlora_rm.verification.folder import verify
from tests.reward_models_for_tests import edit_json, llama_adapter, make_reward_model
from tests.tokenizers_for_tests import small_tokenizer, with_new_pad_token


def in_shards(base: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    (Path(base) / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="100KB")
    assert len(list(Path(base).glob("*.safetensors"))) > 3


def in_bf16(base: str) -> None:
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)


def without_prefix(base: str) -> None:
    AutoModel.from_pretrained(base).save_pretrained(base)
    assert "embed_tokens.weight" in load_file(Path(base) / "model.safetensors")


def in_4_bit(base: str) -> None:
    settings = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(base)


def tied(base: str) -> None:
    tensors = load_file(Path(base) / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, Path(base) / "model.safetensors", {"format": "pt"})
    edit_json(Path(base) / "config.json", tie_word_embeddings=True)


def with_a_head(base: str) -> None:
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32).save_pretrained(base)


def on_layers(*names: str, **more: Any) -> AdapterConfig:
    return AdapterConfig(lora_r=4, lora_target_modules=list(names), **more)


KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"adapter": AdapterConfig(lora_r=8, lora_alpha=4, use_rslora=True)},
    "dora": {"adapter": AdapterConfig(lora_r=8, use_dora=True)},
    "unquantized": {"quantization": "none"},
    "trained_in_bf16": {"compute": "bf16", "adapter": AdapterConfig(lora_r=4, lora_alpha=4)},
    "gpt2": {"architecture": "gpt2"},
    "gpt2_dora": {"architecture": "gpt2", "adapter": AdapterConfig(lora_r=8, use_dora=True)},
    "gpt2_unquantized": {"architecture": "gpt2", "quantization": "none"},
    "gemma3": {"architecture": "gemma3"},
    "distilbert": {"architecture": "distilbert"},
    "roberta": {"architecture": "roberta"},
    "grown_embedding": {"tokenizer": with_new_pad_token(), "rows": len(small_tokenizer())},
    "experts": {"architecture": "mixtral"},
    "lora_on_experts": {"architecture": "mixtral", "adapter": AdapterConfig(lora_r=4, lora_experts=True)},
    "lora_on_unquantized_experts": {
        "architecture": "mixtral",
        "quantization": "none",
        "adapter": AdapterConfig(lora_r=4, lora_experts=True),
    },
    "qwen3_moe": {"architecture": "qwen3_moe", "adapter": AdapterConfig(lora_r=4, lora_experts=True)},
    "lora_on_the_embedding": {"adapter": on_layers("embed_tokens", "q_proj")},
    "rslora_on_a_grown_embedding": {
        "adapter": on_layers("embed_tokens", use_rslora=True),
        "tokenizer": with_new_pad_token(),
        "rows": len(small_tokenizer()),
    },
    "lora_on_a_tied_embedding": {"adapter": on_layers("embed_tokens"), "save_again": tied},
    "lora_on_a_scaled_embedding": {"architecture": "gemma3", "adapter": on_layers("embed_tokens", "o_proj")},
    "lora_on_gpt2's_tables": {"architecture": "gpt2", "adapter": on_layers("wte", "wpe", "c_attn")},
    "lora_on_bert's_embedding": {"architecture": "roberta", "adapter": on_layers("word_embeddings", "query")},
    "images": {"architecture": "gemma3_images"},
    "sharded": {"save_again": in_shards},
    "stored_in_bf16": {"save_again": in_bf16},
    "stored_in_4_bit": {"save_again": in_4_bit},
    "without_prefix": {"save_again": without_prefix},
    "tied": {"save_again": tied},
    "with_a_head": {"save_again": with_a_head},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_gives_what_peft_gives_the_whole_model(tmp_path: Path, kind: str) -> None:
    folder = make_reward_model(tmp_path, **KINDS[kind])
    merge(str(folder), str(tmp_path / "merged"), dtype="fp32")
    (tmp_path / "whole").mkdir()
    merge_in_memory(RewardModel.load(str(folder)), str(folder), tmp_path / "whole", torch.float32)
    got, expected = load_file(tmp_path / "merged/model.safetensors"), load_file(tmp_path / "whole/model.safetensors")
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-5, msg=name)
    assert [check for check in verify(str(tmp_path / "merged")) if not check.ok] == []


@pytest.fixture(params=["compiled", "in torch"])
def quantizing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of quantizing and dequantizing: nf4.c, and bitsandbytes if nf4.c cannot be built."""
    if request.param == "in torch":
        monkeypatch.setattr(kernel, "_library", lambda: None)
    elif not kernel.is_built():
        pytest.skip("nf4.c was not built: no C compiler when the package was installed")


def test_the_kernel_is_built_where_there_is_a_compiler() -> None:
    assert kernel.is_built() or shutil.which("cc") is None


def there_and_back(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Quantize and dequantize by bitsandbytes itself, with double quantization."""
    codes, state = F.quantize_4bit(weight.to(dtype), blocksize=64, quant_type="nf4", compress_statistics=True)
    return F.dequantize_4bit(codes, state).view(-1).float()


@pytest.mark.long
@pytest.mark.slow
@given(
    blocks=st.integers(0, 40),
    rest=st.sampled_from([0, 0, 1, 30, 33]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 100.0]),
    seed=st.integers(0, 1000),
    cut=st.integers(1, 40),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.usefixtures("quantizing")
def test_quantizes_as_bitsandbytes_does(
    blocks: int, rest: int, dtype: torch.dtype, scale: float, seed: int, cut: int
) -> None:
    weight = scale * torch.randn(64 * blocks + rest + 64, generator=torch.Generator().manual_seed(seed))
    weight[::7] = weight[0]  # the largest value of some blocks, repeated
    weight[64:128] = 0
    rounded = Rounded.of(weight, dtype)
    parts = [rounded.values(i, min(i + 64 * cut, len(weight))) for i in range(0, len(weight), 64 * cut)]
    assert torch.equal(torch.cat(parts), there_and_back(weight, dtype))


@pytest.mark.usefixtures("quantizing")
def test_quantizes_at_every_bound_as_bitsandbytes_does() -> None:
    """Values on, just below and just above the bounds, over more than one piece."""
    code = F.get_4bit_type("nf4", device="cpu")
    bounds = (code[1:] + code[:-1]) / 2
    near = torch.cat(
        [bounds, bounds.nextafter(torch.tensor(2.0)), bounds.nextafter(torch.tensor(-2.0)), code, -code[:1]]
    )
    block = torch.cat([near, torch.zeros(64 - len(near) % 64)])[:64]
    weight = torch.cat([block * s for s in torch.linspace(0.01, 3, 1 + PIECE // 64)])
    rounded = Rounded.of(weight, torch.float32)
    values = torch.cat([rounded.values(*span) for span in pieces(len(weight))])
    assert torch.equal(values, there_and_back(weight, torch.float32))


@pytest.mark.usefixtures("quantizing")
def test_quantizes_every_bf16_value_under_every_scale_as_bitsandbytes_does() -> None:
    """Scales from one power of two to the next; all values down to 2^-9 of them, both signs."""
    weights = []
    for mantissa in range(128):
        scale = (127 << 7) | mantissa
        value = torch.arange(scale - (9 << 7), scale + 1).to(torch.int16).view(torch.bfloat16)
        value = torch.cat([value, -value, value[: -2 * len(value) % 63]]).view(-1, 63)
        first = torch.tensor([scale], dtype=torch.int16).view(torch.bfloat16).expand(len(value), 1)
        weights.append(torch.cat([first, value], 1).view(-1))
    weight = torch.cat(weights)
    rounded = Rounded.of(weight, torch.bfloat16)
    assert torch.equal(rounded.values(0, len(weight)), there_and_back(weight, torch.bfloat16))


@given(
    st.lists(
        st.tuples(
            st.sampled_from([torch.float32, torch.bfloat16, torch.int64]), st.lists(st.integers(0, 5), max_size=3)
        ),
        min_size=1,
        max_size=6,
    )
)
@settings(max_examples=25)
def test_files_are_those_that_the_library_reads(tensors: list[tuple[torch.dtype, list[int]]]) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards_module, "SHARD_BYTES", 100)
        folder = Path(name)
        values = {f"t{i}": torch.randint(0, 99, shape).to(dtype) for i, (dtype, shape) in enumerate(tensors)}
        with Shards(folder, [Wanted(n, v.dtype, tuple(v.shape)) for n, v in values.items()]) as shards:
            for key, value in values.items():
                shards.write(key, value.reshape(-1).split(3))
        read: dict[str, torch.Tensor] = {}
        for file in folder.glob("*.safetensors"):
            read |= load_file(file)
            assert safe_open(file, framework="pt").metadata() == {"format": "pt"}
        stored = Checkpoint.of_model(name)
        assert stored is not None
        assert read.keys() == values.keys() == stored.keys()
        for key, value in values.items():
            assert torch.equal(read[key], value)
            assert torch.equal(stored[key].read(), value)
        assert shards.sha256.keys() == {file.name for file in folder.glob("*.safetensors")}


def test_a_slow_disk_holds_the_merge_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides the piece being written, at most the bound plus one piece waits."""
    monkeypatch.setattr(shards_module, "WAITING_BYTES", 1000)
    write, taken, most = shards_module._File._write, [0], [0]

    def slowly(self: Any, data: memoryview) -> int:
        time.sleep(0.005)
        taken[0] -= 1
        return write(self, data)

    def pieces_of_100_bytes() -> Iterator[torch.Tensor]:
        for _ in range(60):
            taken[0] += 1
            most[0] = max(most[0], taken[0])
            yield torch.zeros(100, dtype=torch.uint8)

    monkeypatch.setattr(shards_module._File, "_write", slowly)
    with Shards(tmp_path, [Wanted("t", torch.uint8, (6000,))]) as shards:
        shards.write("t", pieces_of_100_bytes())
    assert 5 < most[0] <= 13


def test_a_tensor_may_begin_anywhere_in_its_file(tmp_path: Path) -> None:
    """The format does not require alignment: the library pads headers, other writers may not."""
    header = (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[2],"data_offsets":[1,9]}}'
    )
    data = b"\x07" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    stored = Checkpoint.of_files([tmp_path / "model.safetensors"])
    assert stored["a"].read().tolist() == [7]
    assert stored["b"].read().tolist() == [1.5, -2.0]
    assert stored["b"].read().data_ptr() % 4 == 0


def test_what_is_added_to_a_tensor_in_place_does_not_reach_its_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(5000)}, tmp_path / "a.safetensors")
    stored = Checkpoint.of_files([tmp_path / "a.safetensors"])["a"]
    stored.read().add_(1)
    assert torch.equal(stored.read(), torch.ones(5000))


def test_large_results_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are also flushed during the merge, and torch gets its threads back afterwards."""
    monkeypatch.setattr(shards_module, "SHARD_BYTES", 100_000)
    monkeypatch.setattr(shards_module, "FLUSH_BYTES", 10_000)
    before = torch.get_num_threads()
    merge(str(llama_adapter()), str(tmp_path / "merged"), dtype="fp32")
    assert torch.get_num_threads() == before
    assert len(list((tmp_path / "merged").glob("model-*-of-*.safetensors"))) > 3
    assert [check for check in verify(str(tmp_path / "merged")) if not check.ok] == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In addition to resident memory: at most two of the largest weight and some pieces, with 3 layers and with 12."""

    def narrow(layers: int, **more: int) -> Any:
        return original(layers, **more | {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8})

    original = merge_memory.shape
    monkeypatch.setattr(merge_memory, "shape", narrow)
    grown = []
    for layers in (3, 12):
        folder = tmp_path / str(layers)
        (folder / "out").mkdir(parents=True)
        merge_memory.make(folder, layers)
        source = Source(
            str(folder / "adapter"),
            str(folder / "base"),
            None,
            "4bit",
            torch.bfloat16,
            dequantized=True,
            pad=0,
            tokens=32000,
        )
        before = _reset_high_water()
        Stream(source, torch.bfloat16).run(folder / "out")
        grown.append(merge_memory._high_water() - before)
    largest = 32000 * 1024 * 2
    assert max(grown) < 2 * largest + 100_000_000, grown
    # the smaller model may finish before the writer's queue is full
    assert grown[1] < grown[0] + shards_module.WAITING_BYTES + 30_000_000, grown


def _reset_high_water() -> int:
    """Return the bytes resident now, and reset the kernel's high-water mark to them."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return merge_memory._high_water()


def test_a_killed_merge_leaves_no_folder_and_the_next_one_clears_up(tmp_path: Path, capsys: Any) -> None:
    output = tmp_path / "merged"
    child = os.fork()
    if child == 0:
        written: list[str] = []
        write: Callable[..., None] = Shards.write

        def killed(self: Shards, name: str, pieces: Any) -> None:
            write(self, name, pieces)
            written.append(name)
            if len(written) == 5:
                os.kill(os.getpid(), signal.SIGKILL)

        Shards.write = killed  # type: ignore[method-assign]
        try:
            merge(str(llama_adapter()), str(output))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert not output.exists()
    left = list(tmp_path.iterdir())
    assert len(left) == 1 and left[0].name.startswith(".merged.")
    merge(str(llama_adapter()), str(output), dtype="fp32")
    assert list(tmp_path.iterdir()) == [output]
    assert "left by a process that was killed" in capsys.readouterr().err


def test_a_proof_that_does_not_fit_into_memory_is_read_from_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(reading, "free_memory", lambda: 200_000)
    record = merge(str(llama_adapter()), str(tmp_path / "merged"), dtype="fp32")
    assert record.drift < 1e-4
    assert "layer by layer" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "merged"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "rslora", "gpt2", "roberta", "experts", "sharded"])
def test_on_its_unquantized_base_an_adapter_scores_the_same_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """The reference for `--base original`, if that base does not fit into memory."""
    folder = make_reward_model(tmp_path, **KINDS[kind])
    manifest = Manifest.load(folder)
    whole = RewardModel.load(str(folder), quantization="none")
    expected = scores_of(manifest.golden, whole.score_token_ids)
    monkeypatch.setattr(reading, "free_memory", lambda: 200_000)
    base, pad = manifest.base.name_or_path, manifest.contract.pad_token_id
    found = reading.read_adapter(str(folder), base, None, tmp_path, manifest.golden, pad)
    for scores, right in zip(found.scores, expected, strict=True):
        assert scores == pytest.approx(right, abs=1e-4)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "model"}


def test_merges_on_an_original_base_that_does_not_fit_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(reading, "free_memory", lambda: 200_000)
    record = merge(str(llama_adapter()), str(tmp_path / "merged"), dtype="fp32", base="original")
    assert record.drift > 0.01
    assert capsys.readouterr().err.count("layer by layer") == 2
    assert [check for check in verify(str(tmp_path / "merged")) if not check.ok] == []


class TestInMemoryInstead:
    @pytest.mark.slow
    def test_of_a_base_without_safetensors(self, tmp_path: Path, capsys: Any) -> None:
        def in_pickles(base: str) -> None:
            file = Path(base) / "model.safetensors"
            torch.save(load_file(file), Path(base) / "pytorch_model.bin")
            file.unlink()

        folder = make_reward_model(tmp_path, save_again=in_pickles)
        assert merge(str(folder), str(tmp_path / "merged"), dtype="fp32").drift < 1e-4
        assert "has no safetensors files" in capsys.readouterr().err

    @pytest.mark.slow
    def test_of_a_base_in_8_bit(self, tmp_path: Path, capsys: Any) -> None:
        folder = make_reward_model(tmp_path, quantization="8bit")
        with pytest.raises(UserError, match=r"LLM.int8\(\)"):
            merge(str(folder), str(tmp_path / "merged"), dtype="fp32")
        assert "in 8 bit" in capsys.readouterr().err


@pytest.mark.slow
def test_the_original_base_gives_other_scores_and_the_manifest_expects_them(tmp_path: Path) -> None:
    record = merge(str(llama_adapter()), str(tmp_path / "merged"), dtype="fp32", base="original")
    manifest = Manifest.load(tmp_path / "merged")
    assert record.base == "original"
    assert record.drift > 0.01
    assert manifest.golden == Manifest.load(llama_adapter()).golden
    assert manifest.expected() != manifest.golden
    step = manifest.history[-1]
    assert (step.name, step.settings, step.drift) == ("merge", {"base": "original", "dtype": "fp32"}, record.drift)
    assert [check for check in verify(str(tmp_path / "merged")) if not check.ok] == []
    base = load_file(llama_adapter().parent / "base/model.safetensors")
    merged = load_file(tmp_path / "merged/model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.linalg.matrix_rank(merged[name] - base[name], atol=1e-4) == 8, "nothing but the adapter's rank"


@pytest.mark.slow
def test_other_files_of_the_same_base_will_do(tmp_path: Path, capsys: Any) -> None:
    folder = make_reward_model(tmp_path)
    base = tmp_path / "base/model.safetensors"
    save_file(load_file(base), base, {"format": "pt", "saved": "again"})
    assert merge(str(folder), str(tmp_path / "merged"), dtype="fp32").drift < 1e-4
    assert "its golden scores are given all the same" in capsys.readouterr().err
    checks = {check.name: check for check in verify(str(folder))}
    assert checks["base is the trained one"].ok
    assert "its weights changed" in checks["base is the trained one"].detail
