"""A training run from its options to a reward model on disk."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from qlora_rm.artifacts.as_written import require_as_written
from qlora_rm.artifacts.base_hash import hash_of_base
from qlora_rm.artifacts.manifest import FILE_NAME as MANIFEST
from qlora_rm.artifacts.manifest import Base, Manifest, Training, make_contract
from qlora_rm.backbone.adapter import attach_adapter, load_adapter, read_adapter_config
from qlora_rm.backbone.in_force import disable_dropout
from qlora_rm.backbone.inventory import inventory
from qlora_rm.backbone.layouts import score_position
from qlora_rm.backbone.load import load_backbone
from qlora_rm.backbone.precision import NAMES, best_dtype
from qlora_rm.backbone.tokenizer import load_tokenizer
from qlora_rm.backbone.zero3 import sharded_loading
from qlora_rm.config import BackboneConfig, require
from qlora_rm.console import is_main_process, say, say_result
from qlora_rm.errors import Terminated
from qlora_rm.preferences import PreferenceData, Tokenization, load_preferences
from qlora_rm.progress import Phase
from qlora_rm.streams import outliving_readers
from qlora_rm.training.arguments import Options, TrainingConfig, parse
from qlora_rm.training.build_locks import clearing_build_locks
from qlora_rm.training.checkpoints import last_whole, require_free_names, step_of
from qlora_rm.training.clock import fix_training_date
from qlora_rm.training.engine import EngineCheck, quiet_deepspeed
from qlora_rm.training.finish import finish
from qlora_rm.training.hub import Hub
from qlora_rm.training.limits import Limits, fit_max_length, require_positions
from qlora_rm.training.live import Live
from qlora_rm.training.objective import Objective
from qlora_rm.training.output_folder import LOG, prepare, require_apart
from qlora_rm.training.output_lock import OutputLock
from qlora_rm.training.preflight import preflight
from qlora_rm.training.rank_failures import ending_together, leave_process_group
from qlora_rm.training.ranks import exchange
from qlora_rm.training.resume_choice import choose, is_restart
from qlora_rm.training.resume_terms import Terms, finished_steps, planned_steps, reconcile
from qlora_rm.training.sampling import comparisons_kept
from qlora_rm.training.summary import summary
from qlora_rm.training.trainer import PreferenceTrainer
from qlora_rm.training.zero_resharding import take_share


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        folder: of the adapter or model, with its tokenizer and manifest.
        metrics: the last evaluation's (`eval_accuracy`, `eval_loss`, ...); empty without held-out comparisons, and where the
            run had already been complete.
    """

    folder: Path
    metrics: dict[str, float]


def main(argv: list[str], given: Mapping[str, Any] | None = None) -> Outcome:
    """Parse, train, and destroy the process group; if one rank fails, all end.

    Arguments:
        given: options by name, in addition to those of `argv`.
    """
    hub = None
    try:
        with outliving_readers() as streams, ending_together():
            quiet_deepspeed()
            with Phase("starting"), clearing_build_locks():  # ranks connect, and DeepSpeed compiles missing extensions
                options = parse(argv, given)
            streams.log = Path(str(options.training.output_dir)) / LOG
            hub = Hub.of(options.training)
            metrics = run(options)
    finally:
        leave_process_group()
    if hub is not None and is_main_process():  # the others need not wait for it
        hub.push()
    return Outcome(Path(str(options.training.output_dir)), metrics)


def run(options: Options) -> dict[str, float]:
    """Train; where that is interrupted, say how to go on. Return what `train` returns."""
    try:
        return train(options)
    except (KeyboardInterrupt, Terminated) as end:
        whole = last_whole(str(options.training.output_dir))
        hint = (
            f"The last complete checkpoint is {whole}; go on with --resume auto."
            if whole
            else "No checkpoint was saved yet."
        )
        say("", f"{'stopped by SIGTERM' if isinstance(end, Terminated) else 'interrupted'}. {hint}")
        raise


