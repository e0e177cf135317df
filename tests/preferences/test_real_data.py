"""Complete files of real rows: their counts and their faults."""

import pytest

from qlora_rm.preferences import Tokenization, load_comparisons, load_preferences
from tests.preferences.rows_for_tests import config
from tests.real_data import REAL_DATA
from tests.tokenizers_for_tests import small_tokenizer

# name: format, rows, comparisons, wins, ties, prompts, faults
COUNTS = {
    "hh": ("raw HH text", 2312, 2308, 2308, 0, 2306, {"empty_response": 4}),
    "llamafactory_en": ("ShareGPT", 300, 300, 300, 0, 295, {}),
    "llamafactory_zh": ("ShareGPT", 300, 300, 300, 0, 289, {}),
    "finegrained": ("K responses with preferences", 500, 500, 2616, 384, 500, {}),
    "gsm8k": ("K responses with scores", 1319, 1319, 2429, 5485, 1319, {}),
    "oasst": ("K responses with ranks", 212, 212, 754, 0, 212, {}),
    "pandalm": ("K responses with ranks", 999, 939, 836, 103, 164, {"wrong_type": 6, "empty_response": 54}),
}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", REAL_DATA)
def test_real_rows_are_read_whole(name, shared_data, tmp_path):
    form, rows, kept, wins, ties, prompts, faults = COUNTS[name]
    path = str(REAL_DATA[name](shared_data, tmp_path))
    comparisons, report = load_comparisons([path], config(on_bad_row="skip"), Tokenization(small_tokenizer()))
    ledger, part = report.ledgers["data"], report.parts["comparisons"]
    assert list(ledger.formats.values()) == [form]
    assert sum(ledger.rows.values()) == rows
    assert {kind: seen.count for kind, seen in ledger.skipped.items()} == faults
    assert (len(comparisons), part.wins, part.ties, part.prompts) == (kept, wins, ties, prompts)


@pytest.mark.long
@pytest.mark.slow
def test_real_hh_text_becomes_turns_and_splits_by_prompt(shared_data, tmp_path):
    path = str(REAL_DATA["hh"](shared_data, tmp_path))
    options = config(path, on_bad_row="skip", hh_turns=True)
    data = load_preferences(options, Tokenization(small_tokenizer(), 2048), need_eval=True)
    assert len(data.train) + len(data.held_out) == 2308
    assert data.report.parts["held-out"].prompts == 116
    assert data.golden_candidates[0].prompt[0]["role"] == "user"
