"""All commands read flags alike, and a word that they do not know is an error of the command, with the nearest option."""

import pytest

from qlora_rm.cli import _parser
from qlora_rm.errors import UserError


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ([], False),
        (["--hh_turns"], True),
        (["--hh_turns", "true"], True),
        (["--hh_turns=True"], True),
        (["--hh_turns", "false"], False),
        (["--hh_turns=no"], False),
        (["--no_hh_turns"], False),
        (["--hh_turns", "--no_hh_turns"], False),
    ],
    ids=str,
)
@pytest.mark.parametrize("first", [True, False], ids=["before the model", "after the model"])
def test_a_flag_may_have_a_value(words, wanted, first):
    argv = ["eval", *words, "MODEL"] if first else ["eval", "MODEL", *words]
    options = _parser().parse_args(argv)
    assert (options.hh_turns, options.model) == (wanted, "MODEL")


def test_a_flag_of_one_command_alone_too():
    assert not _parser().parse_args(["verify", "MODEL", "--json", "false"]).json
    assert _parser().parse_args(["verify", "--json", "true", "MODEL"]).json


def test_words_of_other_options_stay():
    options = _parser().parse_args(["score", "MODEL", "--prompt", "Is it?", "--responses", "yes", "no", "--json"])
    assert options.responses == ["yes", "no"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["eval", "MODEL", "--hh_turn"],
            r"unknown option --hh_turn \(did you mean --hh_turns\?\)\. See `qlora-rm eval --help`",
        ),
        (["verify", "--jsonn", "MODEL"], r"did you mean --json\?.*`qlora-rm verify --help`"),
        (["serve", "MODEL", "--prot", "1"], r"did you mean --port\?.*`qlora-rm serve --help`"),
        (
            ["merge", "MODEL", "--output", "x", "--entirely-other"],
            r"unknown option --entirely-other\. See `qlora-rm merge --help`",
        ),
        (
            ["eval", "MODEL", "--hh_turns=maybe"],
            r"--hh_turns: 'maybe' is not true or false\. See `qlora-rm eval --help`",
        ),
    ],
    ids=str,
)
def test_what_is_not_known_is_an_error_of_its_command(argv, message):
    with pytest.raises(UserError, match=message):
        _parser().parse_args(argv)
