"""Token ids equal TRL's; the over-long rule cuts one slice from the prompt and nothing else."""

import json
from types import SimpleNamespace

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl import RewardTrainer

from qlora_rm.errors import UserError
from qlora_rm.preferences import Candidates, RowFault, Tokenization, Tokens, parse_candidates
from qlora_rm.preferences.tokenization import check_wins
from tests.preferences.rows_for_tests import (
    HH,
    PARIS,
    ROME,
    TEXT_EXPLICIT,
    TEXT_IMPLICIT,
    TOOLS,
    TURNS_EXPLICIT,
    TURNS_IMPLICIT,
    USER,
)
from tests.tokenizers_for_tests import BOS, EOS, PAD, small_tokenizer, word_piece_tokenizer

UNICODE = {"prompt": "Grüße, 日本語 🙂? ", "chosen": "Ça va\u00a0👩‍👩‍👧", "rejected": "\u202bلא\u202c no"}
SYSTEM = {"role": "system", "content": "Be brief."}
KNOWN_TO_TRL = {
    "explicit text": [TEXT_EXPLICIT, UNICODE, {**TEXT_EXPLICIT, "prompt": ""}],
    "implicit text": [TEXT_IMPLICIT, HH, {"chosen": "a b", "rejected": "c"}],
    "text that ends with eos": [{**TEXT_EXPLICIT, "chosen": f"Paris.{EOS}"}, {**TEXT_EXPLICIT, "prompt": f"Q{EOS}"}],
    "text that spells bos": [{**TEXT_EXPLICIT, "prompt": f"{BOS}Capital? "}],
    "explicit turns": [TURNS_EXPLICIT, {**TURNS_EXPLICIT, "prompt": [SYSTEM, USER, PARIS, USER]}],
    "implicit turns": [TURNS_IMPLICIT, {"chosen": [USER, PARIS, USER, PARIS], "rejected": [USER, ROME]}],
    "tools": [{**TURNS_EXPLICIT, "tools": TOOLS}],
    "tools as JSON": [{**TURNS_EXPLICIT, "tools": json.dumps(TOOLS)}],
    "template arguments": [{**TURNS_EXPLICIT, "chat_template_kwargs": {"shout": True}}],
    "token ids": [{"chosen_ids": [7, 8, 9], "rejected_ids": [7, 8, 10, 11]}],
}


def by_trl(rows, tokenizer):
    args = SimpleNamespace(dataset_num_proc=None, max_length=None)
    prepared = RewardTrainer._prepare_dataset(None, Dataset.from_list(rows), tokenizer, args, "train")
    return [[row["chosen_ids"], row["rejected_ids"]] for row in prepared]


@pytest.mark.parametrize("bos", [True, False], ids=["bos", "no bos"])
@pytest.mark.parametrize("name", KNOWN_TO_TRL)
def test_token_ids_are_those_of_trl(name, bos):
    tokenizer, rows = small_tokenizer(bos=bos), KNOWN_TO_TRL[name]
    ours = Tokenization(tokenizer).tokenize([parse_candidates(row) for row in rows])
    assert [tokens.sequences for tokens in ours] == by_trl(rows, tokenizer)


