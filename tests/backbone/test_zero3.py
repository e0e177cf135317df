"""A 4-bit backbone under ZeRO-3 on real gloo ranks: memory of each while loading, at rest, and after a forward pass."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import transformers as t
from transformers.integrations import HfDeepSpeedConfig

from qlora_rm.backbone import zero3
from qlora_rm.errors import UserError
from tests.deep import only_deep
from tests.launching import ROOT
from tests.models_for_tests import CAUSAL, save_backbone
from tests.tokenizers_for_tests import small_tokenizer, with_new_pad_token

LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 18,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}
"""232 M weights: 463 MB in 16 bit, 116 MB packed."""

ARCHITECTURES = ("gemma3", "gpt2", "mixtral", "bert", "bart")
HEADS = ("score.", "classifier.", "bert.pooler.", "classification_head.")

MATRIX = 4 * LARGE["hidden_size"] * LARGE["intermediate_size"]
"""Bytes of the largest matrix in fp32, the dtype it is quantized from here: 12 MB; a layer has 51 MB of these."""


def ranks(count: int, out: Path, jobs: list[dict]) -> list[dict[str, dict]]:
    """The reports of `zero3_ranks.py`, one per rank."""
    out.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    done = subprocess.run(
        [*command, "tests/backbone/zero3_ranks.py", json.dumps({"out": str(out), "jobs": jobs})],
        cwd=ROOT,
        # freed memory is returned to the system at once; old pages would count as held otherwise
        env=os.environ
        | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ".", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in range(count)]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    return save_backbone(tmp_path_factory.mktemp("small"), "llama", small_tokenizer())


@pytest.fixture(scope="module")
def without_pad_row(tmp_path_factory) -> str:
    tokenizer = with_new_pad_token()
    return save_backbone(tmp_path_factory.mktemp("grown"), "llama", tokenizer, rows=len(tokenizer) - 1)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """The same random backbone twice, `bf16` in several files and `nf4`; half a gigabyte, deleted after this module."""
    folder = tmp_path_factory.mktemp("large")
    tokenizer = small_tokenizer()
    config = t.LlamaConfig(**LARGE, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    with torch.device("meta"):
        model = t.LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    draw = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02, generator=draw) if parameter.dim() > 1 else parameter.data.fill_(1)
    model.save_pretrained(folder / "bf16", max_shard_size="100MB")
    del model
    how = t.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    packed = t.AutoModelForCausalLM.from_pretrained(folder / "bf16", quantization_config=how, dtype=torch.float32)
    packed.save_pretrained(folder / "nf4")
    for name in ("bf16", "nf4"):
        tokenizer.save_pretrained(folder / name)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=only_deep)])
def test_each_rank_holds_its_share_of_a_large_backbone(large, small, tmp_path, count):
    """While loading from 16 and from 4 bit, at rest, and after a forward pass."""
    jobs = [{"name": "warm-up", "backbone": small, "steps": 1}]  # excludes what the libraries load on first use
    jobs += [{"name": name, "backbone": str(large / name), "steps": 1} for name in ("bf16", "nf4")]
    jobs += [{"name": "hpZ", "backbone": small, "steps": 1, "zero": {"zero_hpz_partition_size": 2}}]
    for reports in ranks(count, tmp_path / "out", jobs):
        assert reports["hpZ"]["trained"] == reports["warm-up"]["trained"]
        assert reports["bf16"]["hash_before"] == reports["nf4"]["hash_before"]
        for name in ("bf16", "nf4"):
            report, frozen = reports[name], reports[name]["frozen"]
            share = frozen["packed_whole"] / count
            assert frozen["packed_whole"] > 115e6
            few = 4 * MATRIX
            assert share + few < frozen["packed_whole"]  # the full model would exceed this bound
            assert frozen["here"] == pytest.approx(frozen["whole"] / count, rel=0.05)
            assert report["hash_after"] == report["hash_before"]
            assert report["load_peak"] < share + frozen["state"] + few, name
            assert report["live_after_forward"] < share + frozen["state"] + 4 * frozen["largest_packed"], name


@pytest.fixture(scope="module")
def three_ranks(small, without_pad_row, tmp_path_factory) -> list[dict[str, dict]]:
    """One launch for all small backbones, on three ranks, which divide few weights evenly."""
    folder, tokenizer = tmp_path_factory.mktemp("three"), small_tokenizer()
    job = {"backbone": small, "steps": 4}
    jobs = [
        {"name": "stock", "stock": True, **job},
        {"name": "sharded", **job},
        {"name": "without mend", "without_mend": True, **job},
        {"name": "offload", "zero": {"offload_param": {"device": "cpu"}}, **job},
        {"name": "stock, grown", "stock": True, **job, "backbone": without_pad_row},
        {"name": "grown", **job, "backbone": without_pad_row},
        {"name": "not quantized", "quantization": "none", **job},
    ]
    for architecture in ARCHITECTURES:
        path = save_backbone(folder / architecture, architecture, tokenizer)
        job = {"backbone": path, "steps": 0, "share_prefix": "true" if architecture in CAUSAL else "auto"}
        jobs += [{"name": f"{architecture}, stock", "stock": True, **job}, {"name": architecture, **job}]
    return ranks(3, folder / "out", jobs)


@pytest.mark.slow
@pytest.mark.long
def test_training_is_bit_identical_to_the_stock_loader(three_ranks):
    for reports in three_ranks:
        stock = reports["stock"]
        assert len(set(stock["losses"])) == 4
        for name in ("sharded", "without mend", "offload"):
            assert reports[name]["hash_before"] == stock["hash_before"], name
            assert reports[name]["losses"] == stock["losses"], name
            assert reports[name]["trained"] == stock["trained"], name
        assert reports["grown"]["trained"] == reports["stock, grown"]["trained"]  # an embedding with a new row


@pytest.mark.slow
@pytest.mark.long
def test_bitsandbytes_still_keeps_every_gathered_weight(three_ranks):
    """If this fails, remove `zero3.free_weights_after_forward`."""
    for reports in three_ranks:
        kept = reports["without mend"]["live_after_forward"] - reports["sharded"]["live_after_forward"]
        # all but the layer that reads the frozen embedding, to which no gradient goes back
        assert 0.8 < kept / reports["sharded"]["frozen"]["packed_whole"] <= 1


@pytest.mark.slow
@pytest.mark.long
def test_an_unquantized_backbone_has_the_seeded_head_and_shares_prompts(three_ranks):
    """transformers shards it itself; if its prompts could not be shared, the job would fail."""
    for reports in three_ranks:
        assert reports["not quantized"]["head"] == reports["stock"]["head"]
        assert reports["not quantized"]["losses"] == pytest.approx(reports["stock"]["losses"], abs=0.3)  # NF4 rounds


@pytest.mark.slow
@pytest.mark.long
def test_every_architecture_is_sharded_and_scores_as_whole(three_ranks):
    """Among them: transposed weights (gpt2), fused experts (mixtral), tied embeddings, heads of several layers (bart).

    A forward and a backward pass without an engine leave nothing gathered.
    """
    for reports in three_ranks:
        for architecture in ARCHITECTURES:
            report = reports[architecture]
            assert report["scores"] == reports[f"{architecture}, stock"]["scores"], architecture
            assert not report["left"], architecture
            assert all(name.startswith(HEADS) for name in report["whole"]), architecture


def test_a_column_is_its_own_column():
    zero3.free_weights_after_forward()
    weight = bnb.nn.Params4bit(torch.zeros(8, 1, dtype=torch.uint8), bnb_quantized=True)
    assert weight.view(-1, 1) is weight
    assert weight.view(2, 4).shape == (2, 4)
    assert weight.view(torch.int8).dtype == torch.int8


def refused(match: str, **options) -> None:
    registered = HfDeepSpeedConfig({"zero_optimization": {"stage": 3, **options}})
    with pytest.raises(UserError, match=match), zero3.sharded_loading([]):
        pass
    del registered  # transformers keeps a weak reference: ZeRO-3 is off from here on


@pytest.mark.parametrize("name", sorted(zero3.KNOWN))
def test_libraries_of_another_version_are_named(monkeypatch, name):
    monkeypatch.setitem(zero3.KNOWN, name, "0.1")
    refused(rf"knows {name} 0\.1, not {name} \d.*constraints\.txt")
