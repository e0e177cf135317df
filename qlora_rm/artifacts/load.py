"""Load a finished reward model, an adapter on its base or a complete model, to score as in training."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from qlora_rm.artifacts.allowed import allowed_drift
from qlora_rm.artifacts.arithmetic import compute_dtype, compute_in_fp32, to_accelerator
from qlora_rm.artifacts.as_written import require_as_written
from qlora_rm.artifacts.folders import artifact_kind
from qlora_rm.artifacts.golden import drift, scores_of
from qlora_rm.artifacts.manifest import FILE_NAME, Manifest
from qlora_rm.artifacts.own_tokenizer import read_tokenizer, require_trained_template, tokenization_of
from qlora_rm.artifacts.trained_text import trained_text
from qlora_rm.artifacts.weights import load_adapter_on_base, load_whole_model
from qlora_rm.backbone.in_force import compute_quantized_layers_in
from qlora_rm.backbone.load import (
    embedding_rows,
)
from qlora_rm.backbone.positions import inner_model, usable_positions
from qlora_rm.backbone.precision import NAMES, Precision
from qlora_rm.backbone.scoring import TOKENS_PER_BATCH, Layout, score_sequences
from qlora_rm.backbone.tokenizer import load_tokenizer
from qlora_rm.config import Quantization, SharePrefix, require
from qlora_rm.console import say
from qlora_rm.errors import UserError
from qlora_rm.preferences.clock import fix_date, now
from qlora_rm.preferences.comparison import Candidates, Message
from qlora_rm.preferences.formats import parse_candidates
from qlora_rm.preferences.row_errors import RowFault
from qlora_rm.preferences.text_as import TrainedText
from qlora_rm.preferences.tokenization import Tokenization

Prompt = str | Sequence[Message]
"""A user's message, or the conversation so far as role/content turns."""