def test_encoders_get_their_cls_and_sep():
    tokenizer = word_piece_tokenizer()
    (tokens,) = Tokenization(tokenizer).tokenize([parse_candidates(TEXT_EXPLICIT)])
    for sequence, response in zip(tokens.sequences, ("Paris.", "Rome."), strict=True):
        assert sequence == tokenizer(f"{TEXT_EXPLICIT['prompt']}{response}")["input_ids"]
        assert (sequence[0], sequence[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id)


def test_without_eos_nothing_is_appended():
    tokenizer = small_tokenizer(eos=False, bos=False)
    (tokens,) = Tokenization(tokenizer).tokenize([parse_candidates(TEXT_EXPLICIT)])
    assert tokenizer.decode(tokens.sequences[0]) == "Capital of France? Paris."


def test_a_mixed_batch_gives_what_each_alone_gives():
    batch = [parse_candidates(rows[0]) for rows in KNOWN_TO_TRL.values()]
    tokenization = Tokenization(small_tokenizer())
    assert tokenization.tokenize(batch) == [tokenization.tokenize([candidates])[0] for candidates in batch]


@given(st.lists(st.text("ab \u00e9🙂", max_size=12), min_size=1, max_size=4), st.text("ab ", max_size=12))
def test_the_prompt_is_the_longest_beginning_all_share(responses, prompt):
    tokenizer = small_tokenizer()
    (tokens,) = Tokenization(tokenizer).tokenize([Candidates(prompt, tuple(responses))])
    assert tokens.sequences == [tokenizer(f"{prompt}{response}{EOS}")["input_ids"] for response in responses]
    if len(responses) > 1:
        starts = {tuple(ids[:1]) for ids in tokens.response_ids}
        assert len(starts) > 1 or starts == {()}


IDS = st.lists(st.integers(5, 30), max_size=12)
RESPONSES = st.lists(IDS, min_size=1, max_size=4)


@given(IDS, RESPONSES, st.integers(1, 20), st.booleans())
def test_truncation_cuts_one_slice_from_the_prompt(prompt, responses, max_length, bos):
    tokenizer = small_tokenizer()
    start = [tokenizer.bos_token_id] if bos else []
    whole = [start + prompt + response for response in responses]
    if not all(whole):
        return
    candidates = Candidates([], tuple(whole))
    (full,) = Tokenization(tokenizer).tokenize_each([candidates])
    (result,) = Tokenization(tokenizer, max_length).tokenize_each([candidates])
    over = max(map(len, whole)) - max_length
    if isinstance(result, RowFault):
        assert result.kind == "response_too_long"
        assert over > len(full.tokens.prompt_ids) - bos, "the prompt could not give so much"
        return
    kept, cut = len(start), max(over, 0)
    assert result.cut == cut
    assert result.tokens.sequences == [ids[:kept] + ids[kept + cut :] for ids in whole], "the same slice of all"
    assert result.tokens.response_ids == full.tokens.response_ids, "the ends stay whole"
    assert max(map(len, result.tokens.sequences)) == min(max(map(len, whole)), max_length)


def test_cls_is_kept_like_bos():
    tokenizer = word_piece_tokenizer()
    (tokens,) = Tokenization(tokenizer, 8).tokenize([parse_candidates(TEXT_EXPLICIT)])
    assert {(ids[0], ids[-1]) for ids in tokens.sequences} == {(tokenizer.cls_token_id, tokenizer.sep_token_id)}
    assert max(map(len, tokens.sequences)) == 8


LONG = Candidates("word " * 50, ("a", "b"))


@pytest.mark.parametrize("rule", ["drop", "error"])
def test_drop_and_error_leave_long_rows_as_faults(rule):
    short, fault = Tokenization(small_tokenizer(), 20, rule).tokenize_each([Candidates("", ("a", "b")), LONG])
    assert not isinstance(short, RowFault)
    assert fault.kind == "over_long"
    assert "--max_length 20" in fault.what


def faults(*batch, **options):
    results = Tokenization(small_tokenizer(**options), 20).tokenize_each(batch)
    return [result.kind if isinstance(result, RowFault) else None for result in results]


def test_faults_of_rows_stand_in_their_places():
    fine, padded, long = (
        Candidates("Q ", ("a", "b")),
        Candidates(f"Q {PAD}", ("a", "b")),
        Candidates("", ("word " * 50,) * 2),
    )
    assert faults(fine, padded, fine, Candidates("Q", ("a" * 200, "b" * 200)), fine) == [
        None, "pad_in_content", None, "response_too_long", None,
    ]  # fmt: skip
    assert faults(long) == [None], "responses that share their words lose the oldest of them"
    assert faults(Candidates("", ("", "a")), bos=False, eos=False) == ["empty_sequence"]


def test_a_template_that_refuses_a_row_is_that_rows_fault():
    refusing = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}x{% endfor %}"
    )
    bad = Candidates([{"role": "tool", "content": "x"}], ([PARIS], [ROME]))
    good, fault = Tokenization(small_tokenizer(chat_template=refusing)).tokenize_each(
        [Candidates([USER], ([PARIS], [ROME, USER])), bad]
    )
    assert not isinstance(good, RowFault)
    assert fault.kind == "template_error"
    assert "no tools" in fault.what


def test_what_a_run_cannot_begin_with_stops_at_once():
    with pytest.raises(UserError, match=r"no chat template.*--chat_template_path"):
        Tokenization(small_tokenizer(chat_template=None)).texts(parse_candidates(TURNS_EXPLICIT))
    padded_with_eos = small_tokenizer()
    padded_with_eos.pad_token = EOS
    with pytest.raises(UserError, match="pads with its end-of-text token"):
        Tokenization(padded_with_eos)
    with pytest.raises(UserError, match="--max_length 0"):
        Tokenization(small_tokenizer(), 0)


def test_one_call_raises_the_fault_of_its_row():
    with pytest.raises(RowFault, match="pad token"):
        Tokenization(small_tokenizer()).tokenize([Candidates("Q", (PAD, "a"))])


def test_a_win_between_the_same_tokens_is_a_fault():
    tokens = Tokens([1], [[2], [2], []])
    check_wins(tokens, [(0, 2), (2, 1)])
    with pytest.raises(RowFault, match="responses 1 and 0 are the same tokens"):
        check_wins(tokens, [(0, 2), (1, 0)])
