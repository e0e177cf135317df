"""Poisoned rows: each is reported for its row, in every command and file format, and the rows around it are read."""

import csv
import gzip
import io
import json
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_rm.config import DataConfig
from qlora_rm.errors import UserError
from qlora_rm.evaluation import scored_rows
from qlora_rm.evaluation.scored_rows import score_rows
from qlora_rm.output import json_line
from qlora_rm.preferences import Comparison, Origin, RowFault, Tokenization, load_comparisons, parse_comparison
from qlora_rm.preferences import row_bytes as row_bytes_module
from qlora_rm.preferences.arrow_table import Table
from qlora_rm.preferences.file_formats import read_file, row_of
from qlora_rm.preferences.formats import FORMATS as SHAPES
from qlora_rm.preferences.row_bytes import RowStream
from qlora_rm.preferences.row_input import reading
from qlora_rm.preferences.text_as import TrainedText
from qlora_rm.preferences.tokenization import LONGEST_TEXT, Tokenized
from tests.preferences.rows_for_tests import FORMATS, IDS, RANKS, TEXT_EXPLICIT, TURNS_EXPLICIT, config, numbered, write
from tests.tokenizers_for_tests import small_tokenizer

CATEGORY = "Rows"
TOKENIZATION = Tokenization(small_tokenizer(), 512)
KNOWN = len(TOKENIZATION.tokenizer)
DEEP = "[" * 100_000 + "]" * 100_000
DEEP_ENOUGH = "[" * 150 + "]" * 150  # json.loads accepts it, but later code may fail on it


def text(**more: str) -> str:
    """Return an explicit text row. `more` adds values verbatim."""
    values = {name: json.dumps(value) for name, value in TEXT_EXPLICIT.items()} | more
    return "{" + ", ".join(f'"{name}": {value}' for name, value in values.items()) + "}"


NUMBERS = {
    "400 digits": "1" * 400, "5,000 digits": "1" * 5000, "1e308": "1e308", "1e400": "1e400", "NaN": "NaN", "Infinity": "Infinity",
    "-Infinity": "-Infinity", "-1e7": "-1e7", "text": '"0.5"', "boolean": "true", "array": "[1]", "object": "{}",
}  # fmt: skip
ROWS: dict[str, tuple[str, str]] = {
    **{f"margin {name}": (text(margin=value), "bad_margin") for name, value in NUMBERS.items()},
    **{f"weight {name}": (text(weight=value), "bad_weight") for name, value in NUMBERS.items()},
    "weight 0": (text(weight="0"), "bad_weight"),
    "weight -1": (text(weight="-1"), "bad_weight"),
    "weight 1e-320": (text(weight="1e-320"), "bad_weight"),
    "deep": (DEEP, "nested_too_deeply"),
    "deep value": (text(note=DEEP), "nested_too_deeply"),
    "deep enough": (text(note=DEEP_ENOUGH), "nested_too_deeply"),
    "deep tools": (json.dumps({**TURNS_EXPLICIT, "tools": DEEP_ENOUGH}), "bad_tools"),
    "duplicate key": (text()[:-1] + ', "chosen": "Rome."}', "duplicate_key"),
    "duplicate key inside": (text(note='{"a": 1, "a": 2}'), "duplicate_key"),
    "source of half a surrogate pair": (text(source='"\\ud800"'), "bad_unicode"),
    "source of objects": (text(source='{"a": 1}'), "wrong_type"),
    "content of half a surrogate pair": (
        '{"prompt": [{"role": "\\ud800", "content": "Q"}], "chosen": "a", "rejected": "b"}',
        "bad_unicode",
    ),
    "another template": (
        json.dumps({**TURNS_EXPLICIT, "chat_template_kwargs": {"chat_template": "{% for i in range(9**9) %}{% endfor %}"}}),
        "bad_template_kwargs",
    ),
    "not UTF-8": ('{"prompt": "\udce9"}', "broken_json"),
}  # fmt: skip
ROWS["margin 5,000 digits"] = (ROWS["margin 5,000 digits"][0], "broken_json")
ROWS["weight 5,000 digits"] = (ROWS["weight 5,000 digits"][0], "broken_json")


