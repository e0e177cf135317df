"""Every row format is recognized and parsed correctly; every fault is named, and stops the run or is counted."""

import json

import pytest

from qlora_rm.errors import UserError
from qlora_rm.preferences import Origin, RowFault, Tokenization, load_comparisons, parse_candidates
from qlora_rm.preferences.formats import parse_comparison, recognize
from tests.preferences.rows_for_tests import (
    FORMATS,
    HH,
    IDS,
    PARIS,
    PREFERENCES,
    RANKS,
    ROME,
    SCORES,
    SHAREGPT,
    TEXT_EXPLICIT,
    TEXT_IMPLICIT,
    TOOLS,
    TURNS_EXPLICIT,
    TURNS_IMPLICIT,
    USER,
    WHOLE,
    config,
    write,
)
from tests.tokenizers_for_tests import small_tokenizer

ORIGIN = Origin("rows.jsonl", 1)


def read(row, **options):
    return parse_comparison(row, recognize([row], "rows.jsonl"), ORIGIN, "rows", **options)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_recognized_by_its_first_rows(name):
    assert recognize([FORMATS[name]], "rows.jsonl").name == name


@pytest.mark.parametrize("name", FORMATS)
def test_odd_rows_do_not_change_the_format(name):
    good = FORMATS[name]
    odd = [dict.fromkeys(good), {}, {"chosen": True, "rejected": 3}]
    assert recognize([*odd, *[good] * 4], "rows.jsonl").name == name


@pytest.mark.parametrize("name", ["explicit prompt, text", "implicit prompt, text", "raw HH text"])
def test_text_is_the_prompt_and_then_the_response(name):
    row = FORMATS[name]
    candidates = read(row).candidates
    whole = [row.get("prompt", "") + row[column] for column in ("chosen", "rejected")]
    assert [candidates.prompt + response for response in candidates.responses] == whole


def test_raw_hh_text_is_split_behind_the_last_assistant_that_is_shared():
    assert read(HH).candidates.prompt == "\n\nHuman: Capital of France?\n\nAssistant:"
    longer = {
        key: HH["chosen"] + "\n\nHuman: Sure?\n\nAssistant:" + said
        for key, said in zip(HH, [" Yes.", " No."], strict=True)
    }
    assert read(longer).candidates.responses == (" Yes.", " No.")
    apart = {"chosen": HH["chosen"], "rejected": "\n\nHuman: Italy?\n\nAssistant: Rome."}
    assert read(apart).candidates.prompt == ""


def test_raw_hh_text_is_parsed_to_turns_on_request():
    candidates = read(HH, as_turns=True).candidates
    assert candidates.prompt == [{"role": "user", "content": "Capital of France?"}]
    assert candidates.responses == ([PARIS], [ROME])
    with_prompt = {"prompt": "\n\nHuman: Capital of France?\n\nAssistant:", "chosen": " Paris.", "rejected": " Rome."}
    assert read(with_prompt, as_turns=True).candidates == candidates
    assert read(TEXT_EXPLICIT, as_turns=True) == read(TEXT_EXPLICIT), "other text stays text"


@pytest.mark.parametrize("row", [TURNS_EXPLICIT, TURNS_IMPLICIT, WHOLE], ids=["explicit", "implicit", "whole"])
def test_conversations_are_split_behind_the_turns_they_share(row):
    candidates = read(row).candidates
    assert candidates.prompt == [USER]
    assert candidates.responses == ([PARIS], [ROME])


def test_several_turns_may_be_compared():
    more = [PARIS, {"role": "user", "content": "Thanks."}, {"role": "assistant", "content": "Bye."}]
    assert read({"chosen": [USER, *more], "rejected": [USER, ROME]}).candidates.responses == (more, [ROME])


def test_a_text_prompt_before_answers_alone_is_the_users_turn():
    row = {"prompt": USER["content"], "chosen": [PARIS], "rejected": [ROME]}
    assert read(row).candidates == read(TURNS_EXPLICIT).candidates
    system = {"role": "system", "content": "Be brief."}
    row = {"prompt": USER["content"], "chosen": [system, PARIS], "rejected": [system, ROME]}
    assert read(row).candidates.prompt == [system, USER]


