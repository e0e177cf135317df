"""`--push_to_hub`: obstacles are reported before training, and only the finished run is pushed."""

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi, constants

from qlora_rm.errors import UserError
from qlora_rm.training import hub as hub_module
from qlora_rm.training.run import main
from qlora_rm.verification.folder import verify


class Answer(OSError):
    """Return an error with a status, as huggingface_hub raises it."""

    def __init__(self, status: int):
        super().__init__(f"Client error {status}\nwith a second line")
        self.response = SimpleNamespace(status_code=status)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that knows `me`, a member of `ours` and a reader of `theirs`, and copies what is pushed."""
    fake = SimpleNamespace(
        role="write", made=[], branches=[], pushed=[], tokens=[], folder=tmp_path / "hub", fails=None, offline=False
    )

    def whoami(self: HfApi, **_: Any) -> dict:
        fake.tokens.append(self.token)
        if fake.fails and fake.fails[0] == "whoami":
            raise fake.fails[1]
        orgs = [{"name": "ours", "roleInOrg": "write"}, {"name": "theirs", "roleInOrg": "read"}]
        return {"name": "me", "orgs": orgs, "auth": {"accessToken": {"role": fake.role}}}

    class Url(str):
        repo_id = ""

    def create_repo(self: HfApi, repo_id: str, private: bool | None = None, exist_ok: bool = False) -> Url:
        assert exist_ok
        if fake.fails and fake.fails[0] == "create_repo":
            raise fake.fails[1]
        fake.made.append((repo_id, private))
        url = Url(f"https://hub/{repo_id}")
        url.repo_id = repo_id if "/" in repo_id else f"me/{repo_id}"
        return url

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: Path, ignore_patterns: list[str], **more: Any) -> None:
        if fake.fails and fake.fails[0] == "upload_folder":
            raise fake.fails[1]
        kept = huggingface_hub.utils.filter_repo_objects(
            [str(p.relative_to(folder_path)) for p in Path(folder_path).rglob("*") if p.is_file()],
            ignore_patterns=ignore_patterns,
        )
        for name in kept:
            (fake.folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, fake.folder / name)
        fake.pushed.append((repo_id, more["revision"]))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_module, "get_token", lambda: None)
    monkeypatch.setattr(HfApi, "whoami", whoami)
    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "create_branch", lambda self, repo, branch, exist_ok: fake.branches.append(branch))
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return fake


@pytest.fixture
def no_training(monkeypatch):
    def load_model(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("qlora_rm.training.run.load_model", load_model)


def pushing(flags: Any, **more: Any) -> list[str]:
    return flags(push_to_hub=True, max_steps=2, save_steps=1, eval_steps=2, **more)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hub_model_id": "me//x"}, r"--hub_model_id me//x is no name .* OWNER/NAME"),
        ({"hub_model_id": "me/a b"}, r"is no name of a repository"),
        ({"hub_strategy": "every_save"}, r"--hub_strategy every_save: .* Use --hub_strategy end"),
        ({"hub_strategy": "all_checkpoints"}, r"--hub_strategy all_checkpoints"),
        ({"hub_always_push": True}, r"--hub_always_push"),
        ({}, r"needs a token .*`hf auth login`"),
        ({"hub_token": "t", "hub_model_id": "someone/x"}, r"me is not someone .* --hub_model_id me/NAME"),
        ({"hub_token": "t", "hub_model_id": "theirs/x"}, r"me in theirs may only read"),
    ],
)
def test_what_cannot_be_pushed_is_said_before_weights_are_loaded(hub, flags, options, message):
    with pytest.raises(UserError, match=message) as caught:
        main(pushing(flags, **options))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_training")
@pytest.mark.parametrize(
    ("fails", "message"),
    [
        (("whoami", ConnectionError("[Errno -2] Name or service not known\nand more")), "was not reached"),
        (("whoami", Answer(401)), "does not accept the token"),
        (("create_repo", Answer(403)), "may not write there"),
        (("create_repo", Answer(500)), "status 500"),
    ],
)
def test_a_hub_that_does_not_answer_is_one_sentence_with_the_way_out(hub, flags, fails, message):
    hub.fails = fails
    with pytest.raises(UserError, match=rf"--push_to_hub me/x: .*{message}.*hf upload me/x /") as caught:
        main(pushing(flags, hub_token="t", hub_model_id="me/x"))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_training")
def test_a_token_that_may_only_read(hub, flags):
    hub.role = "read"
    with pytest.raises(UserError, match="the token may only read"):
        main(pushing(flags, hub_token="t"))


@pytest.mark.usefixtures("no_training")
def test_offline_is_said_at_once(flags, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set. Unset it, or train without --push_to_hub"):
        main(pushing(flags))


@pytest.mark.slow
def test_what_is_pushed_is_complete_and_nothing_else(hub, flags, tmp_path, capsys):
    main(pushing(flags, hub_token="secret", hub_model_id="ours/rm", hub_private_repo=True, hub_revision="first"))
    assert hub.pushed == [("ours/rm", "first")] and hub.branches == ["first"]
    assert set(hub.made) == {("ours/rm", True)} and set(hub.tokens) == {"secret"}
    names = {path.name for path in hub.folder.rglob("*")}
    assert {"adapter_model.safetensors", "adapter_config.json", "rm_manifest.json", "tokenizer.json"} <= names
    assert not any(name.startswith("checkpoint-") for name in names) and "training_args.bin" not in names
    assert [check.name for check in verify(str(hub.folder)) if not check.ok] == []
    assert "pushed to https://hub/ours/rm" in capsys.readouterr().err
    assert b"secret" not in (tmp_path / "out" / "training_args.bin").read_bytes()


@pytest.mark.slow
def test_a_push_that_fails_keeps_the_run_and_says_how_to_push_it(hub, flags, tmp_path):
    hub.fails = ("upload_folder", ConnectionError("connection reset"))
    out = tmp_path / "out"
    with pytest.raises(UserError) as caught:
        main(pushing(flags, hub_token="t", hub_model_id="me/rm"))
    told = str(caught.value)
    assert f"complete in {out}" in told and "connection reset" in told
    assert f"hf upload me/rm {out} . --exclude 'checkpoint-*'" in told
    assert [check.name for check in verify(str(out)) if not check.ok] == []
    hub.fails = None
    main(pushing(flags, hub_token="t", hub_model_id="me/rm", resume_from_checkpoint="auto"))  # resuming pushes it too
    assert hub.pushed == [("me/rm", None)]


@pytest.mark.slow
def test_nothing_is_asked_of_the_hub_without_the_option(hub, flags):
    main(flags(max_steps=1, save_steps=1, eval_steps=1))
    assert hub.tokens == hub.made == hub.pushed == []


def test_the_command_that_is_named_exists():
    """The installed `hf upload` supports the options that this project passes."""
    help_text = subprocess.run(
        [str(Path(sys.executable).with_name("hf")), "upload", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for word in ("REPO_ID", "LOCAL_PATH", "--exclude", "--revision", "--private"):
        assert word in help_text