def poisoned(path: Path, bad: str, good: Any = None) -> str:
    """Write a file of two good rows, a bad one and a good one."""
    before = [json.dumps(good or TEXT_EXPLICIT)] * 2
    lines = [*before, bad, before[0]]
    words = "[" + ",\n".join(lines) + "]" if ".json" in path.suffixes else "\n".join(lines)
    data = words.encode(errors="surrogateescape")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def skipped_of(path: str, **options: Any) -> dict[str, int]:
    """Return faults by kind. Three good rows must be kept."""
    comparisons, report = load_comparisons([path], config(on_bad_row="skip", **options), TOKENIZATION)
    assert len(comparisons) == 3
    return {kind: seen.count for kind, seen in report.ledgers["data"].skipped.items()}


@pytest.mark.parametrize("ending", ["jsonl", "json", "json.gz"])
@pytest.mark.parametrize("name", ROWS)
def test_a_poisoned_row_is_a_fault_of_its_row(name: str, ending: str, tmp_path: Path) -> None:
    bad, kind = ROWS[name]
    good = TURNS_EXPLICIT if "role" in bad else TEXT_EXPLICIT
    path = poisoned(tmp_path / f"rows.{ending}", bad, good)
    assert skipped_of(path) == {kind: 1}
    with pytest.raises(UserError, match="row 3: ") as told:
        load_comparisons([path], config(), TOKENIZATION)
    assert len(str(told.value)) < 600, "a message that people can read"


@pytest.mark.parametrize("token", [KNOWN, 2**31, 2**70, 10**400, -1])
@pytest.mark.parametrize("ending", ["jsonl", "json"])
def test_a_token_id_beyond_the_vocabulary_is_named_with_the_bound(token: int, ending: str, tmp_path: Path) -> None:
    path = poisoned(tmp_path / f"rows.{ending}", json.dumps({**IDS, "chosen_ids": [5, 6, token]}), IDS)
    assert skipped_of(path) == {"unknown_token": 1}
    with pytest.raises(UserError, match=rf"row 3: place 2 of response 1 holds token id .*0 to {KNOWN - 1}"):
        load_comparisons([path], config(), TOKENIZATION)


@pytest.mark.parametrize("values", ["[1, NaN]", f"[1, 1{'0' * 400}]", "[1, true]", '[1, "2"]'])
@pytest.mark.parametrize("column", ["ranks", "scores"])
def test_ranks_and_scores_are_numbers(column: str, values: str, tmp_path: Path) -> None:
    good = {"prompt": "Q ", "responses": ["a", "b"], column: [1, 2]}
    bad = json.dumps(good).replace("[1, 2]", values)
    assert skipped_of(poisoned(tmp_path / "rows.jsonl", bad, good)) == {"bad_preference": 1}


def test_scores_are_compared_exactly(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "Q ", "responses": ["a", "b"], "scores": [2**53, 2**53 + 1]}])
    comparisons, _ = load_comparisons([path], config(), TOKENIZATION)
    assert comparisons[0]["wins"] == [[1, 0]]


def test_so_many_responses_that_their_pairs_fill_the_memory(tmp_path: Path) -> None:
    good = {"prompt": "Q ", "responses": ["a", "b"], "ranks": [1, 2]}
    count = 100_000
    bad = json.dumps({"prompt": "Q ", "responses": [str(n) for n in range(count)], "ranks": [*range(count)]})
    assert skipped_of(poisoned(tmp_path / "rows.jsonl", bad, good)) == {"too_many_responses": 1}


