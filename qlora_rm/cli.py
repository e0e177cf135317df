"""The `qlora-rm` command line: its commands and their exit statuses."""

import argparse
import difflib
import os
import sys
from collections import deque
from contextlib import suppress
from typing import Any, NoReturn

from qlora_rm import __version__
from qlora_rm.commands.artifacts import add_export, add_merge, add_sign, add_verify
from qlora_rm.commands.scoring import add_eval, add_score, add_serve
from qlora_rm.commands.training import add_bench, add_demo, add_plan, add_recipes, add_train
from qlora_rm.config import OutputConfig
from qlora_rm.console import printable, rank_prefix, speaking
from qlora_rm.errors import Terminated, UserError
from qlora_rm.launchers import torchrun_variables
from qlora_rm.libraries import quiet_libraries
from qlora_rm.options import TRUTH, add_options, output_asked
from qlora_rm.surroundings import prepare_caches, prepare_streams, require_readable


class Parser(argparse.ArgumentParser):
    """A parser whose errors are `UserError`s that name the nearest option, and that reads `--flag true` as `train` does."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(self._without_values(words), namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does, but an unknown option is an error of the command that it was given to."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parsed.parser.error(f"unknown option {unknown[0]}{parsed.parser.hint(unknown[0])}")
        return parsed

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See `{self.prog} --help`.")

    def hint(self, word: str) -> str:
        """The known option nearest to `word`, as a question; empty where none is near."""
        known = {name.replace("-", "_"): name for name in self._option_string_actions}
        near = difflib.get_close_matches(word.partition("=")[0].replace("-", "_"), known, 1, 0.7)
        return f" (did you mean {known[near[0]]}?)" if near else ""

    def _without_values(self, words: list[str]) -> list[str]:
        """`--flag true` and `--flag=true` become `--flag`; with `false` they become `--no_flag`, or nothing where it is off anyway."""
        read: list[str] = []
        waiting = deque(words)
        while waiting:
            word = waiting.popleft()
            flag, equals, value = word.partition("=")
            if not isinstance(self._option_string_actions.get(flag), argparse._StoreTrueAction):
                read.append(word)
                continue
            if equals and value.lower() not in TRUTH:
                self.error(f"{flag}: {value!r} is not true or false")
            if not equals and waiting and waiting[0].lower() in TRUTH:
                value = waiting.popleft()
            negation = f"--no_{flag.removeprefix('--')}"
            if TRUTH.get(value.lower(), True):
                read.append(flag)
            elif negation in self._option_string_actions:
                read.append(negation)
        return read

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print the help; argparse's own method ignores write errors."""
        (file or sys.stdout).write(message)


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Returns: 0 on success; 1 if a check of `verify` failed; 2 for a user error, a check that could not run, or an output
    that cannot be written; 130 after Ctrl-C; 143 after SIGTERM.
    """
    prepare_streams()
    argv = sys.argv[1:] if argv is None else argv
    try:
        status = _run(argv)
        _flush()
        return status
    except UserError as error:
        with suppress(BrokenPipeError):  # nobody reads standard error; the exit status still reports it
            print(f"{rank_prefix()}error: {printable(error, lines=True)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Terminated:
        return 143
    except BrokenPipeError:  # the reader of our output has closed it
        _print_no_more()
        return 1
    except OSError as error:
        if error.filename is not None or not _output_fails():
            raise
        _print_no_more()
        print(f"{rank_prefix()}error: standard output cannot be written: {error.strerror}.", file=sys.stderr)
        return 2


def _run(argv: list[str]) -> int:
    require_readable(argv)
    if argv[:1] == ["train"] and not {"-h", "--help"} & set(argv):
        return _train(argv[1:])
    try:
        options = _parser().parse_args(argv)
    except SystemExit:  # after the help
        _flush()
        raise
    with speaking(quiet=options.quiet, verbose=options.verbose):
        prepare_caches()
        quiet_libraries()
        return options.run(options) or 0


def _flush() -> None:
    """Flush standard output while errors can still be reported; Python's own flush at exit is after every handler."""
    if sys.stdout is not None:
        sys.stdout.flush()


def _output_fails() -> bool:
    """Return whether standard output fails again. The failed text is already dropped, so this tries an empty line."""
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def _print_no_more() -> None:
    """Redirect standard output to the null device, since Python flushes it once more at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _train(argv: list[str]) -> int:
    os.environ.update(torchrun_variables(os.environ))
    asked = output_asked(argv)
    with speaking(quiet=asked.quiet, verbose=asked.verbose):
        prepare_caches()
        quiet_libraries()
        from qlora_rm.training.run import main as train

        train(["--help" if word == "--help_all" else word for word in argv])
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="qlora-rm", description="Scalar reward models from human preferences on 4-bit backbones.")
    parser.add_argument("--version", action="version", version=f"qlora-rm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, about, add in (
        ("train", "Train a reward model on preferences.", add_train),
        ("plan", "Report memory needs, what fits on which GPU, and the command that launches it.", add_plan),
        ("eval", "Measure how often a reward model agrees with preferences.", add_eval),
        ("score", "Score the rows of a file, or rank the responses to one prompt.", add_score),
        ("merge", "Merge an adapter and its base into one stock model, and verify its scores.", add_merge),
        ("export", "Write a folder for a consumer of reward models, and verify its scores there.", add_export),
        ("verify", "Verify that a model still gives the scores it was trained to give.", add_verify),
        ("sign", "Sign the manifest of a model folder, so that others can see who wrote it.", add_sign),
        ("serve", "Serve scores over HTTP; requests that arrive together share a batch.", add_serve),
        ("recipes", "Print where the recipes and launch configurations are, or copy them into a folder.", add_recipes),
        ("bench", "Measure the speed-up from computing shared prompts once, against TRL's trainer.", add_bench),
        ("demo", "Run the complete workflow on a small model with generated preferences.", add_demo),
    ):
        command = commands.add_parser(name, help=about, description=about, allow_abbrev=False)
        command.set_defaults(run=add(command), parser=command)
        add_options(command, OutputConfig)
    return parser


if __name__ == "__main__":
    sys.exit(main())
