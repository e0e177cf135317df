"""Damaged, foreign and linked checkpoints: which are used, which are refused and why, and which are removed."""

import json
import os
from pathlib import Path

import pytest

from qlora_rm.errors import UserError
from qlora_rm.training.checkpoints import begin, checkpoints, discard, mark_whole, prune, require_free_names
from qlora_rm.training.resume_choice import choose
from qlora_rm.training.wholeness import fault, notes_sizes_only
from qlora_rm.training.zero_resharding import tag_of
from tests.attacks.conftest import contents_of

CATEGORY = "Checkpoints: folders and files"


def save(output_dir: Path, step: int) -> Path:
    """Write a checkpoint folder of this project, with placeholder contents."""
    folder = output_dir / f"checkpoint-{step}"
    begin(folder)
    for name in ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json", "progress.json"):
        (folder / name).write_text(f"{name} of step {step}", encoding="utf-8")
    (folder / "README.md").write_text("a card", encoding="utf-8")
    mark_whole(folder)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    for step in (4, 8):
        save(tmp_path, step)
    return tmp_path


FLIPPED = b"Adapter_model.safetensors of step 8"
MARKS = {
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "number": b"7",
    "list of sizes": b'{"optimizer.pt": [1]}',
    "true for a size": b'{"optimizer.pt": true}',
    "deep": b"[" * 100_000,
    "not text": b"\xff\xfe\x00",
    "outside": b'{"../checkpoint-4/optimizer.pt": 22}',
    "absolute": b'{"/etc/hostname": 9}',
    "later format": b'{"format": 99, "files": {}}',
    "format, no files": b'{"format": 2}',
    "files, no sizes": b'{"format": 2, "files": {"optimizer.pt": null}}',
    "lists what is not there": b'{"optimizer.pt": 22, "nothing.pt": 1}',
    "name with a zero byte": b'{"optimizer\\u0000.pt": 22}',
}