def test_text_responses_after_turns_are_assistant_turns():
    assert (
        read({**TURNS_EXPLICIT, "chosen": "Paris.", "rejected": "Rome."}).candidates == read(TURNS_EXPLICIT).candidates
    )


def test_sharegpt_names_become_roles():
    candidates = read(SHAREGPT).candidates
    assert candidates.prompt == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Capital of France?"},
    ]
    assert candidates.responses == ([PARIS], [ROME])


def test_tools_system_and_template_arguments_travel_along():
    row = {**TURNS_EXPLICIT, "tools": TOOLS, "system": "Be brief.", "chat_template_kwargs": {"shout": True}}
    candidates = read(row).candidates
    assert candidates.tools == TOOLS
    assert candidates.template_kwargs == {"shout": True}
    assert candidates.prompt == [{"role": "system", "content": "Be brief."}, USER]
    as_text = {**row, "tools": json.dumps(TOOLS), "chat_template_kwargs": '{"shout": true}'}
    assert read(as_text).candidates == candidates
    assert read({**TURNS_EXPLICIT, "tools": None, "system": "", "chat_template_kwargs": None}) == read(TURNS_EXPLICIT)


@pytest.mark.parametrize("row", [RANKS, SCORES, PREFERENCES], ids=["ranks", "scores", "preferences"])
def test_k_responses_are_judged_pair_by_pair(row):
    preferences = read(row).preferences
    assert set(preferences.wins) == {(1, 0), (1, 2)}
    assert preferences.ties == ((0, 2),)


def test_token_ids_lose_the_padding_their_mask_tells():
    row = {
        "input_ids_chosen": [0, 5, 6, 0],
        "attention_mask_chosen": [0, 1, 1, 0],
        "input_ids_rejected": [5, 7, 0, 0],
        "attention_mask_rejected": [1, 1, 0, 0],
    }
    assert read(row).candidates.responses == ([5, 6], [5, 7])
    assert read({"chosen_input_ids": [5, 6], "rejected_input_ids": [5, 7]}).candidates.responses == ([5, 6], [5, 7])


def test_margin_weight_and_source():
    preferences = read({**TEXT_EXPLICIT, "margin": 0.5, "weight": 2, "source": "mine"}).preferences
    assert (preferences.margins, preferences.weight, preferences.source) == ((0.5,), 2.0, "mine")
    assert read(TEXT_EXPLICIT).preferences.source == "rows"
    assert read({**PREFERENCES, "margin": [0.5, 2]}).preferences.margins == (0.5, 2.0)
    assert read({**TEXT_EXPLICIT, "margin": None, "weight": None}).preferences == read(TEXT_EXPLICIT).preferences


def test_columns_nobody_reads_are_told():
    rows = [{**TEXT_EXPLICIT, "id": 1, "system": "x"}, {**TEXT_EXPLICIT, "more": 2, "margin": 1}]
    assert recognize(rows, "rows.jsonl").unread(rows) == ["id", "system", "more"]


def test_an_unknown_format_names_the_columns_and_the_shapes():
    with pytest.raises(UserError, match=r"rows\.jsonl: .*Columns found: question, answer") as error:
        recognize([{"question": "?", "answer": "!"}], "rows.jsonl")
    assert "--columns" in str(error.value)
    assert "conversations, chosen, rejected" in str(error.value)


