"""Problems reported before weights are loaded: settings that spoil the weights, a disk that is too small."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

from qlora_rm.backbone.load import read_model_config
from qlora_rm.errors import UserError
from qlora_rm.training.arguments import _require_own_card, parse
from qlora_rm.training.checkpoints import begin, mark_whole
from qlora_rm.training.disk import SMALL_FILES, DiskNeed, checkpoint_bytes, checkpoints_made, trained_weights
from qlora_rm.training.engine_settings import loaded_in, stored_as, unsound_settings
from qlora_rm.training.preflight import Report, _planned_as, _raise_first, _require_alike, _second_copies
from qlora_rm.training.run import main

ROOT = Path(__file__).resolve().parents[2]
TWINS = sorted((ROOT / "ds_configs").glob("*.json"))
SOUND = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())


def zero(**settings):
    return SOUND | {"zero_optimization": SOUND["zero_optimization"] | settings}


def unsound(flags, engine, *, bf16=False, changes=None, **run):
    args = parse(flags(**changes or {})).training
    args.bf16 = bf16  # a CPU's own arguments refuse it
    usual = {"quantization": "4bit", "storage": "uint8", "adapter": True, "ranks": 16, "ranks_here": 8}
    return unsound_settings(engine, args=args, **usual | run)


@pytest.mark.parametrize("twin", TWINS, ids=lambda path: path.stem)
def test_the_projects_own_settings_are_sound(flags, twin):
    assert unsound(flags, json.loads(twin.read_text())) == []
    assert unsound(flags, json.loads(twin.read_text()), quantization="none", adapter=False) == []


@pytest.mark.parametrize(
    ("engine", "named"),
    [
        (zero(zero_quantized_weights=True), "zero_quantized_weights"),
        (zero(zero_quantized_nontrainable_weights=True), "zero_quantized_nontrainable_weights"),
        (zero(stage3_use_all_reduce_for_fetch_params=True), "stage3_use_all_reduce_for_fetch_params"),
        (zero(offload_param={"device": "nvme", "nvme_path": "/scratch"}), "nvme"),
        (SOUND | {"bf16": {"enabled": True}}, "bf16.enabled"),
        (SOUND | {"fp16": {"enabled": True}}, "fp16.enabled"),
        (SOUND | {"gradient_clipping": 0.5}, "--max_grad_norm 1.0"),
        (SOUND | {"scheduler": {"type": "WarmupLR"}}, "--lr_scheduler_type"),
        ({name: value for name, value in SOUND.items() if name != "gradient_clipping"}, '"auto"'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_that_spoils_weights_is_named_with_the_way_out(flags, engine, named):
    (told,) = unsound(flags, engine)
    assert named in told and ":" in told


def test_the_engines_own_optimizer_takes_the_place_of_the_default_one_alone(flags):
    own = SOUND | {"optimizer": {"type": "AdamW"}}
    assert unsound(flags, own) == []
    (told,) = unsound(flags, own, changes={"optim": "sgd"})
    assert "--optim sgd" in told


def test_settings_are_refused_only_where_they_do_harm(flags):
    all_of_them = zero(zero_quantized_weights=True, offload_param={"device": "nvme"}) | {"bf16": {"enabled": "auto"}}
    assert unsound(flags, all_of_them, quantization="none") == []
    assert unsound(flags, all_of_them | {"bf16": {"enabled": True}}, quantization="none", adapter=False) == []
    assert len(unsound(flags, all_of_them, bf16=True)) == 3, "auto is what the trainer computes in"
    assert unsound(flags, SOUND | {"gradient_clipping": 0.5}, changes={"max_grad_norm": 0.5}) == []
    assert unsound(flags, zero(offload_param={"device": "cpu"}, zero_hpz_partition_size=8)) == []


def test_a_whole_model_under_zero3_needs_its_weights_gathered_to_be_saved(flags):
    """Otherwise transformers writes an engine checkpoint instead of the model, and the run ends without an error."""
    for value in (False, "auto"):
        whole = zero(stage3_gather_16bit_weights_on_model_save=value)
        (told,) = unsound(flags, whole, quantization="none", adapter=False)
        assert "stage3_gather_16bit_weights_on_model_save" in told and "set it to true" in told
        assert unsound(flags, whole) == [], "an adapter is gathered whatever it says"
        assert unsound(flags, {**whole, "zero_optimization": {"stage": 2}}, quantization="none", adapter=False) == []


@pytest.mark.parametrize(
    ("hpz", "ranks", "ranks_here", "sound"),
    [
        (8, 16, 8, True),
        (8, 12, 4, False),  # DeepSpeed stops: 8 does not divide 12
        (8, 8, 4, False),  # over two machines
        (4, 12, 4, True),
        (4, 16, 8, True),  # two copies per machine
        (8, 12, 8, True),
        (8, 4, 4, True),  # one machine: DeepSpeed uses its four ranks
        (3, 4, 4, False),
        (1, 6, 3, True),
        (0, 6, 3, True),
    ],
)
def test_a_second_copy_of_the_shards_stays_within_a_machine(flags, hpz, ranks, ranks_here, sound):
    """Each machine checks itself: with 8 and 4 processes on two machines, only the second reports a problem."""
    told = unsound(flags, zero(zero_hpz_partition_size=hpz), ranks=ranks, ranks_here=ranks_here)
    assert sound == (told == [])
    assert sound or f"set it to {ranks_here}" in told[0]


def test_8_bit_weights_are_not_taken_for_sharded(flags):
    (told,) = unsound(flags, SOUND, quantization="8bit")
    assert "8-bit" in told and "use --quantization 4bit" in told
    assert unsound(flags, {**SOUND, "zero_optimization": {"stage": 2}}, quantization="8bit") == []
    saved = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    assert loaded_in(LlamaConfig(quantization_config=saved), "4bit") == "8bit", "a checkpoint comes as it was saved"
    assert loaded_in(LlamaConfig(), "4bit") == "4bit"


def test_packed_bytes_stored_in_another_dtype_are_refused(flags):
    saved = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_storage": "float16"}
    assert stored_as(LlamaConfig()) == "uint8"
    assert stored_as(LlamaConfig(quantization_config=saved)) == "float16"
    assert "float16" in unsound(flags, SOUND, storage="float16")[0]


def test_a_launch_is_planned_by_where_its_shards_and_their_copies_lie():
    def launched(on, **settings):
        plugin = SimpleNamespace(deepspeed_config=zero(**settings))
        return SimpleNamespace(device=torch.device(on), deepspeed_plugin=plugin, world_size=4)

    offloaded = {"offload_param": {"device": "cpu"}}
    assert _planned_as("zero3", launched("cuda", **offloaded)) == "zero3_offload"
    assert _planned_as("zero3", launched("cpu", **offloaded)) == "zero3", "that is the memory it computes in"
    assert _planned_as("zero3", launched("cuda")) == "zero3"
    assert [_second_copies("zero3", launched("cuda", zero_hpz_partition_size=n)) for n in (0, 1, 2, 8)] == [1, 1, 2, 4]
    assert _second_copies("zero3", launched("cuda")) == _second_copies("ddp", launched("cuda")) == 1


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice", [{"lora_r": 256}, {"lora_r": 64, "use_dora": True}, {"quantization": "none", "use_lora": False}], ids=str
)
def test_a_checkpoint_is_as_large_as_counted(flags, tmp_path, choice, backbone_folder):
    words = flags(max_steps=1, save_steps=1, **choice)
    options = parse(words)
    trained = trained_weights(options, read_model_config(backbone_folder))
    main(words)
    counted = checkpoint_bytes(trained, "single")
    assert counted <= size_of(tmp_path / "out/checkpoint-1") <= counted + 300_000
    assert counted > 1_000_000


@pytest.mark.slow
def test_an_adapter_that_is_gone_on_with_is_counted_too(flags, tmp_path, backbone_folder):
    main(flags(max_steps=1))
    new = trained_weights(parse(flags()), read_model_config(backbone_folder))
    known = trained_weights(parse(flags(adapter=str(tmp_path / "out"))), read_model_config(backbone_folder))
    assert known == pytest.approx(new, rel=0.1) and new > 0


def test_deepspeed_saves_masters_too():
    assert checkpoint_bytes(10**9, "ddp") == 12e9
    assert checkpoint_bytes(10**9, "zero2") == 20e9
    assert checkpoint_bytes(10**9, "zero3") == 16e9


@pytest.mark.parametrize(
    ("changes", "made"),
    [
        ({"max_steps": 8, "save_steps": 4}, 2),
        ({"max_steps": 9, "save_steps": 4}, 3),
        ({"max_steps": 100, "save_steps": 0.1}, 10),
        ({"max_steps": -1, "num_train_epochs": 2, "save_steps": 10}, 5),
        ({"max_steps": -1, "num_train_epochs": 3, "save_strategy": "epoch", "eval_strategy": "epoch"}, 3),
        ({"save_strategy": "no"}, 0),
    ],
    ids=str,
)
def test_checkpoints_are_counted(flags, changes, made):
    """With 100 comparisons, 4 per step."""
    assert checkpoints_made(parse(flags(**changes)).training, 100) == made


def test_a_disk_that_holds_no_checkpoint_stops_the_run_before_weights_are_loaded(flags, tmp_path, capfd):
    with pytest.raises(
        UserError, match=r"one checkpoint of this run takes at least \d+\.\d+ TB.*choose another folder"
    ):
        main(flags(lora_r=10**9))
    assert "compute dtype" not in capfd.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_will_not_hold_all_that_is_kept_is_warned_of(flags, tmp_path, backbone_folder, capfd):
    config = read_model_config(backbone_folder)
    two, one = (trained_weights(parse(flags(lora_r=rank)), config) for rank in (2, 1))
    a_rank = two - one
    rank = int(shutil.disk_usage(tmp_path).free / (a_rank * 12) / 2)  # one checkpoint takes half of the free space
    options = parse(flags(lora_r=rank, max_steps=8, save_steps=1, save_total_limit=2))
    need = DiskNeed.of(options, config, "single", 72)
    assert need.most > 2.9 * need.checkpoint
    best = parse(flags(lora_r=rank, max_steps=8, save_steps=1, save_total_limit=2, metric_for_best_model="loss"))
    assert DiskNeed.of(best, config, "single", 72).most - need.most == need.checkpoint + SMALL_FILES
    warning = need.require_room(tmp_path)
    assert warning and "lower --save_total_limit" in warning
    one = DiskNeed.of(parse(flags(max_steps=8, save_steps=1)), config, "single", 72)
    assert one.require_room(tmp_path) is None


@pytest.mark.slow
def test_what_was_cut_off_in_a_save_counts_as_room_for_the_next(tmp_path):
    left = tmp_path / "checkpoint-4/optimizer.pt"
    begin(left.parent)
    with left.open("wb") as half:
        half.truncate(1 << 28)
    need = DiskNeed(shutil.disk_usage(tmp_path).free + (1 << 27), 0)
    need.require_room(tmp_path)
    mark_whole(left.parent)
    with pytest.raises(UserError, match="one checkpoint of this run takes"):
        need.require_room(tmp_path)


def report(rank, problem=None, **facts):
    return Report(rank, f"node{rank // 2}", "", problem, {"data": "d", "options": {"seed": "1"}, **facts})


def test_one_ranks_problem_is_every_ranks_with_its_place_unless_all_have_it():
    _raise_first([report(0), report(1)])
    with pytest.raises(UserError, match=r"^rank 1 on node0: no room$"):
        _raise_first([report(0), report(1, "no room"), report(2, "no air")])
    with pytest.raises(UserError, match=r"^no room$"):
        _raise_first([report(0, "no room"), report(1, "no room")])


def test_what_differs_is_named_with_the_ranks():
    _require_alike([report(0), report(1)])
    with pytest.raises(UserError, match="read different data \\(rank 0 on node0 and rank 2 on node1\\)"):
        _require_alike([report(0), report(1), report(2, data="e")])
    with pytest.raises(
        UserError, match=r"rank 0 on node0 has seed 1, rank 1 on node0 has seed 2\. Start every process"
    ):
        _require_alike([report(0), report(1, options={"seed": "2"})])


def test_other_weights_under_the_same_config_are_named():
    base = {"a config.json with sha256": "a", "weights with the fingerprint": "b"}
    with pytest.raises(
        UserError, match=r"rank 1 on node0 has weights with the fingerprint c\. Give every host the same copy"
    ):
        _require_alike([report(0, base=base), report(1, base=base | {"weights with the fingerprint": "c"})])


def test_a_process_without_a_card_of_its_own_is_told_the_way_out():
    _require_own_card(7, 8)
    with pytest.raises(UserError, match=r"sees 1\b.*--gpus-per-task"):
        _require_own_card(1, 1)