@pytest.mark.parametrize("mark", MARKS)
def test_a_strange_mark_is_a_reason_and_the_checkpoint_before_is_used(
    out: Path, mark: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (out / "checkpoint-8/COMPLETE").write_bytes(MARKS[mark])
    before = contents_of(out)
    assert choose(str(out), "auto").folder == out / "checkpoint-4"
    assert "warning: not usable: checkpoint-8: " in capsys.readouterr().err
    with pytest.raises(UserError, match=r"checkpoint-8 cannot be used: .*The last usable one is .*checkpoint-4"):
        choose(str(out), str(out / "checkpoint-8"))
    prune(str(out), 1, None, upto=8)
    assert contents_of(out) == before


def test_a_mark_that_is_a_folder_or_a_link_to_nothing(out: Path) -> None:
    mark = out / "checkpoint-8/COMPLETE"
    mark.unlink()
    mark.mkdir()
    assert choose(str(out), "auto").folder == out / "checkpoint-4"
    mark.rmdir()
    mark.symlink_to("nowhere")
    assert choose(str(out), "auto").folder == out / "checkpoint-4"


DAMAGES = {
    "flipped bytes of the same size": (
        lambda f: f.write_bytes(FLIPPED),
        "contents of adapter_model.safetensors have changed",
    ),
    "cut": (lambda f: f.write_bytes(b"Ad"), r"adapter_model.safetensors has 2 bytes, and COMPLETE lists 35"),
    "longer": (lambda f: f.write_bytes(FLIPPED + b"!"), r"has 36 bytes, and COMPLETE lists 35"),
    "gone": (lambda f: f.unlink(), "adapter_model.safetensors is missing"),
    "a folder": (lambda f: (f.unlink(), f.mkdir()), "adapter_model.safetensors is missing"),
    "a link to nothing": (lambda f: (f.unlink(), f.symlink_to("nowhere")), "is missing"),
    "another that loaders prefer": (
        lambda f: f.with_name("model.safetensors").touch(),
        "COMPLETE does not list model.safetensors",
    ),
    "another in a folder": (
        lambda f: ((f.parent / "default").mkdir(), (f.parent / "default/adapter_model.bin").touch()),
        "COMPLETE does not list default/adapter_model.bin",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    out: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    do, reason = DAMAGES[damage]
    do(out / "checkpoint-8/adapter_model.safetensors")
    assert choose(str(out), "auto").folder == out / "checkpoint-4"
    assert "goes on from" in capsys.readouterr().err
    with pytest.raises(UserError, match=reason):
        choose(str(out), str(out / "checkpoint-8"))
    assert (
        choose(str(out), str(out / "checkpoint-4")).folder == out / "checkpoint-4"
    )  # the damaged later one is ignored


def test_files_that_decide_nothing_may_change(out: Path) -> None:
    for name in (
        "README.md",
        "notes.txt",
        "train.log",
        "training_args.bin",
        "zero_to_fp32.py",
        "events.out.tfevents.1",
    ):
        (out / "checkpoint-8" / name).write_text("changed", encoding="utf-8")
    assert choose(str(out), "auto").folder == out / "checkpoint-8"


def test_sizes_alone_are_still_read(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = out / "checkpoint-8"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "COMPLETE"}
    (folder / "COMPLETE").write_text(json.dumps(sizes), encoding="utf-8")
    (folder / "README.md").write_text("another card, longer", encoding="utf-8")
    assert choose(str(out), "auto").folder == folder and notes_sizes_only(folder)
    assert capsys.readouterr().err.count("noted sizes only") == 1
    mark_whole(folder, changed=False)
    assert fault(folder, contents=True) is None


def test_auto_stops_where_nothing_is_usable_and_restart_deletes_nothing(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints of TRL have no COMPLETE file either."""
    for step in (4, 8):
        (out / f"checkpoint-{step}/COMPLETE").unlink()
    (out / "checkpoint-4/progress.json").unlink()
    before = contents_of(out)
    with pytest.raises(UserError) as stopped:
        choose(str(out), "auto")
    assert "checkpoint-4: it was not made by qlora-rm" in str(stopped.value)
    assert "checkpoint-8: its COMPLETE file is missing" in str(stopped.value) and "--resume restart" in str(
        stopped.value
    )
    assert choose(str(out), "restart").folder is None
    said = capsys.readouterr().err
    assert "begins at step 0" in said and "checkpoint-4" in said and "checkpoint-8" in said
    prune(str(out), 1, None, upto=2)
    assert contents_of(out) == before


def test_a_checkpoint_with_flipped_bytes_takes_no_sound_ones_place(out: Path) -> None:
    """Its sizes alone look complete. No sound checkpoint is deleted because of it, and no later save deletes it."""
    (out / "checkpoint-8/adapter_model.safetensors").write_bytes(FLIPPED)
    chosen = choose(str(out), "auto")
    assert chosen == (out / "checkpoint-4", {out / "checkpoint-8"})
    save(out, 9)
    prune(str(out), 2, None, upto=9, spared=chosen.unusable)
    assert [path.name for path in checkpoints(str(out))] == ["checkpoint-4", "checkpoint-8", "checkpoint-9"]
    for step in (4, 9):
        discard(out / f"checkpoint-{step}")
    chosen = choose(str(out), "restart")
    save(out, 12)
    prune(str(out), 1, None, upto=12, spared=chosen.unusable)
    assert [path.name for path in checkpoints(str(out))] == ["checkpoint-8", "checkpoint-12"]


def test_restart_does_not_pass_over_a_usable_checkpoint(out: Path) -> None:
    with pytest.raises(UserError, match="checkpoint-8 is a usable checkpoint"):
        choose(str(out), "restart")


def test_a_kill_in_the_first_save_starts_anew_without_a_question(tmp_path: Path) -> None:
    begin(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4/optimizer.pt").touch()
    (tmp_path / "checkpoint-8").mkdir()
    assert choose(str(tmp_path), "auto").folder is None
    require_free_names(str(tmp_path), 0, 8)
    prune(str(tmp_path), None, None, upto=2)
    assert checkpoints(str(tmp_path)) == []


@pytest.mark.parametrize("what", ["file", "link to a folder", "link to nothing", "folder of another program"])
def test_what_only_has_a_checkpoints_name_is_left_alone(
    out: Path, tmp_path_factory: pytest.TempPathFactory, what: str
) -> None:
    elsewhere = save(tmp_path_factory.mktemp("elsewhere"), 12)
    name = out / "checkpoint-12"
    if what == "file":
        name.write_text("mine", encoding="utf-8")
    elif what == "link to a folder":
        (elsewhere / "optimizer.pt").write_text("cut", encoding="utf-8")
        name.symlink_to(elsewhere)
    elif what == "link to nothing":
        name.symlink_to("nowhere")
    else:
        name.mkdir()
        (name / "optimizer.pt").write_text("mine", encoding="utf-8")
    before, there = contents_of(out), contents_of(elsewhere)
    assert choose(str(out), "auto").folder == out / "checkpoint-8"
    with pytest.raises(UserError, match=r"checkpoint-12 is .*Move it"):
        require_free_names(str(out), 8, 16)
    require_free_names(str(out), 8, 11)  # the run ends before that step
    with pytest.raises(UserError, match="checkpoint-12"):
        discard(name)
    prune(str(out), None, None, upto=16)
    assert contents_of(out) == before and contents_of(elsewhere) == there


def test_a_linked_checkpoint_is_read_and_never_removed(out: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = save(tmp_path_factory.mktemp("elsewhere"), 12)
    (out / "checkpoint-12").symlink_to(elsewhere)
    there = contents_of(elsewhere)
    assert choose(str(out), "auto").folder == out / "checkpoint-12"
    save(out, 16)
    prune(str(out), 1, None, upto=16)
    assert [path.name for path in checkpoints(str(out))] == ["checkpoint-12", "checkpoint-16"]
    assert contents_of(elsewhere) == there


def test_a_removal_follows_no_link_inside(out: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = save(tmp_path_factory.mktemp("elsewhere"), 12)
    there = contents_of(elsewhere)
    (out / "checkpoint-4/linked").symlink_to(elsewhere)
    (out / "checkpoint-4/file").symlink_to(elsewhere / "optimizer.pt")
    discard(out / "checkpoint-4")
    assert not (out / "checkpoint-4").exists() and contents_of(elsewhere) == there


def test_names_that_are_almost_a_checkpoints(out: Path) -> None:
    for name in (
        "checkpoint-012",
        "checkpoint-١٢",
        "checkpoint-",
        "checkpoint--1",
        "checkpoint-12.bak",
        "checkpoint-1e1",
    ):
        (out / name).mkdir()
    assert [path.name for path in checkpoints(str(out))] == ["checkpoint-4", "checkpoint-8"]


@pytest.mark.parametrize("tag", ["../../elsewhere", "/tmp", "global_step8/..", "", "global_step9", "global_step8\0"])
def test_deepspeeds_pointer_stays_inside_the_checkpoint(out: Path, tag: str) -> None:
    (out / "checkpoint-8/global_step8").mkdir()
    (out / "checkpoint-8/latest").write_text("global_step8\n", encoding="utf-8")
    assert tag_of(out / "checkpoint-8") == "global_step8"
    (out / "checkpoint-8/latest").write_text(tag, encoding="utf-8")
    with pytest.raises(UserError, match="latest"):
        tag_of(out / "checkpoint-8")


def test_a_folder_that_cannot_be_read(out: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (out / "checkpoint-8").chmod(0)
    try:
        assert choose(str(out), "auto").folder == out / "checkpoint-4"
    finally:
        (out / "checkpoint-8").chmod(0o755)