TURN_WITHOUT_ROLE, TURN_WITHOUT_CONTENT = [{"content": "x"}], [{"role": "assistant"}]
FAULTS = [
    ("missing_column", TEXT_EXPLICIT, {"rejected": ...}, "no rejected"),
    ("missing_column", RANKS, {"ranks": None}, "none of preferences, ranks, scores"),
    ("wrong_type", TEXT_EXPLICIT, {"chosen": True}, "chosen is a boolean (true)"),
    ("wrong_type", TEXT_EXPLICIT, {"chosen": 3}, "chosen is a number (3)"),
    ("wrong_type", TEXT_EXPLICIT, {"prompt": None}, "prompt is null"),
    ("wrong_type", TEXT_EXPLICIT, {"chosen": ["a", "b"]}, "chosen is an array of something other"),
    ("wrong_type", TEXT_EXPLICIT, {"chosen": [5, 6]}, "mixes ids and text"),
    ("wrong_type", TEXT_EXPLICIT, {"chosen": [PARIS]}, "mixes text and turns"),
    ("wrong_type", TURNS_EXPLICIT, {"chosen": [{"role": "assistant", "content": False}]}, "is a boolean (false)"),
    ("wrong_type", RANKS, {"responses": "Paris."}, "responses is a string"),
    ("wrong_type", IDS, {"chosen_ids": "Paris."}, "does not hold token ids"),
    ("wrong_type", HH, {"chosen": [PARIS]}, "not text"),
    ("wrong_type", TURNS_EXPLICIT, {"system": 3}, "system is a number"),
    ("null_response", TEXT_EXPLICIT, {"rejected": None}, "rejected is null"),
    ("null_response", RANKS, {"responses": ["a", None, "b"]}, "responses[1] is null"),
    ("empty_response", TEXT_EXPLICIT, {"chosen": " \n"}, "chosen is empty"),
    ("empty_response", TURNS_EXPLICIT, {"chosen": []}, "chosen is empty"),
    ("empty_response", TURNS_EXPLICIT, {"chosen": [{"role": "assistant", "content": " "}]}, "chosen is empty"),
    ("empty_response", TURNS_IMPLICIT, {"chosen": [USER]}, "its response is empty"),
    ("empty_response", HH, {"chosen": "\n\nHuman: Hi\n\nAssistant: "}, "the last Assistant turn is empty"),
    ("empty_response", IDS, {"chosen_ids": []}, "chosen_ids is empty"),
    ("empty_response", RANKS, {"responses": []}, "empty array"),
    ("identical_responses", TEXT_EXPLICIT, {"chosen": "Rome."}, "identical"),
    ("identical_responses", TURNS_IMPLICIT, {"chosen": [USER, ROME]}, "identical"),
    ("identical_responses", RANKS, {"responses": ["a", "a", "a"]}, "identical"),
    ("too_few_responses", RANKS, {"responses": ["a"], "ranks": [1]}, "holds 1"),
    ("no_preference", PREFERENCES, {"preferences": [], "ties": None}, "no response is preferred"),
    ("bad_preference", PREFERENCES, {"preferences": [[1, 3]]}, "[1, 3]"),
    ("bad_preference", PREFERENCES, {"preferences": [[1, 1]]}, "[1, 1]"),
    ("bad_preference", PREFERENCES, {"preferences": [[0, 1], [1, 0]]}, "more than once"),
    ("bad_preference", PREFERENCES, {"ties": [[0, 1]]}, "more than once"),
    ("bad_preference", PREFERENCES, {"preferences": [[0, True]]}, "not a pair of indices"),
    ("bad_preference", PREFERENCES, {"preferences": 3}, "preferences is a number"),
    ("bad_preference", SCORES, {"scores": [1, float("nan"), 2]}, "scores[1] is nan"),
    ("bad_preference", SCORES, {"scores": [1, 2]}, "2 values for 3 responses"),
    ("bad_preference", SCORES, {"scores": [1, True, 2]}, "scores[1] is a boolean"),
    ("bad_preference", RANKS, {"ranks": [1, None, 2]}, "ranks[1] is null"),
    ("bad_margin", TEXT_EXPLICIT, {"margin": "big"}, "margin is a string"),
    ("bad_margin", PREFERENCES, {"margin": [1.0]}, "2 numbers"),
    ("bad_margin", RANKS, {"margin": [1.0, 2.0]}, "preferences"),
    ("bad_weight", TEXT_EXPLICIT, {"weight": 0}, "not above 0"),
    ("bad_weight", TEXT_EXPLICIT, {"weight": True}, "weight is a boolean"),
    ("bad_turn", TURNS_EXPLICIT, {"prompt": TURN_WITHOUT_ROLE}, "turn 1 of prompt has no role"),
    ("bad_turn", TURNS_EXPLICIT, {"chosen": TURN_WITHOUT_CONTENT}, "turn 1 of chosen has no content"),
    ("bad_turn", TURNS_EXPLICIT, {"prompt": [{"role": "system", "content": "a"}, USER], "system": "b"}, "differ"),
    ("bad_tools", TURNS_EXPLICIT, {"tools": "{not json"}, "tools is text that is not JSON"),
    ("bad_tools", TURNS_EXPLICIT, {"tools": {"a": 1}}, "tools is an object, not an array"),
    ("bad_template_kwargs", TURNS_EXPLICIT, {"chat_template_kwargs": [1]}, "not an object"),
    ("bad_unicode", TEXT_EXPLICIT, {"chosen": "half \ud83d"}, "surrogate"),
    ("prompt_mismatch", WHOLE, {"prompt": "Something else."}, "prompt stands in none"),
]