def train(options: Options) -> dict[str, float]:
    """Train, and write to `output_dir` the model, its tokenizer, its manifest with golden scores, and its curves.

    Returns the last evaluation's metrics (empty without held-out comparisons).
    """
    _require_names(options)
    require_apart(options)
    with prepare(options) as lock:
        return _train_in(options, lock)


def _train_in(options: Options, lock: OutputLock) -> dict[str, float]:
    """Train in an output folder that no other run writes to."""
    began, args = time.monotonic(), options.training
    resume, unusable = choose(str(args.output_dir), args.resume_from_checkpoint, args.world_size)
    restart = is_restart(args.resume_from_checkpoint)
    limits = fit_max_length(options)
    every_byte = _hash_of_base(options)
    terms = Terms.of(options, every_byte)
    if resume is not None:
        say(*reconcile(Terms.load(resume), terms, args, resume))
    set_seed(args.seed)

    tokenizer = load_tokenizer(
        options.backbone.tokenizer_name_or_path or str(options.backbone.model_name_or_path),
        revision=options.backbone.model_revision,
        trust_remote_code=args.trust_remote_code,
        chat_template_path=args.chat_template_path,
        eos_token=args.eos_token,
        pad_token=args.pad_token,
        trained_pad=_trained_pad(options, resume),
    )
    vocabulary = max(limits.vocabulary, len(tokenizer)) if limits.vocabulary else None
    fix_training_date(tokenizer, args, resume)
    tokenization = Tokenization(tokenizer, args.max_length, options.data.over_long, vocabulary, limits.positions)
    data = load_preferences(options.data, tokenization, need_eval=args.eval_strategy != "no" or args.eval_on_start)
    say(*data.report.lines())
    _require_same_data(data.fingerprint, resume)
    if options.objective.objective == "plackett_luce" and any(any(margins) for margins in data.train["margins"]):
        say("margins: not read, a Plackett-Luce likelihood has no place for them")
    train_set = _comparisons_with_signal(data.train, options, "training")
    held_out = None if data.held_out is None else _comparisons_with_signal(data.held_out, options, "held-out")
    _require_kept(args, len(train_set))
    if args.resume_from_checkpoint and not restart and (steps := finished_steps(args, len(train_set))):
        say(f"{args.output_dir} is complete: {steps} steps. To train on, raise --num_train_epochs or --max_steps.")
        return {}
    began_at = (step_of(resume) or 0) if resume else 0
    require_free_names(str(args.output_dir), began_at, planned_steps(args, len(train_set)), foreign=restart)

    manifest = _describe(options, tokenization, data, limits, every_byte)
    preflight(options, manifest, train_set, resume)
    _require_same_contract(manifest, resume)

    model = load_model(options, tokenizer, limits, manifest.base)
    require_positions(model, options)
    manifest = replace(manifest, contract=replace(manifest.contract, score_position=score_position(model)))
    say(*inventory(model))
    trainer = _make_trainer(options, model, tokenizer, train_set, held_out)
    trainer.replaces_foreign, trainer.spared, trainer.before_save = restart, set(unusable), lambda: lock.lost
    trainer.checkpoint_files = [manifest.save, replace(terms, accumulation=args.gradient_accumulation_steps).save]
    with trainer.termination.watch(), Live.of(trainer):
        say(f"resuming from {resume}" if resume else f"training on {len(train_set):,} comparisons")
        if resume is not None and terms.is_sharded:
            take_share(resume, trainer.accelerator)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        metrics = finish(trainer, manifest, data, tokenization)
    say_result(*summary(options, metrics, held_out, trainer.state.global_step, time.monotonic() - began))
    return metrics


