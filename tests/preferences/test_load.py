"""Loading from files to two parts and a report, which accounts for every row."""

import json
from collections import Counter

import pytest
from datasets import Dataset, DatasetDict

from qlora_rm.errors import UserError
from qlora_rm.preferences import Tokenization, load_comparisons, load_preferences
from qlora_rm.preferences.arrow_table import SCHEMA
from tests.preferences.rows_for_tests import (
    FORMATS,
    PREFERENCES,
    RANKS,
    TEXT_EXPLICIT,
    TURNS_EXPLICIT,
    config,
    numbered,
    write,
)
from tests.tokenizers_for_tests import small_tokenizer


@pytest.fixture(scope="module")
def tokenization():
    return Tokenization(small_tokenizer(), 512)


def load(tokenization, *paths, need_eval=False, **options):
    return load_preferences(config(*paths, **options), tokenization, need_eval=need_eval)


def origins(part):
    return [] if part is None else [int(origin.rsplit(" ", 1)[1]) for origin in part["origin"]]


def test_columns_and_their_types(tmp_path, tokenization):
    path = write(tmp_path / "k.jsonl", [{**PREFERENCES, "margin": [0.5, 1], "weight": 2, "source": "mine"}])
    comparisons, _ = load_comparisons([path], config(), tokenization)
    assert comparisons.features.arrow_schema.remove_metadata() == SCHEMA
    (row,) = comparisons
    assert [row["wins"], row["ties"]] == [[[1, 0], [1, 2]], [[0, 2]]]
    assert (row["margins"], row["weight"], row["source"]) == ([0.5, 1.0], 2.0, "mine")
    assert row["length"] == len(row["prompt_ids"]) + max(map(len, row["response_ids"]))
    assert row["origin"] == f"{path}, row 1"
    decoded = [tokenization.tokenizer.decode(row["prompt_ids"] + ids) for ids in row["response_ids"]]
    assert ["Rome." in decoded[0], "Paris." in decoded[1], "Berlin." in decoded[2]] == [True] * 3


def test_files_of_every_format_can_be_mixed(tmp_path, tokenization):
    for number, row in enumerate(FORMATS.values()):
        write(tmp_path / f"{number:02}.jsonl", [row] * 2)
    comparisons, report = load_comparisons([str(tmp_path)], config(), tokenization)
    assert len(comparisons) == 2 * len(FORMATS)
    assert list(report.ledgers["data"].formats.values()) == list(FORMATS)
    assert any(line.endswith("00.jsonl: explicit prompt, text") for line in report.lines()), "named in the log"


