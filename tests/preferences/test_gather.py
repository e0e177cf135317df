"""Rows of one prompt become one comparison: same pairs, same weights, each response once."""

import json

from qlora_rm.config import DataConfig
from qlora_rm.preferences import Tokenization, load_preferences
from tests.tokenizers_for_tests import small_tokenizer

ROWS = [
    {"prompt": "Name a cat. ", "chosen": "Tom.", "rejected": "Rex.", "margin": 0.5},
    {"prompt": "Name a dog. ", "chosen": "Rex.", "rejected": "Tom."},
    {"prompt": "Name a cat. ", "chosen": "Tom.", "rejected": "Fido, of course.", "weight": 2.0},
    {"prompt": "Name a cat. ", "chosen": "Rex.", "rejected": "Fido, of course."},
]


def load(tmp_path, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    config = DataConfig(dataset=[str(path)], eval_fraction=0, **options)
    return load_preferences(config, Tokenization(small_tokenizer()), need_eval=False)


def sequences(row):
    return [tuple(row["prompt_ids"] + ids) for ids in row["response_ids"]]


def pairs(rows):
    """Return every win as its two token sequences, margin and weight."""
    return sorted(
        (sequences(row)[i], sequences(row)[j], round(margin, 3), row["weight"] / len(row["wins"]))
        for row in rows
        for (i, j), margin in zip(row["wins"], row["margins"], strict=True)
    )


def test_pairs_and_weights_are_kept_and_responses_stand_once(tmp_path):
    """The row of weight 2 is not merged, since its pair would lose weight to the others."""
    apart, gathered = list(load(tmp_path).train), list(load(tmp_path, group_by_prompt=True).train)
    assert len(apart) == 4 and len(gathered) == 3
    assert pairs(gathered) == pairs(apart)
    cat, dog, heavy = gathered
    assert len(cat["response_ids"]) == 3 and len(set(sequences(cat))) == 3
    assert (cat["weight"], dog["weight"], heavy["weight"]) == (2.0, 1.0, 2.0)
    assert cat["tokens"] == len(cat["prompt_ids"]) + sum(map(len, cat["response_ids"]))
    assert cat["length"] == max(map(len, sequences(cat)))


def test_it_is_told(tmp_path):
    assert any(
        "4 comparisons gathered by prompt into 3" in line
        for line in load(tmp_path, group_by_prompt=True).report.lines()
    )