def load_model(
    options: Options, tokenizer: PreTrainedTokenizerBase, limits: Limits, base: Base | None = None
) -> PreTrainedModel | PeftModel:
    """Load the quantized backbone with its head and a new or given adapter; or the full model, trainable."""
    args = options.training
    best, reason = best_dtype()
    say(f"compute dtype: {reason if args.compute_dtype is best else f'{NAMES[args.compute_dtype]}: as asked for'}")
    backbone = load_backbone(
        options.backbone,
        tokenizer,
        args.compute_dtype,
        seed=args.seed,
        trust_remote_code=args.trust_remote_code,
        full_fine_tuning=not options.adapter.use_lora,
        loading=sharded_loading if is_deepspeed_zero3_enabled() else None,
        rotary_length=limits.rotary_length,
    )
    say(f"score head: {', '.join(backbone.head)} ({'new' if backbone.has_new_head else 'kept from the checkpoint'})")
    if args.disable_dropout:
        # here, before LoRA: TRL does it after, and would also turn off --lora_dropout
        disable_dropout(backbone.model)
        args.disable_dropout = False
    if not options.adapter.use_lora:
        return backbone.model
    set_seed(args.seed)  # the adapter's initial weights must not depend on random numbers drawn while loading
    given = options.adapter.adapter
    model = load_adapter(backbone, given, trainable=True) if given else attach_adapter(backbone, options.adapter)
    if base is not None:  # as in the manifest; PEFT would keep a given adapter's earlier base, or a link
        for config in model.peft_config.values():
            config.base_model_name_or_path, config.revision = base.name_or_path, base.revision
    return model


def _require_names(options: Options) -> None:
    """Refuse missing and conflicting options before anything is loaded."""
    adapter, backbone = options.adapter, options.backbone
    if adapter.adapter:
        _take_from_adapter(adapter.adapter, backbone, adapter.skip_checks)
    require(bool(backbone.model_name_or_path), "No backbone given: pass --model_name_or_path FOLDER_OR_HUB_ID.")
    require(
        not (options.data.group_by_prompt and options.objective.objective == "plackett_luce"),
        "--group_by_prompt makes pairs of several rows one comparison, which is no ranking: use --objective bradley_terry.",
    )
    require(bool(options.data.dataset), "No data given: pass --dataset FILE, FOLDER or HUB_ID.")
    require(
        adapter.use_lora or backbone.quantization == "none",
        "A quantized backbone cannot be fine-tuned whole: pass --quantization none with --no_use_lora, or train an adapter.",
    )


def _take_from_adapter(folder: str, backbone: BackboneConfig, skip_checks: bool) -> None:
    """Use the adapter's base and tokenizer (with its template and pad token), unless others are asked for."""
    base = read_adapter_config(folder).get("base_model_name_or_path")
    backbone.model_name_or_path = backbone.model_name_or_path or base
    if backbone.tokenizer_name_or_path is None and (Path(folder) / "tokenizer_config.json").exists():
        backbone.tokenizer_name_or_path = folder
    if (Path(folder) / MANIFEST).exists():
        manifest = Manifest.load(folder)
        if skip_checks:
            say(f"warning: {folder} is not compared with its manifest (--skip_checks)")
        else:
            require_as_written(folder, manifest, "To train on with it all the same, pass --skip_checks.")
        trained = manifest.quantization
        if trained != backbone.quantization:
            say(
                f"warning: the adapter {folder} was trained on a base in {trained}, this run loads it in {backbone.quantization}"
            )


def _trained_pad(options: Options, resume: Path | None) -> int | None:
    """Return the pad token id of the checkpoint or adapter that training continues, so that its contract is kept."""
    adapter = options.adapter.adapter
    own = adapter if adapter and options.backbone.tokenizer_name_or_path == adapter else None
    for folder in (resume, own):
        if folder is not None and (Path(folder) / MANIFEST).exists():
            return Manifest.load(folder).contract.pad_token_id
    return None


def _require_same_data(fingerprint: str, resume: Path | None) -> None:
    """Require the comparisons that a resumed run began with; otherwise some would be seen twice and others never."""
    began = Manifest.load(resume).training if resume is not None else None
    require(
        began is None or began.data_fingerprint == fingerprint,
        f"The data is not what the checkpoint {resume} was trained on: resume with the same files and data options.",
    )


