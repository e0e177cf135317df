"""The split depends on content only: no prompt is on both sides, whatever the order."""

import math
import random

from hypothesis import given
from hypothesis import strategies as st

from qlora_rm.preferences import Candidates, parse_candidates
from qlora_rm.preferences.prefixes import shared_length
from qlora_rm.preferences.split import digest, hold_out, lowest, prompt_key, repeat
from tests.preferences.rows_for_tests import HH, PARIS, ROME, USER

KEYS = st.lists(st.integers(0, 30).map(lambda n: digest(str(n).encode())), min_size=1)
FRACTION = st.floats(0, 0.999)
INDICES = st.integers(0, 40).map(lambda n: list(range(n)))
ORDER = [digest(bytes([n])) for n in range(50)]


@given(KEYS, FRACTION)
def test_no_prompt_stands_on_both_sides_and_the_share_is_met(keys, fraction):
    held = hold_out(keys, fraction)
    inside = {key for key, is_held in zip(keys, held, strict=True) if is_held}
    outside = {key for key, is_held in zip(keys, held, strict=True) if not is_held}
    assert not inside & outside
    assert len(inside) == math.ceil(fraction * len(set(keys)))


@given(KEYS, FRACTION, st.randoms(use_true_random=False))
def test_order_and_repetition_do_not_matter(keys, fraction, rng: random.Random):
    held = dict(zip(keys, hold_out(keys, fraction), strict=True))
    shuffled = rng.sample(keys, len(keys)) + keys[:3]
    assert dict(zip(shuffled, hold_out(shuffled, fraction), strict=True)) == held


@given(INDICES, st.integers(0, 50))
def test_lowest_is_a_fixed_choice_that_grows(indices, count):
    chosen = lowest(indices, ORDER, count)
    assert chosen == sorted(chosen)
    assert len(chosen) == min(count, len(indices))
    assert set(chosen) == set(lowest(indices[::-1], ORDER, count))
    assert set(chosen) <= set(lowest(indices, ORDER, count + 1))


@given(INDICES, st.floats(0.01, 5))
def test_weights_repeat_whole_sets_and_a_share(indices, weight):
    taken = repeat(indices, weight, ORDER)
    assert abs(len(taken) - weight * len(indices)) <= 0.5 + 1e-9
    for index in indices:
        assert math.floor(weight) <= taken.count(index) <= math.floor(weight) + 1


def test_one_question_has_one_key_however_it_is_asked():
    question = "Capital of France?"
    asked = {"role": "user", "content": question}
    ways = [
        {"prompt": question, "chosen": "a", "rejected": "b"},
        {"prompt": f"  {question}\n", "chosen": "c", "rejected": "d"},
        {"prompt": [asked], "chosen": [PARIS], "rejected": [ROME]},
        {"chosen": [asked, PARIS], "rejected": [asked, ROME]},
        {"prompt": f"\n\nHuman: {question}\n\nAssistant:", "chosen": " a", "rejected": " b"},
        HH,
        {"conversations": [{"from": "human", "value": question}], "chosen": "a", "rejected": "b"},
    ]  # fmt: skip
    assert len({prompt_key(parse_candidates(row)) for row in ways}) == 1
    others = [{**ways[0], "prompt": "Capital of Italy?"}, {**ways[2], "prompt": [USER, PARIS, USER]}]
    assert len({prompt_key(parse_candidates(row)) for row in [ways[0], *others]}) == 3


def test_implicit_prompts_are_what_the_responses_share():
    one = Candidates("", ("Q: capital? A: Paris it is", "Q: capital? A: Rome"))
    two = Candidates("", ("Q: capital? A: Parma", "Q: capital? A: Pisa"))
    assert prompt_key(one) == prompt_key(two), "the shared P of two responses is no part of the prompt"
    nothing = [Candidates("", ("abc", "xyz")), Candidates("", ("def", "xyz"))]
    assert prompt_key(nothing[0]) != prompt_key(nothing[1]), "rows that share nothing are no single prompt"
    assert prompt_key(Candidates([], ([1, 2, 3], [1, 2, 4]))) == prompt_key(Candidates([], ([1, 2, 5], [1, 2, 6])))


@given(st.lists(st.text("ab", max_size=6), min_size=1, max_size=5))
def test_shared_length_is_the_longest_common_beginning(texts):
    shared = shared_length(texts)
    assert all(text[:shared] == texts[0][:shared] for text in texts)
    assert any(len(text) == shared for text in texts) or len({text[: shared + 1] for text in texts}) > 1