@pytest.mark.parametrize("row", [
    {**TEXT_EXPLICIT, "prompt": "a" * (LONGEST_TEXT + 1)},
    {"prompt": "a" * (LONGEST_TEXT // 2), "responses": [str(n) for n in range(20)], "ranks": [*range(20)]},
])  # fmt: skip
def test_text_that_takes_gigabytes_to_tokenize(row: dict[str, Any], tmp_path: Path) -> None:
    good = RANKS if "ranks" in row else TEXT_EXPLICIT
    assert skipped_of(poisoned(tmp_path / "rows.jsonl", json.dumps(row), good)) == {"text_too_long": 1}


def as_csv(path: Path, rows: list[dict[str, str]]) -> str:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


@pytest.mark.parametrize("ending", ["csv", "tsv"])
@pytest.mark.parametrize(
    ("column", "cell", "kind"),
    [
        *(("margin", value, "bad_margin") for value in NUMBERS.values()),
        ("weight", "1e308", "bad_weight"),
        ("margin", DEEP, "nested_too_deeply"),
        ("margin", '{"a": 1, "a": 2}', "duplicate_key"),
        ("prompt", "\udcff", "bad_unicode"),
        ("prompt", "x" * 5000, "row_too_long"),
        ("prompt", 'x\n"' * 5000, "row_too_long"),
    ],
)
def test_a_poisoned_cell_of_a_csv_is_a_fault_of_its_row(
    column: str, cell: str, kind: str, ending: str, tmp_path: Path
) -> None:
    good = {**TEXT_EXPLICIT, "margin": "", "weight": ""}
    path = as_csv(tmp_path / f"rows.{ending}", [good, good, {**good, column: cell}, good])
    limit = 4000 if kind == "row_too_long" else 10**6
    assert skipped_of(path, max_row_bytes=limit) == {kind: 1}


def test_a_quotation_mark_that_is_never_closed(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,chosen,rejected\nQ ,a,b\nQ ,"a,b\n' + "Q ,a,b\n" * 10_000)
    comparisons, report = load_comparisons([str(path)], config(on_bad_row="skip", max_row_bytes=5000), TOKENIZATION)
    assert len(comparisons) == 1
    assert "a quotation mark is not closed" in report.ledgers["data"].skipped["row_too_long"].first


@pytest.mark.parametrize(
    ("value", "kind"), [(1e308, "bad_margin"), (float("nan"), "bad_margin"), (-1e7, "bad_margin"), ("x", "bad_margin")]
)
def test_poisoned_values_of_parquet(value: Any, kind: str, tmp_path: Path) -> None:
    column = [None if isinstance(value, str) else 0.5] * 2 + [value, None]
    table = pa.table({name: [said] * 4 for name, said in TEXT_EXPLICIT.items()} | {"margin": column})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert skipped_of(str(tmp_path / "rows.parquet")) == {kind: 1}


def test_token_ids_of_parquet_and_saved_data_sets(tmp_path: Path) -> None:
    rows = [IDS, IDS, {**IDS, "chosen_ids": [2**60]}, IDS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    for path in ("rows.parquet", "saved"):
        assert skipped_of(str(tmp_path / path)) == {"unknown_token": 1}


def test_bytes_of_parquet_are_no_token_ids(tmp_path: Path) -> None:
    rows = [{"chosen": b"Paris.", "rejected": words} for words in (b"Rome.", b"Berlin.")]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="row 1: chosen is of type bytes"):
        load_comparisons([str(tmp_path / "rows.parquet")], config(), TOKENIZATION)


def test_text_of_parquet_that_is_not_utf_8(tmp_path: Path) -> None:
    table = pa.table({"prompt": _as_text([b"Q ", b"Q ", b"\xff", b"Q "]), "chosen": ["a"] * 4, "rejected": ["b"] * 4})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert skipped_of(str(tmp_path / "rows.parquet")) == {"unreadable_value": 1}


def _as_text(values: list[bytes]) -> pa.Array:
    """Make a text column from arbitrary bytes, unchecked."""
    stored = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), stored.buffers())


LIMIT = 10_000


def too_long(folder: Path) -> dict[str, str]:
    """Write files of four rows each, of which the third has more than LIMIT bytes."""
    rows = [TEXT_EXPLICIT, TEXT_EXPLICIT, {**TEXT_EXPLICIT, "chosen": "long " * 5000}, TEXT_EXPLICIT]
    turns = (
        [TURNS_EXPLICIT] * 2
        + [{**TURNS_EXPLICIT, "chosen": [{"role": "assistant", "content": "é" * LIMIT}]}]
        + [TURNS_EXPLICIT]
    )
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    pq.write_table(pa.Table.from_pylist(turns), folder / "turns.parquet")
    datasets.Dataset.from_list(turns).save_to_disk(folder / "saved")
    poisoned(folder / "rows.json", json.dumps(rows[2]))
    write(folder / "rows.jsonl", rows)
    for name in ("rows.jsonl", "rows.json"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
    as_csv(folder / "rows.csv", rows)
    names = (
        "rows.jsonl",
        "rows.jsonl.gz",
        "rows.json",
        "rows.json.gz",
        "rows.csv",
        "rows.parquet",
        "turns.parquet",
        "saved",
    )
    return {name: str(folder / name) for name in names}


def test_a_row_over_the_limit_is_a_fault_in_every_kind_of_file(tmp_path: Path, tries: Callable[[int], None]) -> None:
    files = too_long(tmp_path)
    tries(len(files))
    for name, path in files.items():
        assert skipped_of(path, max_row_bytes=LIMIT) == {"row_too_long": 1}, name
        with pytest.raises(UserError, match=r"row 3.*more than 10,000 bytes.*--max_row_bytes"):
            load_comparisons([path], config(max_row_bytes=LIMIT), TOKENIZATION)


def test_the_limit_itself_is_within_it(tmp_path: Path) -> None:
    line = json.dumps(TEXT_EXPLICIT)
    path = write(tmp_path / "rows.jsonl", [line])
    comparisons, _ = load_comparisons(
        [path], config(max_row_bytes=len(line) + 1), TOKENIZATION
    )  # + 1 for the line break
    assert len(comparisons) == 1
    for wrong in (0, -1, 2**31):
        with pytest.raises(UserError, match="--max_row_bytes"):
            config(path, max_row_bytes=wrong)


@pytest.fixture
def peak() -> Iterator[Callable[[], int]]:
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


HUGE = 20_000_000


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
def test_a_long_row_is_never_in_memory(ending: str, tmp_path: Path, peak: Callable[[], int]) -> None:
    path = tmp_path / f"rows.{ending}"
    begin, end = {"jsonl": (b'{"prompt": "', b'"}\n'), "json": (b'[{"prompt": "', b'"}]'), "csv": (b"prompt\n", b"\n")}[
        ending
    ]
    with path.open("wb") as file:
        file.write(begin)
        for _ in range(HUGE // 1_000_000):
            file.write(b"a" * 1_000_000)
        file.write(end)
    before = peak()
    [(number, row)] = read_file(path, LIMIT)
    assert (number, row.kind if isinstance(row, RowFault) else None) == (1, "row_too_long")
    assert peak() - before < 4_000_000


@pytest.mark.parametrize("opening", ["", "["])
def test_a_bomb_is_given_up_with_one_message(opening: str, tmp_path: Path, peak: Callable[[], int]) -> None:
    path = tmp_path / f"rows.json{'' if opening else 'l'}.gz"
    with gzip.open(path, "wb") as file:
        file.write(f'{opening}{{"prompt": "'.encode())
        for _ in range(HUGE // 1_000_000):
            file.write(b"a" * 1_000_000)
    assert path.stat().st_size < HUGE / 500
    before = peak()
    with pytest.raises(UserError, match=r"not read after row 0: .*expands to more than 160,000 bytes"):
        load_comparisons([str(path)], config(on_bad_row="skip", max_row_bytes=LIMIT), TOKENIZATION)
    assert peak() - before < 4_000_000


@pytest.mark.parametrize("words", [
    '[{"a": 1}, {"b": 2}', '[{"a": 1}] []', '[{"a": 1}}', '[{"a": "1}]', '[{"a": [1}, {"a": 2}]', "[",
])  # fmt: skip
def test_an_array_that_does_not_end_where_it_should_is_an_error_of_the_file(words: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(words)
    with pytest.raises(UserError, match="is not valid JSON: "):
        list(read_file(tmp_path / "rows.json"))


def test_two_columns_of_one_name_are_said(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,chosen,rejected,chosen\na,b,c,d\n")
    (tmp_path / "rows.tsv").write_text("chosen\trejected\tchosen\trejected\na\tb\tc\td\n")
    column = pa.array(["a"])
    pq.write_table(pa.Table.from_arrays([column] * 3, ["chosen", "rejected", "chosen"]), tmp_path / "rows.parquet")
    turn = pa.StructArray.from_arrays([column] * 2, ["role", "role"])
    pq.write_table(pa.Table.from_arrays([turn, column], ["chosen", "rejected"]), tmp_path / "nested.parquet")
    for name in ("rows.csv", "rows.tsv", "rows.parquet", "nested.parquet"):
        with pytest.raises(UserError, match=rf"{name}.* has columns of the same name: '\w+' \(2 times\)"):
            list(read_file(tmp_path / name))
    with pytest.raises(UserError, match="--columns names the field prompt twice"):
        DataConfig(columns=["prompt=a", "prompt=b"])
    (tmp_path / "blank.csv").write_text("prompt,,chosen,rejected,\na,x,b,c,y\n")
    assert [row for _, row in read_file(tmp_path / "blank.csv")] == [{"prompt": "a", "chosen": "b", "rejected": "c"}]


def test_a_thousand_broken_rows_before_the_first_good_one(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ["{"] * 2500 + [TEXT_EXPLICIT] * 3)
    assert skipped_of(path) == {"broken_json": 2500}


@pytest.mark.parametrize("weight", [float("inf"), float("nan"), 1e30, 0])
def test_absurd_weights_of_data_sets(weight: float, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", numbered(3))
    with pytest.raises(UserError, match="above 0, and at most 1,000,000"):
        config(path, dataset_weights=[weight])


def test_a_file_name_that_is_not_utf_8(tmp_path: Path) -> None:
    name = Path(str(tmp_path) + "/rows\udcff.jsonl")
    write(name, [TEXT_EXPLICIT])
    comparisons, _ = load_comparisons([str(name)], config(), TOKENIZATION)
    assert "\ufffd" in comparisons[0]["origin"]


# ---- score ---------------------------------------------------------------------------------------------------------------


class Memory:
    """A model that scores by length, and runs out of memory for long sequences."""

    def __init__(self, error: type[Exception] | None = None, template: bool = True) -> None:
        self.tokenization = TOKENIZATION if template else Tokenization(small_tokenizer(chat_template=None), 512)
        self.text = TrainedText(self.tokenization, "text", ["text", "turns"], tell=lambda line: None)
        self.error, self.calls = error, 0

    def score_or_fault(self, candidates: list[Any]) -> list[Any]:
        self.calls += 1
        results = self.tokenization.tokenize_each(candidates)
        good = [result.tokens.sequences for result in results if isinstance(result, Tokenized)]
        if self.error and any(len(ids) > 100 for sequences in good for ids in sequences):
            message = "CUDA out of memory. Tried to allocate 7 EiB"
            raise self.error(
                message if self.error is not RuntimeError else "DefaultCPUAllocator: can't allocate memory"
            )
        return [r if isinstance(r, RowFault) else [float(len(ids)) for ids in r.tokens.sequences] for r in results]


def scored(model: Memory, lines: list[Any], **options: Any) -> tuple[list[dict[str, Any]], Counter[str]]:
    counts = Counter[str]()
    return list(score_rows(model, lines, "rows", on_bad_row="skip", skipped=counts, **options)), counts  # type: ignore[arg-type]


ONE = json.dumps({"prompt": "Q ", "response": "A"})


@pytest.mark.parametrize("bad", [
    DEEP, f'{{"prompt": "x", "response": {DEEP}}}', '{"response": "a", "response": "b"}', '{"response": "a", "n": NaN}',
    '{"response": "a", "n": 1e400}', f'{{"response": "a", "n": {"1" * 5000}}}', f'{{"chosen_ids": [{2**70}], "rejected_ids": [1]}}',
    f'{{"prompt": "x", "responses": [[{10**400}]]}}', '{"response": "\udcff"}', b"\xff\xfe\x00", None, '{"response": "\\ud800"}',
    json.dumps({"prompt": "a" * LONGEST_TEXT, "response": "b"}), '"\\u0000', "nul", "1" * 5000,
])  # fmt: skip
def test_one_poisoned_row_does_not_end_a_scoring(bad: Any) -> None:
    line = bad.encode(errors="surrogateescape") if isinstance(bad, str) else bad
    rows, counts = scored(Memory(), [ONE, line, ONE])
    assert [row["score"] is None for row in rows] == [False, True, False]
    assert counts.total() == 1
    for row in rows:
        json.loads(json_line(row), parse_constant=pytest.fail)


def test_turns_for_a_model_without_a_template() -> None:
    turns = json.dumps({"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]})
    rows, counts = scored(Memory(template=False), [ONE, turns, ONE])
    assert counts == {"turns_without_template": 1}
    model = Memory(template=False)
    model.text = TrainedText(model.tokenization, "turns", ["turns"], tell=lambda line: None)
    rows, counts = scored(model, [ONE, '{"text": "plain"}'])
    assert counts == {"turns_without_template": 1}
    assert isinstance(rows[1]["score"], float)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_only_the_row_that_memory_does_not_suffice_for_has_no_score(error: type[Exception]) -> None:
    long = json.dumps({"prompt": "Q ", "response": "word " * 90})
    model = Memory(error)
    lines = [ONE] * 40
    lines[17] = long
    rows, counts = scored(model, lines)
    assert [place for place, row in enumerate(rows) if row["score"] is None] == [17]
    assert counts == {"out_of_memory": 1}
    assert model.calls < 20, "halves, not rows one by one"
    with pytest.raises(UserError, match=r"rows, row 18: memory runs out.*--tokens_per_batch"):
        list(score_rows(model, lines, "rows"))  # type: ignore[arg-type]


def test_other_errors_of_a_model_are_not_taken_for_memory() -> None:
    model = Memory()
    with patch.object(model, "score_or_fault", side_effect=RuntimeError("shapes")), pytest.raises(RuntimeError):
        scored(model, [ONE])


def test_score_reads_bounded_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join([ONE, json.dumps({"response": "a" * 5000}), ONE]).encode()))
    with reading(str(path), 1000) as rows:
        got, counts = scored(Memory(), rows.lines(), max_row_bytes=1000)  # type: ignore[arg-type]
    assert counts == {"row_too_long": 1}
    assert [row["score"] is None for row in got] == [False, True, False]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="cannot be read to its end"), reading(str(path)) as rows:
        list(rows.lines())


def test_long_rows_are_scored_a_few_at_a_time() -> None:
    model = Memory()
    with patch.object(scored_rows, "BYTES_AT_ONCE", 1000):
        rows, _ = scored(model, [json.dumps({"prompt": "Q" * 300, "responses": list("abc")})] * 6)
    assert model.calls == 6
    assert len(rows) == 6


# ---- properties ----------------------------------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["\n\nHuman: a\n\nAssistant: b"]),
    lambda inside: st.lists(inside, max_size=4) | st.dictionaries(st.text(max_size=4), inside, max_size=4),
    max_leaves=12,
)  # fmt: skip
COLUMNS = sorted(
    {column for row in FORMATS.values() for column in row} | {"margin", "weight", "source", "tools", "system", "ties"}
)


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """Draw a good row with some of its values, or some bytes of its text, replaced."""
    row = dict(draw(st.sampled_from(list(FORMATS.values()))))
    row |= draw(st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=2))
    line = json.dumps(row).encode()
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(line)))
        line = line[:at] + draw(st.binary(max_size=3)) + line[at + draw(st.integers(0, 3)) :]
    return line


LINES = st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()) | mutated()


def outcome(line: bytes) -> None:
    """Read, tokenize and store a line in every format whose columns it has. Each gives a comparison or a fault."""
    row = row_of(line)
    if isinstance(row, RowFault):
        return
    for shape in SHAPES:
        if not shape.has_columns(row):
            continue
        try:
            comparison = parse_comparison(row, shape, Origin("rows", 1), "rows")
        except RowFault:
            continue
        assert isinstance(comparison, Comparison)
        (result,) = TOKENIZATION.tokenize_each([comparison.candidates])
        if isinstance(result, Tokenized):
            table = Table()
            table.append(comparison, result, 0)
            assert len(table.dataset()) == 1


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(LINES)
def test_any_line_is_a_comparison_or_a_fault(line: bytes) -> None:
    outcome(line)


@settings(max_examples=150, deadline=None)
@given(st.lists(LINES, max_size=3))
def test_any_lines_are_scored_or_counted(lines: list[bytes]) -> None:
    lines = [line for line in lines if line.strip() and b'"score' not in line]
    rows, counts = scored(Memory(), [ONE.encode(), *lines])
    assert len(rows) == len(lines) + 1
    assert counts.total() == sum("error" in row for row in rows if row.get("score", 0) is None)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(st.lists(VALUES, max_size=5), st.sampled_from([None, 1]), st.integers(1, 9), st.booleans())
def test_the_elements_of_an_array_are_found_in_chunks_of_any_size(
    values: list[Any], indent: int | None, chunk: int, ascii_only: bool
) -> None:
    words = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    with patch.object(row_bytes_module, "CHUNK", chunk):
        found = list(RowStream(io.BytesIO(words), 10**6).elements())
        short = list(RowStream(io.BytesIO(words), 8).elements())
    again = [json.dumps(json.loads(element or b"")) for element in found]
    assert again == [json.dumps(value) for value in values]
    assert short == [element if len(element or b"") <= 8 else None for element in found]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"")), max_size=6), st.integers(1, 8))