@dataclass
class RewardModel:
    """A reward model that scores text as it was trained to.

    Attributes:
        model: one label; a base with an adapter, or a complete model.
        tokenization: by the manifest's contract.
        manifest: None for a reward model that was not written by this project.
        autocast: dtype of the arithmetic, None for fp32.
        tokens_per_batch: upper bound of a batch's padded size.
    """

    model: nn.Module
    tokenization: Tokenization
    manifest: Manifest | None
    autocast: torch.dtype | None
    tokens_per_batch: int = TOKENS_PER_BATCH

    def __post_init__(self) -> None:
        """Treat tokens without an embedding and sequences beyond the positions as faults of their row."""
        self.tokenization.vocabulary = embedding_rows(inner_model(self.model))
        self.tokenization.positions = usable_positions(self.model)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        base: str | None = None,
        quantization: Quantization | None = None,
        precision: Precision = "auto",
        tokens_per_batch: int = TOKENS_PER_BATCH,
        share_prefix: SharePrefix = "auto",
        trust_remote_code: bool = False,
        skip_checks: bool = False,
        compare: bool = True,
    ) -> Self:
        """Load an adapter folder, a merged or fully fine-tuned folder, or a reward model from the hub.

        A folder with a manifest is compared with it first (`as_written`). An adapter on a changed base must give its
        golden scores.

        Arguments:
            base: the adapter's base, if it is not where the manifest says.
            quantization: of the base or model. Default: as trained.
            precision: of the arithmetic; "auto" as trained, but fp32 on a CPU without 16-bit units.
            skip_checks: compare nothing, and log a warning.
            compare: False for a caller that makes the comparison itself.

        Raises:
            UserError: there is no reward model, a part of it is missing, or it differs from its manifest.
        """
        folder = str(folder)
        kind = artifact_kind(folder)
        known = kind == "adapter" or (Path(folder) / FILE_NAME).exists()
        manifest = Manifest.load(folder) if known else None
        compare = compare and not skip_checks
        if skip_checks:
            say(f"warning: {folder} is not compared with its manifest (--skip_checks): other files give other scores")
        elif manifest is not None and compare:
            require_as_written(folder, manifest, "To score it all the same, pass --skip_checks.")
        tokenizer = (
            read_tokenizer(folder, trust_remote_code)
            if known
            else load_tokenizer(folder, trust_remote_code=trust_remote_code)
        )
        compute = compute_dtype(manifest, precision)
        if manifest is None:
            say(f"{folder} has no {FILE_NAME}: text becomes tokens by this project's rules, without a limit of length")
            if date := fix_date(tokenizer, now()):
                say(f"its chat template reads the clock: this process renders {date}")
            tokenization = Tokenization(tokenizer)
        else:
            tokenization = tokenization_of(manifest, tokenizer)
            if compare:
                require_trained_template(folder, manifest, tokenizer)
        if kind == "adapter":
            assert manifest is not None
            model = load_adapter_on_base(
                folder, manifest, tokenizer, base, quantization, share_prefix, trust_remote_code
            )
        else:
            require(not base, f"--base has no effect: {folder} is a whole model, which has no base. Leave it out.")
            model = load_whole_model(
                folder, manifest, tokenizer, compute, quantization, share_prefix, trust_remote_code
            )
        if compute is torch.float32:
            compute_in_fp32(model)
        else:
            compute_quantized_layers_in(model, compute)
        model.requires_grad_(False)
        autocast = None if compute is torch.float32 else compute
        loaded = cls(to_accelerator(model).eval(), tokenization, manifest, autocast, tokens_per_batch)
        if kind == "adapter" and compare:
            loaded._require_trained_base(folder, base)
        return loaded

    def _require_trained_base(self, folder: str, base: str | None) -> None:
        """If the adapter's base has changed, let the golden scores decide whether it may be used."""
        manifest = self.manifest
        assert manifest is not None
        changes = " and ".join(manifest.base.changes(base))
        if not changes:
            return
        where = f"{changes} of the base of {folder} changed since training"
        if not manifest.golden:
            say(f"warning: {where}, and without golden scores nothing shows whether its scores do")
            return
        items, allowed = manifest.expected(), allowed_drift(manifest, self.computes_in)
        moved = drift(items, scores_of(items, self.score_token_ids), allowed)
        if not moved.ok:
            raise UserError(
                f"{where}, and the golden scores with it ({moved}; allowed {allowed}). Pass --base with the base it was "
                "trained on. To score all the same, pass --skip_checks."
            )

    @cached_property
    def text(self) -> TrainedText:
        """How the model reads prompts and responses."""
        return trained_text(self.manifest, self.tokenization)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.tokenization.tokenizer

    @property
    def computes_in(self) -> str:
        """Name of the dtype of the arithmetic."""
        return NAMES[self.autocast or torch.float32]

    def score_token_ids(self, sequences: Sequence[list[int]], layout: Layout | None = None) -> Tensor:
        """Scores of S token sequences, float32 [S] on the CPU."""
        return score_sequences(
            self.model,
            sequences,
            pad_token_id=self.tokenizer.pad_token_id,
            autocast=self.autocast,
            tokens_per_batch=self.tokens_per_batch,
            layout=layout,
        )

    def score_or_fault(self, candidates: Sequence[Candidates]) -> list[list[float] | RowFault]:
        """Each prompt's scores of its responses, or the fault that prevents tokenizing them."""
        results = self.tokenization.tokenize_each(candidates)
        sequences = [ids for r in results if not isinstance(r, RowFault) for ids in r.tokens.sequences]
        scores = iter(self.score_token_ids(sequences).tolist())
        return [r if isinstance(r, RowFault) else [next(scores) for _ in r.tokens.response_ids] for r in results]

    def score_candidates(self, candidates: Sequence[Candidates]) -> list[list[float]]:
        """Score each prompt's responses.

        Raises:
            UserError: a prompt cannot be tokenized; the message gives its place in the list, counting from 1.
        """
        scores: list[list[float]] = []
        for place, result in enumerate(self.score_or_fault(candidates), start=1):
            if isinstance(result, RowFault):
                raise result.at(f"prompt {place}")
            scores.append(result)
        return scores

    def score(self, prompt: Prompt, responses: Sequence[str]) -> list[float]:
        """Score the responses to one prompt. The better response has the higher score.

        Arguments:
            prompt: text or turns. Text becomes a user's turn where the model was trained on turns.
            responses: N texts.

        Returns: N scores in log-odds: sigmoid(a - b) is the probability that a is preferred to b (Bradley-Terry).

        Raises:
            UserError: a response is empty, or is longer than the model's sequences.

        Example:
            >>> from qlora_rm import RewardModel
            >>> model = RewardModel.load("runs/demo/merged")
            >>> kind, rude = model.score("What do bees do in winter?", ["They live on honey.", "What a stupid question."])
        """
        return self.score_batch([(prompt, responses)])[0]

    def score_batch(self, items: Sequence[tuple[Prompt, Sequence[str]]]) -> list[list[float]]:
        """Score the responses to several prompts together; a shared prompt is computed once.

        Arguments:
            items: P pairs of a prompt and its responses, each as in `score`.

        Returns: P lists with one score for each response, in log-odds.

        Raises:
            UserError: as in `score`; the message names the prompt by its place, counting from 1.

        Example:
            >>> from qlora_rm import RewardModel
            >>> model = RewardModel.load("runs/demo/merged")
            >>> scores = model.score_batch([("Hello", ["Hello to you.", "Go away."]), ("Thank you", ["My pleasure."])])
        """
        return self.score_candidates([self._read(place, *item) for place, item in enumerate(items, start=1)])

    def _read(self, place: int, prompt: Prompt, responses: Sequence[str]) -> Candidates:
        row = {"prompt": prompt if isinstance(prompt, str) else list(prompt), "responses": list(responses)}
        try:
            return parse_candidates(row, False, self.text)
        except RowFault as fault:
            raise fault.at(f"prompt {place}") from fault