@pytest.fixture(scope="module")
def tokenization():
    return Tokenization(small_tokenizer(), 512)


@pytest.mark.parametrize(("kind", "good", "change", "words"), FAULTS, ids=[f"{f[0]}-{n}" for n, f in enumerate(FAULTS)])
def test_a_faulty_row_stops_the_load_or_is_counted(kind, good, change, words, tmp_path, tokenization):
    bad = {column: value for column, value in {**good, **change}.items() if value is not ...}
    path = write(tmp_path / "rows.jsonl", [good, good, bad])
    with pytest.raises(UserError) as error:
        load_comparisons([path], config(), tokenization)
    message = str(error.value)
    assert f"{path}, row 3: " in message
    assert words in message
    assert "--on_bad_row skip" in message, "the way out"
    comparisons, report = load_comparisons([path], config(on_bad_row="skip"), tokenization)
    assert len(comparisons) == 2
    skipped = report.as_dict()["read"]["data"]["skipped"]
    assert {name: entry["count"] for name, entry in skipped.items()} == {kind: 1}
    assert f"{path}, row 3" in skipped[kind]["first"]
    assert any(f"skipped 1 x {kind}" in line for line in report.lines())


def test_a_file_of_nothing_but_faults_tells_the_fault_and_not_the_format(tmp_path, tokenization):
    path = write(tmp_path / "rows.jsonl", [{**TEXT_EXPLICIT, "chosen": None}])
    with pytest.raises(UserError, match="row 1: chosen is null"):
        load_comparisons([path], config(), tokenization)
    with pytest.raises(UserError, match=r"No comparison is left of 1 rows.*null_response"):
        load_comparisons([path], config(on_bad_row="skip"), tokenization)


SCORED = {
    "response": ({"prompt": "Q ", "response": "A"}, ("Q ", ("A",))),
    "responses": ({"prompt": "Q ", "responses": ["A", "B"]}, ("Q ", ("A", "B"))),
    "one response": ({"prompt": "Q ", "responses": ["A"]}, ("Q ", ("A",))),
    "turns and text": ({"prompt": [USER], "response": "Paris."}, ([USER], ([PARIS],))),
    "messages": ({"messages": [USER, PARIS]}, ([USER], ([PARIS],))),
    "text": ({"text": "Q A"}, ("", ("Q A",))),
    "bare response": ({"response": "A"}, ("", ("A",))),
    "pair": (TEXT_EXPLICIT, ("Capital of France? ", ("Paris.", "Rome."))),
    "ranked": (RANKS, ("Capital? ", ("Rome.", "Paris.", "Berlin."))),
    "sharegpt": (SHAREGPT, (read(SHAREGPT).candidates.prompt, ([PARIS], [ROME]))),
    "raw HH": (HH, ("\n\nHuman: Capital of France?\n\nAssistant:", (" Paris.", " Rome."))),
    "implicit": (TEXT_IMPLICIT, ("", tuple(TEXT_IMPLICIT.values()))),
    "ids": (IDS, ([], ([5, 6, 7], [5, 6, 8]))),
}


@pytest.mark.parametrize("name", SCORED)
def test_rows_without_preferences_can_be_scored(name):
    row, (prompt, responses) = SCORED[name]
    candidates = parse_candidates(row)
    assert (candidates.prompt, candidates.responses) == (prompt, responses)


def test_nothing_to_score_is_a_fault():
    with pytest.raises(RowFault, match="nothing to score in the columns question") as fault:
        parse_candidates({"question": "?"})
    assert fault.value.kind == "missing_column"
    with pytest.raises(RowFault, match="response is a boolean"):
        parse_candidates({"prompt": "Q", "response": True})