def test_long_lines_are_left_out_and_the_others_stay_as_they_are(lines: list[bytes], limit: int) -> None:
    with patch.object(row_bytes_module, "CHUNK", 2):
        found = list(RowStream(io.BytesIO(b"".join(line + b"\n" for line in lines)), limit).lines())
    assert found == [line + b"\n" if len(line) < limit + 1 else None for line in lines]


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(*[st.text(st.sampled_from('ab,"\n é'), max_size=8)] * 2), min_size=1, max_size=5),
    st.integers(20, 40),
)
def test_csv_rows_are_whole_or_too_long(tmp_path: Path, rows: list[tuple[str, str]], limit: int) -> None:
    path, sizes = tmp_path / "rows.csv", []
    with path.open("wb") as file:
        file.write(b"chosen,rejected\n")
        for row in rows:
            words = io.StringIO()
            csv.writer(words, lineterminator="\n").writerow(row)
            sizes.append(file.write(words.getvalue().encode()))
    found = [row for _, row in read_file(path, limit)]
    wanted = [
        "row_too_long" if size > limit else dict(zip(("chosen", "rejected"), row, strict=True))
        for size, row in zip(sizes, rows, strict=True)
    ]
    assert [row.kind if isinstance(row, RowFault) else row for row in found] == wanted
