"""Small generated tokenizers: byte-level BPE, so that text in any script has ids."""

from collections.abc import Iterable
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
    "What is the capital of France? The capital of France is Paris.",
    "Human: how do I boil an egg? Assistant: put the egg into boiling water for eight minutes.",
    "I am sorry, I cannot help with that. Please ask me something else.",
    "国会的转发。美国国会由众议院和参议院组成。Grüße aus Köln, ça va?",
)

CHATML = """{%- if tools %}<|im_start|>tools
{{ tools | tojson }}<|im_end|>
{% endif -%}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
{%- if shout is defined and shout %}!{% endif -%}"""

ENDS_WITH_EOS = """{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}</s>{% endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}"""

BOS, EOS, PAD = "<s>", "</s>", "<pad>"


def small_tokenizer(
    *, bos: bool = True, eos: bool = True, chat_template: str | None = CHATML, vocab_size: int = 600
) -> PreTrainedTokenizerFast:
    """Return a new tokenizer with a separate pad token.

    Arguments:
        bos: begin plain text with the bos token.
        eos: whether there is an eos token.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained(vocab_size, bos)),
        bos_token=BOS if bos else None,
        eos_token=EOS if eos else None,
        pad_token=PAD,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tokenizer_of(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return the same kind with merges learned from `texts`, for sequences of realistic length."""
    tokenizer = small_tokenizer().train_new_from_iterator(texts, vocab_size, show_progress=False)
    tokenizer.chat_template = CHATML  # retraining drops it
    return tokenizer


@cache
def _trained(vocab_size: int, bos: bool) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(word, special=True) for word in (BOS, EOS, PAD, "<|im_start|>", "<|im_end|>")],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    return tokenizer.to_str()


def word_piece_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer like BERT's: [CLS] text [SEP], no eos, no chat template."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(
        SENTENCES, trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def with_new_pad_token() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one entry more than its trained vocabulary: the pad token, last."""
    tokenizer = small_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    return tokenizer
