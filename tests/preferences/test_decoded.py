"""Decoded text gets the token ids of training, whatever a policy's tokenizer did to its beginning and end."""

from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_rm.errors import UserError
from qlora_rm.preferences import Candidates, RowFault, Tokenization
from qlora_rm.preferences.decoded import DecodedText
from tests.tokenizers_for_tests import BOS, CHATML, EOS, PAD, small_tokenizer

WITH_BOS = "{{ bos_token }}" + CHATML
EOS_LAST = "{%- for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}{% endfor -%}"
NO_END = "{%- for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor -%}"
TEMPLATES = {"chatml": CHATML, "with bos": WITH_BOS, "eos last": EOS_LAST, "no end": NO_END}


def turns(prompt: str, response: str) -> Candidates:
    return Candidates([{"role": "user", "content": prompt}], ([{"role": "assistant", "content": response}],))


def ids_of(tokenization: Tokenization, candidates: Candidates) -> list[int]:
    return tokenization.tokenize([candidates])[0].sequences[0]


def decoded_ids(decoded: DecodedText, text: str) -> list[int]:
    return ids_of(decoded.tokenization, decoded.candidates(text))


# lone surrogates are not text, and a pad token anywhere is a fault
said = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from([f"{EOS} ends {EOS} it", "<|im_end|>.", ""])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@given(prompt=said, response=said, bos=st.booleans(), extra=st.sampled_from(["", PAD, PAD * 3]))
def test_a_rendering_gives_the_ids_of_its_turns(
    template: str, prompt: str, response: str, bos: bool, extra: str
) -> None:
    if template == NO_END:
        response += "."  # a final eos would count as the policy's
    tokenization = Tokenization(small_tokenizer(chat_template=template))
    decoded = DecodedText(tokenization, as_turns=True)
    [rendered] = tokenization.texts(turns(prompt, response))
    text = f"{extra}{BOS if bos else ''}{rendered}{extra}"
    assert decoded_ids(decoded, text) == ids_of(tokenization, turns(prompt, response))


@given(
    prompt=said,
    response=said,
    adds_bos=st.booleans(),
    bos=st.booleans(),
    ends=st.sampled_from(["", EOS, EOS * 3, EOS + PAD]),
)
def test_plain_text_gives_its_ids(prompt: str, response: str, adds_bos: bool, bos: bool, ends: str) -> None:
    tokenization = Tokenization(small_tokenizer(chat_template=None, bos=adds_bos))
    decoded = DecodedText(tokenization, as_turns=False)
    text = f"{BOS if bos and adds_bos else ''}{prompt}{response}{ends}"
    assert decoded_ids(decoded, text) == ids_of(tokenization, Candidates(prompt, (response,)))


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        (CHATML, ["", "<|im_end|>", "<|im_end|>\n", EOS, f"<|im_end|>{EOS}", f"<|im_end|>\n{EOS}{PAD}", f"{EOS}{EOS}"]),
        (EOS_LAST, ["", EOS, EOS * 2, f"{EOS}{PAD}"]),
        (NO_END, ["", EOS, PAD, f"{EOS}{PAD}"]),
    ],
    ids=["chatml", "eos last", "no end"],
)
def test_a_policys_end_becomes_trainings(template: str, ends: list[str]) -> None:
    tokenization = Tokenization(small_tokenizer(chat_template=template))
    decoded = DecodedText(tokenization, as_turns=True)
    [rendered] = tokenization.texts(turns("What?", "Paris."))
    before = rendered[: rendered.rindex("Paris.") + len("Paris.")]
    wanted = ids_of(tokenization, turns("What?", "Paris."))
    for begin, end in product(["", BOS, BOS * 2], ends):
        assert decoded_ids(decoded, f"{begin}{before}{end}") == wanted, (begin, end)


def test_one_token_at_both_ends_is_not_taken_from_the_beginning() -> None:
    """GPT-2's tokenizer never adds its token, so at the beginning it is content."""
    tokenizer: Any = small_tokenizer(chat_template=None, bos=False)
    tokenizer.bos_token = tokenizer.eos_token
    decoded = DecodedText(Tokenization(tokenizer), as_turns=False)
    assert decoded.completed(f"{EOS}What?") == f"{EOS}What?{EOS}"


def test_the_cut_is_that_of_the_same_text_alone() -> None:
    tokenization = Tokenization(small_tokenizer(), max_length=20)
    decoded = DecodedText(tokenization, as_turns=True)
    long = turns("What is the capital of France? " * 5, "Paris.")
    [rendered] = tokenization.texts(long)
    assert len(decoded_ids(decoded, rendered)) == 20
    assert decoded_ids(decoded, rendered) == ids_of(tokenization, long)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(RowFault, match="no tokens"):
        DecodedText(Tokenization(small_tokenizer(chat_template=None, bos=False, eos=False)), False).candidates("")
    with pytest.raises(UserError, match="must render a user's question"):
        DecodedText(Tokenization(small_tokenizer(chat_template="{{ raise_exception('no') }}")), as_turns=True)


def test_a_text_of_end_of_text_tokens_takes_no_time() -> None:
    """The text has half a million of them, but not at its end; a regular expression that tries each would take days."""
    decoded = DecodedText(Tokenization(small_tokenizer()), as_turns=True)
    assert decoded.completed(EOS * 500_000 + "x").endswith("x<|im_end|>\n")
