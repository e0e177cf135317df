"""Every kind of file yields the same rows, and unreadable data is an error."""

import csv
import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qlora_rm.errors import UserError
from qlora_rm.preferences import RowFault, read_rows, sources
from tests.preferences.rows_for_tests import (
    HH,
    PREFERENCES,
    SHAREGPT,
    TEXT_EXPLICIT,
    TURNS_EXPLICIT,
    config,
    numbered,
    write,
)

ROWS = numbered(5)


def rows_of(*entries, **options):
    """Return every good row of `entries`."""
    return [row for source in sources(entries, config(**options)) for _, row in read_rows(source)]


def as_csv(path, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def zipped(path):
    packed = path.with_name(path.name + ".gz")
    packed.write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return str(packed)


@pytest.mark.parametrize("pack", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("ending", ["jsonl", "json", "ndjson", "lines.json", "csv", "tsv"])
def test_text_files(tmp_path, ending, pack):
    path = tmp_path / f"rows.{ending}"
    if ending in ("csv", "tsv"):
        as_csv(path, ROWS, "," if ending == "csv" else "\t")
    elif ending == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        write(path, ROWS)
    assert rows_of(zipped(path) if pack else str(path)) == ROWS


def test_parquet_keeps_nested_values(tmp_path):
    for name, row in (("turns", TURNS_EXPLICIT), ("k", PREFERENCES), ("sharegpt", SHAREGPT)):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(pa.Table.from_pylist([row] * 3), path, row_group_size=2)
        assert rows_of(str(path)) == [row] * 3


def test_csv_cells_that_are_no_text_are_json(tmp_path):
    row = {**PREFERENCES, "prompt": "Q, with a comma\nand a line ", "margin": [0.5, 1.5], "weight": 2.0, "source": "3"}
    cells = {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
    assert rows_of(as_csv(tmp_path / "k.csv", [cells])) == [row]
    blank = as_csv(tmp_path / "blank.csv", [{**TEXT_EXPLICIT, "margin": ""}])
    assert rows_of(blank) == [{**TEXT_EXPLICIT, "margin": None}]
    assert (
        rows_of(as_csv(tmp_path / "number.csv", [{"prompt": "3", "chosen": "4", "rejected": "5"}]))[0]["chosen"] == "4"
    )


def test_a_byte_order_mark_is_no_part_of_the_data(tmp_path):
    for name in ("a.jsonl", "a.csv", "a.json"):
        path = tmp_path / name
        {"a.jsonl": write, "a.csv": as_csv}.get(name, lambda p, rows: p.write_text(json.dumps(rows)))(path, ROWS)
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
        assert rows_of(str(path)) == ROWS


def test_globs_and_folders_read_all_files_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    write(tmp_path / "b.jsonl", ROWS[2:4])
    write(tmp_path / "a.jsonl", ROWS[:2])
    as_csv(tmp_path / "deep" / "c.csv", ROWS[4:])
    (tmp_path / "README.md").write_text("no rows here")
    assert rows_of(str(tmp_path / "*.jsonl")) == ROWS[:4]
    assert rows_of(str(tmp_path)) == ROWS
    assert rows_of(str(tmp_path / "**" / "*.csv")) == ROWS[4:]


def test_a_row_says_where_it_stands(tmp_path):
    path = write(tmp_path / "rows.jsonl", [ROWS[0], "", ROWS[1]])
    (source,) = sources([path], config())
    assert [str(origin) for origin, _ in read_rows(source)] == [f"{path}, row 1", f"{path}, row 3"]


def test_broken_rows_come_between_the_good_ones(tmp_path):
    path = write(tmp_path / "rows.jsonl", [ROWS[0], '{"prompt": ', "[1]", "3", ROWS[1]])
    kinds = [row.kind if isinstance(row, RowFault) else "good" for row in rows_of(path)]
    assert kinds == ["good", "broken_json", "not_an_object", "not_an_object", "good"]
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}\n'.encode("latin-1") + b'{"prompt": "ok"}\n')
    broken, good = rows_of(str(tmp_path / "latin.jsonl"))
    assert broken.kind == "broken_json"
    assert good == {"prompt": "ok"}
    (tmp_path / "short.csv").write_text("prompt,chosen,rejected\na,b\nc,d,e\n")
    short, good = rows_of(str(tmp_path / "short.csv"))
    assert short.kind == "broken_csv"
    assert good == {"prompt": "c", "chosen": "d", "rejected": "e"}


SAVED = datasets.Dataset.from_list(numbered(100))


def test_saved_data_sets(tmp_path):
    SAVED.save_to_disk(tmp_path / "one")
    assert rows_of(str(tmp_path / "one")) == SAVED.to_list()
    parts = datasets.DatasetDict({"train": SAVED, "test": SAVED.select(range(3))})
    parts.save_to_disk(tmp_path / "parts")
    path = str(tmp_path / "parts")
    assert rows_of(path) == SAVED.to_list()
    assert rows_of({"path": path, "split": "test"}) == SAVED.to_list()[:3]
    assert rows_of({"path": path, "split": "train[10:12]+test[:1]"}) == [*SAVED.to_list()[10:12], SAVED[0]]
    (source,) = sources([{"path": path, "split": "train[10:12]"}], config())
    assert [origin.row for origin, _ in read_rows(source)] == [11, 12]
    with pytest.raises(UserError, match=r"no split 'valid'.*train, test"):
        rows_of({"path": path, "split": "valid"})
    with pytest.raises(UserError, match="without splits"):
        rows_of({"path": str(tmp_path / "one"), "split": "test"})


def test_saved_conversations_come_back_as_they_were(tmp_path):
    datasets.Dataset.from_list([TURNS_EXPLICIT] * 2).save_to_disk(tmp_path / "turns")
    assert rows_of(str(tmp_path / "turns")) == [TURNS_EXPLICIT] * 2


def test_a_hub_id_goes_to_the_hub_with_config_and_split(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or SAVED)
    assert len(rows_of({"path": "someone/rows", "config": "en", "split": "test[:5]"})) == 100
    assert rows_of("someone/rows", dataset_config="zh")[0] == SAVED[0]
    assert asked == [(("someone/rows", "en"), {"split": "test[:5]"}), (("someone/rows", "zh"), {"split": "train"})]


def test_an_unreachable_hub_says_so(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"someone/rows \(split 'train'\).*Couldn't reach the Hub"):
        rows_of("someone/rows")


def test_columns_are_renamed(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "Q ", "best": "a", "rejected": "b", "chosen": "old", "id": 7}])
    expected = [{"prompt": "Q ", "chosen": "a", "rejected": "b", "id": 7}]
    assert rows_of(path, columns=["prompt=question", "chosen=best"]) == expected
    assert rows_of({"path": path, "columns": {"prompt": "question", "chosen": "best"}}) == expected
    swapped = rows_of({"path": path, "columns": {"chosen": "rejected", "rejected": "best"}})
    assert (swapped[0]["chosen"], swapped[0]["rejected"]) == ("b", "a")
    cells = rows_of({"path": as_csv(tmp_path / "r.csv", [{"m": "0.5"}]), "columns": {"margin": "m"}})
    assert cells == [{"margin": 0.5}]


