"""Uploads a finished run to the model hub, after checking before any weights are loaded that this can succeed.

transformers' trainer pushes with every checkpoint, and after saving the model. At that time golden scores and manifest
do not exist, and files are still being written. Here the finished folder is pushed once.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from transformers.trainer_utils import HubStrategy

from qlora_rm.artifacts.manifest import FILE_NAME as MANIFEST
from qlora_rm.console import say
from qlora_rm.errors import UserError, first_line
from qlora_rm.training.arguments import TrainingConfig

LEFT_OUT = ["checkpoint-*", "checkpoint-*/**", ".*", "training_args.bin", "train.log"]
"""Files of the output folder that do not belong to the reward model; the saved settings contain local paths."""


@dataclass(frozen=True)
class Hub:
    """Where a run is pushed to.

    Attributes:
        repo: `owner/name`, or a name alone, whose owner is that of the token.
        token: None for the one saved by `hf auth login`, or HF_TOKEN.
        revision: branch; None for the main one.
    """

    folder: Path
    repo: str
    token: str | None
    private: bool | None
    revision: str | None

    @classmethod
    def of(cls, args: TrainingConfig) -> Self | None:
        """Return what `--push_to_hub` and the `--hub_...` options ask for; None if nothing is to be pushed.

        Raises:
            UserError: an option that is not supported here, or a name that the hub does not accept.
        """
        if not args.push_to_hub:
            return None
        if args.hub_strategy != HubStrategy.END or args.hub_always_push:
            option = (
                "--hub_always_push"
                if args.hub_always_push
                else f"--hub_strategy {HubStrategy(args.hub_strategy).value}"
            )
            raise UserError(
                f"{option}: a run is pushed once, when it is complete with its head, golden scores and manifest. Use "
                "--hub_strategy end."
            )
        folder = Path(str(args.output_dir)).expanduser().absolute()
        repo = args.hub_model_id or folder.name
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            raise UserError(
                f"--hub_model_id {repo} is no name of a repository on the hub: {first_line(error)} Pass --hub_model_id "
                "OWNER/NAME."
            ) from error
        return cls(folder, repo, args.hub_token, args.hub_private_repo, args.hub_revision)

    def require_open(self) -> None:
        """Create the repository if there is none, which shows that a push can succeed.

        Raises:
            UserError: no network, no token, or a token without write permission; each with its remedy.
        """
        if constants.HF_HUB_OFFLINE:
            raise UserError(f"--push_to_hub needs the network, and HF_HUB_OFFLINE is set. Unset it, or {self._later()}")
        if (self.token or get_token()) is None:
            raise UserError(
                "--push_to_hub needs a token with write permission: run `hf auth login`, set HF_TOKEN or pass --hub_token; or "
                f"{self._later()}"
            )
        try:
            self._require_right_to_write()
            self._api().create_repo(self.repo, private=self.private, exist_ok=True)
        except UserError:
            raise
        except Exception as error:  # httpx, huggingface_hub and the sockets below them each raise their own
            raise UserError(f"--push_to_hub {self.repo}: {_reason(error)} Mend that, or {self._later()}") from error

    def push(self) -> None:
        """Upload the finished run.

        Raises:
            UserError: the upload failed; the run is complete nevertheless.
        """
        if not (self.folder / MANIFEST).exists():
            return  # the run did not finish
        try:
            url = self._upload()
        except Exception as error:
            raise UserError(
                f"The run is complete in {self.folder}, but was not pushed to {self.repo}: {_reason(error)} Nothing is lost; "
                f"push it later by: {self.command()}"
            ) from error
        say(f"pushed to {url}")

    def command(self) -> str:
        """Return the command line that pushes the finished run."""
        excluded = [word for pattern in LEFT_OUT for word in ("--exclude", pattern)]
        words = ["hf", "upload", self.repo, str(self.folder), ".", *excluded]
        words += ["--revision", self.revision] if self.revision else []
        words += ["--private"] if self.private else []
        return shlex.join(words)

    def _upload(self) -> str:
        api = self._api()
        repo = api.create_repo(self.repo, private=self.private, exist_ok=True)
        if self.revision is not None:
            api.create_branch(repo.repo_id, branch=self.revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo.repo_id,
            folder_path=self.folder,
            revision=self.revision,
            ignore_patterns=LEFT_OUT,
            commit_message="Reward model with its manifest",
        )
        return str(repo)

    def _require_right_to_write(self) -> None:
        me: dict[str, Any] = self._api().whoami()
        owner = self.repo.partition("/")[0] if "/" in self.repo else me["name"]
        roles = {organization["name"]: organization.get("roleInOrg") for organization in me.get("orgs", [])}
        role = (me.get("auth") or {}).get("accessToken", {}).get("role")
        if role == "read" or roles.get(owner) == "read":
            whose = "the token" if role == "read" else f"{me['name']} in {owner}"
            raise UserError(
                f"--push_to_hub {self.repo}: {whose} may only read. Use a token that may write, or {self._later()}"
            )
        if owner != me["name"] and owner not in roles:
            raise UserError(
                f"--push_to_hub {self.repo}: {me['name']} is not {owner} and does not belong to it. Pass --hub_model_id "
                f"{me['name']}/NAME, or {self._later()}"
            )

    def _api(self) -> HfApi:
        return HfApi(token=self.token)

    def _later(self) -> str:
        return f"train without --push_to_hub and push the finished run by: {self.command()}"


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set."
    if status == 401:
        return "the hub does not accept the token."
    if status == 403:
        return "the token may not write there."
    if status is None:
        return f"the hub at {constants.ENDPOINT} was not reached ({type(error).__name__}: {first_line(error)[:200]})."
    return f"the hub answered with status {status} ({first_line(error)[:200]})."
