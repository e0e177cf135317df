"""The commands that score: eval, score, serve."""

import argparse
from collections import Counter
from pathlib import Path

from qlora_rm.commands.common import EVALUATED, Run, load_model
from qlora_rm.config import DataConfig, ScoringConfig, ServeConfig, require
from qlora_rm.console import printable, say, table
from qlora_rm.errors import UserError
from qlora_rm.options import add_options, read_options
from qlora_rm.progress import Phase


def add_eval(command: argparse.ArgumentParser) -> Run:
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
    from qlora_rm.evaluation.agreement import evaluate
    from qlora_rm.output import as_json, writing
    from qlora_rm.preferences import load_comparisons

    with writing(options.output) as file:
        model = load_model(options)
        dataset, report = load_comparisons(data.dataset, data, model.tokenization, model.text)
        say(*report.lines())
        evaluation = evaluate(model, dataset)
        result = as_json({"model": options.model, **evaluation.as_dict(), "data": report.as_dict()})
        file.write(result)
        print(
            result if options.json else printable("\n".join(evaluation.lines()), lines=True),
            end="" if options.json else "\n",
        )


def add_score(command: argparse.ArgumentParser) -> Run:
    command.add_argument("model", metavar="MODEL", help="Folder of an adapter or whole model, or a hub id.")
    rows = command.add_argument_group("Rows of a file")
    rows.add_argument("--input", metavar="FILE", help="JSONL rows to score, also .gz; - is standard input.")
    rows.add_argument(
        "--output", metavar="FILE", default="-", help="JSONL rows with their scores; - is standard output. [-]"
    )
    rows.add_argument(
        "--score_column", metavar="NAME", help="Name of the added column; unset: score, or scores for a list."
    )
    add_options(command, DataConfig, ["hh_turns", "on_bad_row", "max_row_bytes"])
    one = command.add_argument_group("One prompt")
    one.add_argument(
        "--prompt", help="A user's message; text before the responses where the model was trained on text."
    )
    one.add_argument("--responses", nargs="+", metavar="TEXT", help="Responses to rank.")
    one.add_argument("--json", action="store_true", help="Print JSON instead of a table.")
    add_options(command, ScoringConfig)
    return _score


def _score(options: argparse.Namespace) -> None:
    if (options.input is None) == (options.prompt is None):
        raise UserError("Give --input FILE, or --prompt TEXT with --responses TEXT ...: one of the two.")
    of_rows, of_prompt = ("output", "score_column", "on_bad_row", "max_row_bytes"), ("responses", "json")
    for name in of_rows if options.input is None else of_prompt:
        require(
            getattr(options, name) in (None, False, "-", "error", DataConfig.max_row_bytes),
            f"--{name} has no effect with {'--prompt' if options.input is None else '--input'}. Leave it out.",
        )
    if options.prompt is None:
        _score_file(options)
    elif not options.responses:
        raise UserError("--prompt needs --responses TEXT ...")
    else:
        _rank(options)


def _score_file(options: argparse.Namespace) -> None:
    from qlora_rm.evaluation.scored_rows import score_rows
    from qlora_rm.output import json_line, writing
    from qlora_rm.preferences.file_formats import count_rows
    from qlora_rm.preferences.row_input import reading

    limit = read_options(options, DataConfig).max_row_bytes
    rows = count_rows([Path(options.input)], limit) if Path(options.input).is_file() else None
    with reading(options.input, limit) as lines, writing(options.output) as file:
        model, skipped = load_model(options), Counter[str]()
        with Phase("scoring", rows, "rows") as phase:
            for row in score_rows(
                model,
                lines.lines(),
                options.input,
                on_bad_row=options.on_bad_row,
                column=options.score_column,
                hh_turns=options.hh_turns,
                skipped=skipped,
                max_row_bytes=limit,
            ):
                file.write(json_line(row))
                phase.advance()
    count = int(phase.done)
    say(
        f"{count - skipped.total():,} of {count:,} rows scored",
        *(f"skipped {n} x {kind}" for kind, n in skipped.items()),
    )


def _rank(options: argparse.Namespace) -> None:
    from qlora_rm.evaluation.scored_rows import rank
    from qlora_rm.output import as_json

    ranked = rank(load_model(options), options.prompt, options.responses, options.hh_turns)
    if options.json:
        print(
            as_json([{"rank": i, "score": score, "response": text} for i, (score, text) in enumerate(ranked, 1)]),
            end="",
        )
        return
    width = 60
    rows = [(text if len(text) <= width else f"{text[: width - 3]}...", f"{score:.4f}") for score, text in ranked]
    print(*table(("response", "score"), [(printable(" ".join(text.split())), score) for text, score in rows]), sep="\n")


def add_serve(command: argparse.ArgumentParser) -> Run:
    command.add_argument("model", metavar="MODEL", help="Folder of an adapter or whole model, or a hub id.")
    add_options(command, ServeConfig)
    add_options(command, ScoringConfig)
    return _serve


def _serve(options: argparse.Namespace) -> int:
    config, scoring = read_options(options, ServeConfig), read_options(options, ScoringConfig)
    try:
        from qlora_rm.serving.run import serve
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "prometheus_client"):
            raise
        raise UserError(f"Serving needs {error.name}: pip install 'qlora_rm[serve]'.") from error
    return serve(options.model, config, scoring)