def test_a_renamed_column_that_is_nowhere_is_an_error(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "Q ", "chosen": "a", "rejected": "b"}])
    with pytest.raises(UserError, match=r"prompt=qestion.*Columns found: question, chosen, rejected"):
        rows_of(path, columns=["prompt=qestion"])
    late = write(tmp_path / "late.jsonl", [{"chosen": "a"}, {"chosen": "a", "gap": 1}])
    assert rows_of(late, columns=["margin=gap"])[1] == {"chosen": "a", "margin": 1}, "one row is enough"


def test_data_sets_are_told_apart_by_name():
    names = [source.name for source in sources(["a/x.jsonl", "b/x.jsonl", "c/y.csv.gz", "d/*.json"], config())]
    assert names == ["a/x.jsonl", "b/x.jsonl", "y", "d/*.json"]


def unreadable(tmp_path):
    """Data set as the user gives it -> expected message."""
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "empty.csv").write_text("prompt,chosen,rejected\n")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "rows.txt").write_text("x")
    (tmp_path / "broken.json").write_text('[{"prompt": "x"}, ')
    (tmp_path / "broken.parquet").write_text("PAR1 no")
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "x"}\n' * 5000)[:-20])
    write(tmp_path / "preferences.jsonl", ROWS)
    return {
        "empty.jsonl": "is empty",
        "empty.csv": "is empty",
        "empty.json": "is empty",
        "nothing": "holds no file ending in",
        "rows.txt": r"files ending in '.txt' are not read; .jsonl",
        "broken.json": "not valid JSON",
        "broken.parquet": "cannot be read as Parquet",
        "broken.jsonl.gz": "cannot be read",
        "preferance.jsonl": r"no file or folder .*Did you mean .*preferences\.jsonl",
        "*.arrow": "No file matches",
        "gone/deep/rows.jsonl": "no file or folder",
    }


def test_what_cannot_be_read_is_a_clear_error(tmp_path):
    for name, words in unreadable(tmp_path).items():
        with pytest.raises(UserError, match=words) as error:
            rows_of(str(tmp_path / name))
        assert name.split("/")[0] in str(error.value)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"path": "x.jsonl", "wieght": 2}, "'wieght'.*did you mean 'weight'"),
        ({"path": "x.jsonl", "zzz": 2}, "the keys are path, config, split, weight, columns"),
        ({"split": "train"}, "names no path"),
        ({"path": "x.jsonl", "weight": 0}, "must be a number above 0"),
        ({"path": "x.jsonl", "weight": True}, "must be a number above 0"),
        ({"path": "x.jsonl", "columns": ["a"]}, "must be a mapping"),
    ],
)
def test_a_wrong_entry_is_a_clear_error(entry, words):
    with pytest.raises(UserError, match=words):
        sources([entry], config())


def test_files_have_no_splits(tmp_path):
    path = write(tmp_path / "rows.jsonl", [HH])
    with pytest.raises(UserError, match="no split 'test'"):
        rows_of({"path": path, "split": "test"})
    with pytest.raises(UserError, match="not both"):
        sources([{"path": path, "weight": 2}], config(path), weights=[3.0])
