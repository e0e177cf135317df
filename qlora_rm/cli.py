"""The doors: parse, call, print. Libraries are imported by the command that needs them, so that help is instant."""

import argparse
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from qlora_rm import __version__
from qlora_rm.bearer import read_token
from qlora_rm.config import (
    READER_NAMES,
    AdapterConfig,
    BackboneConfig,
    DataConfig,
    ExportConfig,
    ObjectiveConfig,
    PlanConfig,
    ScoringConfig,
    ServeConfig,
)
from qlora_rm.console import quiet_libraries, rank_prefix, say, table
from qlora_rm.errors import Terminated, UserError
from qlora_rm.launchers import torchrun_variables
from qlora_rm.options import add_options, read_options

EVALUATED = ("dataset", "dataset_config", "dataset_split", "columns", "hh_turns", "on_bad_row")
TRAIN_HELP = (
    "The training loop's own options (output_dir, learning_rate, max_steps, per_device_train_batch_size, ...) are those "
    "of TRL's RewardConfig and transformers' TrainingArguments; `qlora-rm train --help_all` prints them all."
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See `{self.prog} --help`.")


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns: 0, or 1 where a check of `verify` failed, 2 for a mistake of the user's, 130 after Ctrl-C, 143 after SIGTERM.
    """
    quiet_libraries()
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["train"] and not {"-h", "--help"} & set(argv):
            return _train(argv[1:])
        options = _parser().parse_args(argv)
        return options.run(options) or 0
    except UserError as error:
        print(f"{rank_prefix()}error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Terminated:
        return 143
    except BrokenPipeError:  # whoever reads our output has seen enough; Python flushes once more on its way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _train(argv: list[str]) -> int:
    os.environ.update(torchrun_variables(os.environ))
    from qlora_rm.training.run import main as train

    train(["--help" if word == "--help_all" else word for word in argv])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="qlora-rm", description="Scalar reward models from human preferences on 4-bit backbones.")
    parser.add_argument("--version", action="version", version=f"qlora-rm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, about, add in (
        ("train", "Train a reward model on preferences.", _add_train),
        ("plan", "Tell what a run needs of memory, what fits on which card, and the line to launch it.", _add_plan),
        ("eval", "Measure how often a reward model agrees with preferences.", _add_eval),
        ("score", "Score the rows of a file, or rank the responses to one prompt.", _add_score),
        ("merge", "Make one stock model of an adapter and its base, and prove its scores.", _add_merge),
        ("export", "Make a folder as a reader of reward models wants it, and prove how it scores there.", _add_export),
        ("verify", "Prove that a model still gives the scores it was trained to give.", _add_verify),
        ("serve", "Score over HTTP, requests that come together in one batch.", _add_serve),
        ("bench", "Measure what computing shared prompts once gains, beside TRL's trainer.", _add_bench),
        ("demo", "Walk the whole road on a small model and made-up preferences.", _add_demo),
    ):
        command = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        command.set_defaults(run=add(command))
    return parser


Run = Callable[[argparse.Namespace], int | None]


def _add_train(command: argparse.ArgumentParser) -> Run:
    command.epilog = TRAIN_HELP
    command.add_argument("--config", metavar="FILE", help="YAML file of options; flags beat it.")
    for config in (DataConfig, BackboneConfig, AdapterConfig, ObjectiveConfig):
        add_options(command, config)
    return lambda options: None


def _add_plan(command: argparse.ArgumentParser) -> Run:
    command.add_argument(
        "model", metavar="MODEL", nargs="?", help="Folder, hub id or config.json of a backbone; no weights are read."
    )
    command.add_argument("--json", action="store_true", help="Print JSON instead of tables; sizes are in bytes.")
    add_options(command, PlanConfig)
    add_options(command, BackboneConfig, ["model_revision", "quantization", "attn_implementation", "share_prefix"])
    add_options(command, AdapterConfig, ["lora_r", "lora_target_modules", "lora_layers", "use_dora"])
    add_options(command, DataConfig, ["over_long", *EVALUATED])
    return _plan


def _plan(options: argparse.Namespace) -> None:
    asked = read_options(options, PlanConfig)
    from qlora_rm.plan.report import make_plan
    from qlora_rm.report.files import as_json

    plan = make_plan(
        options.model,
        asked,
        read_options(options, BackboneConfig),
        read_options(options, AdapterConfig),
        read_options(options, DataConfig),
    )
    print(as_json(plan.as_dict()) if options.json else "\n".join(plan.lines()), end="" if options.json else "\n")


def _add_eval(command: argparse.ArgumentParser) -> Run:
    command.add_argument("model", metavar="MODEL", help="Folder of an adapter or whole model, or a hub id.")
    command.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    command.add_argument("--output", metavar="FILE", help="Write the JSON to this file as well.")
    add_options(command, DataConfig, EVALUATED)
    add_options(command, ScoringConfig)
    return _eval


def _eval(options: argparse.Namespace) -> None:
    data = read_options(options, DataConfig)
    if not data.dataset:
        raise UserError("No data given: pass --dataset FILE, FOLDER or HUB_ID.")
    from qlora_rm.preferences import load_comparisons
    from qlora_rm.report.evaluate import evaluate
    from qlora_rm.report.files import as_json, writing

    with writing(options.output) as file:
        model = _load(options)
        dataset, report = load_comparisons(data.dataset, data, model.tokenization)
        say(*report.lines())
        evaluation = evaluate(model, dataset)
        result = as_json({"model": options.model, **evaluation.as_dict(), "data": report.as_dict()})
        file.write(result)
        print(result if options.json else "\n".join(evaluation.lines()), end="" if options.json else "\n")


def _add_score(command: argparse.ArgumentParser) -> Run:
    command.add_argument("model", metavar="MODEL", help="Folder of an adapter or whole model, or a hub id.")
    rows = command.add_argument_group("Rows of a file")
    rows.add_argument("--input", metavar="FILE", help="JSONL rows to score; - is standard input.")
    rows.add_argument(
        "--output", metavar="FILE", default="-", help="JSONL rows with their scores; - is standard output. [-]"
    )
    rows.add_argument(
        "--score_column", metavar="NAME", help="Name of the added column; unset: score, or scores for a list."
    )
    add_options(command, DataConfig, ["on_bad_row"])
    one = command.add_argument_group("One prompt")
    one.add_argument(
        "--prompt", help="A user's message; text before the responses where the model has no chat template."
    )
    one.add_argument("--responses", nargs="+", metavar="TEXT", help="Responses to rank.")
    one.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    add_options(command, ScoringConfig)
    return _score


def _score(options: argparse.Namespace) -> None:
    if (options.input is None) == (options.prompt is None):
        raise UserError("Give --input FILE, or --prompt TEXT with --responses TEXT ...: one of the two.")
    if options.prompt is None:
        _score_file(options)
    elif not options.responses:
        raise UserError("--prompt needs --responses TEXT ...")
    else:
        _rank(options)


def _score_file(options: argparse.Namespace) -> None:
    from qlora_rm.report.files import json_line, reading, writing
    from qlora_rm.report.scored_rows import score_rows

    with reading(options.input) as lines, writing(options.output) as file:
        model, skipped, count = _load(options), Counter[str](), 0
        for row in score_rows(
            model, lines, options.input, on_bad_row=options.on_bad_row, column=options.score_column, skipped=skipped
        ):
            file.write(json_line(row))
            count += 1
    say(
        f"{count - skipped.total():,} of {count:,} rows scored",
        *(f"skipped {n} x {kind}" for kind, n in skipped.items()),
    )


def _rank(options: argparse.Namespace) -> None:
    from qlora_rm.report.files import as_json
    from qlora_rm.report.scored_rows import rank

    ranked = rank(_load(options), options.prompt, options.responses)
    if options.json:
        print(
            as_json([{"rank": i, "score": score, "response": text} for i, (score, text) in enumerate(ranked, 1)]),
            end="",
        )
        return
    width = 60
    rows = [(text if len(text) <= width else f"{text[: width - 3]}...", f"{score:.4f}") for score, text in ranked]
    print(*table(("response", "score"), [(" ".join(text.split()), score) for text, score in rows]), sep="\n")


def _add_merge(command: argparse.ArgumentParser) -> Run:
    command.add_argument("adapter", metavar="ADAPTER", help="Folder of an adapter that qlora-rm trained.")
    command.add_argument(
        "--output", metavar="DIR", required=True, help="Folder to write; it must not exist, or be empty."
    )
    command.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="Dtype of the weights. [bf16]")
    command.add_argument(
        "--base",
        choices=("dequantized", "original", "both"),
        default="dequantized",
        help="Add the adapter to the base as training's quantization left it, which keeps the scores; to the base as it "
        "was before; or try both on --dataset and keep the better. [dequantized]",
    )
    command.add_argument(
        "--base_model", metavar="FOLDER_OR_HUB_ID", help="Another place of the base than the manifest names."
    )
    command.add_argument("--json", action="store_true", help="Print JSON instead of a sentence.")
    add_options(command, ScoringConfig, ["trust_remote_code"])
    add_options(command, DataConfig, EVALUATED)
    return _merge


def _merge(options: argparse.Namespace) -> None:
    from qlora_rm.artifacts.merge import merge
    from qlora_rm.report.files import as_json

    settings = {name: getattr(options, name) for name in ("dtype", "base_model", "trust_remote_code")}
    if options.base == "both":
        _merge_both(options, settings)
        return
    if options.dataset:
        raise UserError("--dataset is what --base both measures on; pass both of them or neither.")
    merged = merge(options.adapter, options.output, base=options.base, **settings)
    print(
        as_json(asdict(merged))
        if options.json
        else f"{options.output}: {merged.method} to {merged.dtype}; scores differ from the golden ones by {merged.drift:.2g} at most\n",
        end="",
    )


def _merge_both(options: argparse.Namespace, settings: dict[str, Any]) -> None:
    data = read_options(options, DataConfig)
    if not data.dataset:
        raise UserError("--base both measures on held-out pairs: pass --dataset FILE, FOLDER or HUB_ID.")
    from qlora_rm.report.files import as_json
    from qlora_rm.report.merge_bases import merge_better

    choice = merge_better(options.adapter, options.output, data, **settings)
    print(as_json(choice.as_dict()) if options.json else "\n".join(choice.lines()) + "\n", end="")


def _add_export(command: argparse.ArgumentParser) -> Run:
    command.add_argument(
        "model", metavar="DIR", help="Folder of a whole model that qlora-rm wrote; of an adapter, for peft."
    )
    command.add_argument(
        "--for",
        dest="readers",
        nargs="+",
        required=True,
        metavar="NAME",
        help=f"Readers that this one folder is for: {', '.join(READER_NAMES)}.",
    )
    command.add_argument(
        "--output", metavar="DIR", required=True, help="Folder to write; it must not exist, or be empty."
    )
    command.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    add_options(command, ExportConfig)
    add_options(command, ScoringConfig, ["base", "trust_remote_code"])
    return _export


def _export(options: argparse.Namespace) -> int:
    from qlora_rm.artifacts.exporting.export import export
    from qlora_rm.report.files import as_json

    exported = export(
        options.model,
        options.readers,
        options.output,
        read_options(options, ExportConfig),
        base=options.base,
        trust_remote_code=options.trust_remote_code,
    )
    if options.json:
        print(as_json(exported.as_dict()), end="")
        return 0 if exported.ok else 1
    print(*_lines(exported.checks), sep="\n")
    print(*(f"note: {note}" for note in exported.notes), sep="\n")
    print(*(f"not checked: {what}" for what in exported.unchecked), sep="\n")
    failed = sum(not check.ok for check in exported.checks)
    readers = ", ".join(exported.readers)
    print(
        f"{options.output} was not written: {failed} of {len(exported.checks)} checks failed for {readers}"
        if failed
        else f"{options.output}: for {readers}; all {len(exported.checks)} checks hold"
    )
    return 1 if failed else 0


def _lines(checks: list[Any]) -> list[str]:
    """Checks as lines of a table."""
    width = max(len(check.name) for check in checks)
    return [f"{'ok  ' if c.ok else 'FAIL'}  {c.name.ljust(width)}  {c.detail}".rstrip() for c in checks]


def _add_verify(command: argparse.ArgumentParser) -> Run:
    command.add_argument("model", metavar="DIR", help="Folder of an adapter or whole model that qlora-rm wrote.")
    command.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    add_options(command, ScoringConfig, ["base", "trust_remote_code"])
    server = command.add_argument_group("A running server instead of the folder's weights")
    server.add_argument("--url", help="Where it is; DIR holds the manifest and the tokenizer of the model it serves.")
    server.add_argument(
        "--protocol",
        choices=("auto", "score", "get_reward", "classify"),
        default="auto",
        help="score is this project's, get_reward OpenRLHF's, classify vLLM's; auto: by the path of the URL, or by asking. [auto]",
    )
    add_options(command, ServeConfig, ["token_file"])
    return _verify


def _verify(options: argparse.Namespace) -> int:
    from qlora_rm.artifacts.verify import verify
    from qlora_rm.report.files import as_json

    if options.url:
        checks = _verify_endpoint(options)
    else:
        checks = verify(options.model, base=options.base, trust_remote_code=options.trust_remote_code)
    failed = sum(not check.ok for check in checks)
    if options.json:
        print(as_json({"ok": failed == 0, "checks": [asdict(check) for check in checks]}), end="")
    else:
        print(*_lines(checks), sep="\n")
        print(
            f"{options.url or options.model}: "
            + (f"{failed} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks hold")
        )
    return 1 if failed else 0


def _verify_endpoint(options: argparse.Namespace) -> Any:
    from qlora_rm.artifacts.verify_endpoint import verify_endpoint

    return verify_endpoint(
        options.model,
        options.url,
        protocol=None if options.protocol == "auto" else options.protocol,
        token=read_token(options.token_file),
        trust_remote_code=options.trust_remote_code,
    )


def _add_serve(command: argparse.ArgumentParser) -> Run:
    command.add_argument("model", metavar="MODEL", help="Folder of an adapter or whole model, or a hub id.")
    add_options(command, ServeConfig)
    add_options(command, ScoringConfig)
    return _serve


def _serve(options: argparse.Namespace) -> int:
    config, scoring = read_options(options, ServeConfig), read_options(options, ScoringConfig)
    try:
        from qlora_rm.serve.run import serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "prometheus_client"):
            raise
        raise UserError(f"Serving needs {error.name}: pip install 'qlora_rm[serve]'.") from error
    return serve(options.model, config, scoring)


def _add_demo(command: argparse.ArgumentParser) -> Run:
    command.add_argument("--only-make", action="store_true", help="Stop once the backbone and the data are made.")
    return _demo


def _demo(options: argparse.Namespace) -> None:
    from qlora_rm.demo.walk import demo

    demo(only_make=options.only_make)


def _add_bench(command: argparse.ArgumentParser) -> Run:
    command.add_argument(
        "names", nargs="*", metavar="NAME", help="hh, finegrained, oasst, zh, short, sweep; unset: all."
    )
    return _bench


def _bench(options: argparse.Namespace) -> int:
    if not Path("benchmarks/prefix_sharing.py").exists():
        raise UserError("The benchmarks stand in benchmarks/: start this in the root of a checkout of the project.")
    return subprocess.run([sys.executable, "-m", "benchmarks.prefix_sharing", *options.names]).returncode


def _load(options: argparse.Namespace) -> Any:
    """The `RewardModel` of the positional MODEL under the scoring options."""
    from qlora_rm.artifacts.load import RewardModel

    return RewardModel.load(options.model, **asdict(read_options(options, ScoringConfig)))


if __name__ == "__main__":
    sys.exit(main())
