"""New model folders appear complete or not at all, wherever their name points."""

from pathlib import Path

from qlora_rm.artifacts.folders import new_folder


def test_a_link_to_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "scratch")
    with new_folder(str(tmp_path / "out")) as beside:
        (beside / "file").write_text("whole")
    assert (tmp_path / "scratch/file").read_text() == "whole"