def _require_same_contract(manifest: Manifest, resume: Path | None) -> None:
    """Require that a resumed run tokenizes text as before: template, pad and end-of-text tokens."""
    if resume is None:
        return
    began, now = Manifest.load(resume).contract, manifest.contract
    if began.trained_on is None:  # an earlier version, which did not record it
        now = replace(now, trained_on=None, text_as=None)
    require(
        replace(began, score_position=now.score_position) == now,  # known only once the model is loaded
        f"The tokenizer is not what the checkpoint {resume} was trained with: resume with the same tokenizer and template.",
    )


def _comparisons_with_signal(rows: Dataset, options: Options, part: str) -> Dataset:
    """If ties are ignored, drop the comparisons that hold nothing else, and print how many."""
    if options.objective.ties != "ignore":
        return rows
    kept = [i for i, wins in enumerate(rows["wins"]) if wins]
    if len(kept) < len(rows):
        say(
            f"{part}: left out {len(rows) - len(kept):,} comparisons of ties alone (--ties half or rao_kupper uses them)"
        )
    require(bool(kept), f"Every {part} comparison is a tie: nothing to tell apart. Use --ties half or rao_kupper.")
    return rows.select(kept)


def _require_kept(args: TrainingConfig, comparisons: int) -> None:
    batch = args.per_device_train_batch_size
    require(
        comparisons_kept(comparisons, batch, args.dataloader_drop_last) > 0,
        f"--dataloader_drop_last leaves nothing of {comparisons} comparisons: they do not fill a micro-batch of {batch}. "
        "Lower --per_device_train_batch_size, or leave --dataloader_drop_last out.",
    )


def _make_trainer(
    options: Options,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train_set: Dataset,
    held_out: Dataset | None,
) -> PreferenceTrainer:
    args = options.training
    # our own loading has applied these; TRL would apply them again
    args.chat_template_path = args.eos_token = args.pad_token = None
    # `main` pushes the finished run; the trainer would push before it is complete, and save the token with its settings
    args.push_to_hub, args.hub_token = False, None
    if held_out is None:
        args.eval_strategy = "no"
    check = EngineCheck(NAMES[args.compute_dtype])
    trainer = PreferenceTrainer(
        model,
        args,
        tokenizer,
        train_set,
        held_out,
        Objective(options.objective, args.center_rewards_coefficient or 0.0),
        callbacks=[check],
    )
    check.trainer = trainer
    return trainer


def _hash_of_base(options: Options) -> str | None:
    """Return the sha256 of every byte of the base under `--verify_base full`, computed by one process per host.

    Raises:
        UserError: two hosts have different copies of the base.
    """
    args, backbone = options.training, options.backbone
    if backbone.verify_base != "full":
        return None
    mine = None
    if args.local_process_index == 0:
        mine = hash_of_base(str(backbone.model_name_or_path), backbone.model_revision)
    found = sorted({sha256 for sha256 in exchange(mine, args.world_size) if sha256 is not None})
    require(
        len(found) < 2, f"The hosts have different copies of the base {backbone.model_name_or_path}. Copy it again."
    )
    require(bool(found), f"--verify_base full: {backbone.model_name_or_path} has no weight files that can be read.")
    return found[0]


def _describe(
    options: Options, tokenization: Tokenization, data: PreferenceData, limits: Limits, every_byte: str | None
) -> Manifest:
    """Return the manifest before training, which lacks score position, steps, golden scores and reward statistics."""
    args, backbone = options.training, options.backbone
    return Manifest(
        contract=make_contract(
            tokenization.tokenizer, tokenization, rotary_length=limits.rotary_length, trained_on=data.trained_on
        ),
        base=replace(Base.of(str(backbone.model_name_or_path), backbone.model_revision), weights_sha256=every_byte),
        quantization=backbone.quantization,
        compute_dtype=NAMES[args.compute_dtype],
        training=Training(
            steps=0,
            objective={**asdict(options.objective), "centring": args.center_rewards_coefficient},
            data_fingerprint=data.fingerprint,
            data_report=data.report.as_dict(),
        ),
    )