def test_a_fraction_is_held_out_by_prompt(tmp_path, tokenization):
    rows = [row for row in numbered(40) for _ in range(2)]
    rows[1::2] = [{**row, "chosen": "Maybe."} for row in rows[1::2]]
    data = load(tokenization, write(tmp_path / "rows.jsonl", rows), eval_fraction=0.1, need_eval=True)
    prompts = [{(row - 1) // 2 for row in origins(part)} for part in (data.train, data.held_out)]
    assert len(prompts[1]) == 4
    assert not prompts[0] & prompts[1]
    assert (len(data.train), len(data.held_out)) == (72, 8)
    shuffled = load(tokenization, write(tmp_path / "reversed.jsonl", rows[::-1]), eval_fraction=0.1)
    assert {(80 - row) // 2 for row in origins(shuffled.held_out)} == prompts[1], "the same prompts, whatever the order"
    parts = data.report.as_dict()["parts"]
    assert (parts["training"]["prompts"], parts["held-out"]["comparisons"]) == (36, 8)


def test_explicit_held_out_rows_and_their_leaks(tmp_path, tokenization):
    train, other = write(tmp_path / "train.jsonl", numbered(10)), write(tmp_path / "eval.jsonl", numbered(12)[8:])
    data = load(tokenization, train, eval_dataset=[other], need_eval=True)
    assert (len(data.train), len(data.held_out)) == (10, 4)
    assert "warning: 2 of the 4 held-out prompts stand in the training data too" in data.report.lines()


def test_a_held_out_split(tmp_path, tokenization):
    parts = {"train": Dataset.from_list(numbered(6)), "test": Dataset.from_list(numbered(9)[6:])}
    DatasetDict(parts).save_to_disk(tmp_path / "parts")
    data = load(tokenization, str(tmp_path / "parts"), eval_split="test", need_eval=True)
    assert (len(data.train), len(data.held_out)) == (6, 3)
    with pytest.raises(UserError, match="no split 'test'"):
        load(tokenization, write(tmp_path / "rows.jsonl", numbered(5)), eval_split="test")


def test_weights_repeat_and_thin_the_training_part_only(tmp_path, tokenization):
    paths = [write(tmp_path / f"{name}.jsonl", numbered(40, source=name)) for name in "abc"]
    options = {"dataset_weights": [1.0, 2.5, 0.25], "eval_dataset": [write(tmp_path / "eval.jsonl", numbered(4))]}
    data = load(tokenization, *paths, **options)
    assert Counter(data.train["source"]) == {"a": 40, "b": 100, "c": 10}
    assert len(data.held_out) == 4
    assert "mixing: b x 2.5: 40 -> 100 comparisons" in data.report.lines()
    entries = [{"path": path, "weight": weight} for path, weight in zip(paths, options["dataset_weights"], strict=True)]
    by_entry = load(tokenization, *entries, eval_dataset=options["eval_dataset"])
    assert by_entry.fingerprint == data.fingerprint


def test_the_source_is_the_files_name_unless_the_row_says_otherwise(tmp_path, tokenization):
    path = write(tmp_path / "mine.jsonl", [*numbered(2), *numbered(3, source="theirs")])
    comparisons, report = load_comparisons([path], config(), tokenization)
    assert comparisons["source"] == ["mine"] * 2 + ["theirs"] * 3
    assert "comparisons by source: mine 2, theirs 3" in report.lines()


def test_at_most_so_many_are_held_out(tmp_path, tokenization):
    path = write(tmp_path / "rows.jsonl", numbered(60))
    few, more = (load(tokenization, path, eval_fraction=0.5, max_eval_comparisons=n) for n in (5, 9))
    assert (len(few.held_out), len(more.held_out)) == (5, 9)
    assert set(origins(few.held_out)) < set(origins(more.held_out)), "a fixed choice"
    assert len(few.train) == len(more.train) == 30, "what is not kept does not go back to training"
    assert "held-out: 5 of 30 comparisons kept (--max_eval_comparisons)" in few.report.lines()


def test_truncated_and_dropped_rows_are_counted_per_part(tmp_path):
    long = [{**row, "prompt": f"{row['prompt']} word" * 20} for row in numbered(10)]
    path = write(tmp_path / "rows.jsonl", [*numbered(30), *long])
    tokenizer = small_tokenizer()
    data = load(Tokenization(tokenizer, 40), path, eval_fraction=0.5)
    parts = data.report.as_dict()["parts"]
    assert sum(part["truncated"] for part in parts.values()) == 10
    whole, _ = load_comparisons([path], config(), Tokenization(tokenizer))
    over = [length - 40 for length in whole["length"] if length > 40]
    assert sum(part["tokens_cut"] for part in parts.values()) == sum(over)
    assert max(part["longest"] for part in parts.values()) == 40
    dropped = load(Tokenization(tokenizer, 40, "drop"), path)
    assert len(dropped.train) + len(dropped.held_out) == 30
    assert any("dropped 10 x over_long" in line for line in dropped.report.lines())
    assert json.loads(json.dumps(dropped.report.as_dict()))["read"]["data"]["skipped"]["over_long"]["count"] == 10
    for on_bad_row in ("error", "skip"):
        with pytest.raises(UserError, match=r"row 31: the longest sequence .* --max_length 40.*--over_long"):
            load(Tokenization(tokenizer, 40, "error"), path, on_bad_row=on_bad_row)


@pytest.mark.parametrize(
    ("kind", "bad", "words"),
    [
        ("broken_json", '{"prompt": ', "not JSON"),
        ("not_an_object", "[1, 2]", "the row is an array, not an object"),
        ("pad_in_content", {**TEXT_EXPLICIT, "prompt": "see <pad>"}, "pad token '<pad>'"),
        ("response_too_long", {"prompt": "Q ", "chosen": "yes " * 600, "rejected": "no"}, "--max_length 512"),
        ("equal_after_tokenization", {**RANKS, "responses": ["a", "a", "b"]}, "the same tokens"),
    ],
)
def test_faults_outside_the_formats_stop_or_are_counted(kind, bad, words, tmp_path, tokenization):
    good = RANKS if "responses" in bad else TEXT_EXPLICIT
    path = write(tmp_path / "rows.jsonl", [good, bad, good])
    with pytest.raises(UserError, match="row 2: ") as error:
        load_comparisons([path], config(), tokenization)
    assert words in str(error.value)
    comparisons, report = load_comparisons([path], config(on_bad_row="skip"), tokenization)
    assert len(comparisons) == 2
    assert report.ledgers["data"].skipped[kind].count == 1


def test_a_template_fault_is_counted(tmp_path):
    tokenizer = small_tokenizer(chat_template="{{ messages[0].name.first }}{{ messages[-1].content }}")
    named = {**TURNS_EXPLICIT, "prompt": [{**TURNS_EXPLICIT["prompt"][0], "name": {"first": "Ada"}}]}
    path = write(tmp_path / "rows.jsonl", [named, TURNS_EXPLICIT])
    comparisons, report = load_comparisons([path], config(on_bad_row="skip"), Tokenization(tokenizer))
    assert len(comparisons) == 1
    assert report.ledgers["data"].skipped["template_error"].count == 1


def test_no_part_may_be_empty(tmp_path, tokenization):
    many, one = write(tmp_path / "many.jsonl", numbered(20)), write(tmp_path / "one.jsonl", numbered(1))
    assert load(tokenization, many, eval_fraction=0).held_out is None
    with pytest.raises(UserError, match=r"No comparison is held out.*--eval_dataset"):
        load(tokenization, many, eval_fraction=0, need_eval=True)
    with pytest.raises(UserError, match=r"No training comparison is left: all 1 .*--eval_fraction 0"):
        load(tokenization, one)
    with pytest.raises(UserError, match="No training comparison is left"):
        load(tokenization, many, dataset_weights=[0.001])


def test_the_fingerprint_is_of_the_content_and_its_order(tmp_path, tokenization):
    rows = numbered(30, source="s")

    def fingerprint(name, rows):
        return load(tokenization, write(tmp_path / f"{name}.jsonl", rows)).fingerprint

    assert fingerprint("a", rows) == fingerprint("b", rows), "the file's name does not count"
    others = [rows[::-1], rows[1:], [{**rows[0], "weight": 2}, *rows[1:]], [{**rows[0], "margin": 1}, *rows[1:]]]
    assert len({fingerprint("c", other) for other in [rows, *others]}) == 5


@pytest.mark.slow
def test_golden_candidates_are_held_out_rows_of_many_lengths(tmp_path, tokenization):
    rows = [{**row, "prompt": row["prompt"] + "word " * (n % 60)} for n, row in enumerate(numbered(1500))]
    data = load(tokenization, write(tmp_path / "rows.jsonl", rows))
    held = {tuple(map(tuple, row["response_ids"])): row["length"] for row in data.held_out}
    sequences = [tokenization.tokenize([candidates])[0] for candidates in data.golden_candidates]
    lengths = [held[tuple(map(tuple, tokens.response_ids))] for tokens in sequences]
    assert len(lengths) == 8
    assert lengths == sorted(lengths)
    assert lengths[-1] - lengths[0] > 30
    without = load(tokenization, write(tmp_path / "few.jsonl", rows[:3]), eval_fraction=0)
    assert len(without.golden_candidates) == 3, "training rows where nothing is held out"
