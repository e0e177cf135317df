"""The demo's backbone: a tokenizer and a small Llama, trained from scratch as a language model.

The result is an ordinary `LlamaForCausalLM` folder, like a download from a hub.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora_rm.console import say
from qlora_rm.preferences.comparison import Message
from qlora_rm.progress import Phase

BOS, TURN, EOS, RESERVED = "<|begin|>", "<|turn|>", "<|end|>", "<|reserved_0|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|turn|>' + message['role'] + '\n' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
POOL = 8  # batches drawn together, to sort their conversations by length
IGNORED = -100  # label of padding in transformers' loss


@dataclass(frozen=True)
class Recipe:
    """Shape and pretraining of the backbone. All linear widths are multiples of 64, NF4's block size."""

    vocab_size: int = 2048
    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 4
    heads: int = 4
    context: int = 1024
    steps: int = 620
    conversations_per_step: int = 16
    learning_rate: float = 5e-3


def write_backbone(
    folder: Path, corpus: Sequence[Sequence[Message]], *, seed: int = 0, recipe: Recipe | None = None
) -> None:
    """Train a tokenizer and a small causal LM on `corpus` and save both into `folder`.

    Arguments:
        folder: created if missing.
        corpus: conversations, each a sequence of role/content turns.
        seed: the same seed gives the same weights (on the same machine and number of threads).
        recipe: shape and length of the pretraining.
    """
    recipe = recipe or Recipe()
    tokenizer = train_tokenizer(corpus, recipe.vocab_size)
    texts = [tokenizer.apply_chat_template(list(turns), tokenize=False) for turns in corpus]
    sequences = tokenizer(texts, add_special_tokens=False)["input_ids"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(tokenizer, recipe))
        nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
        say(f"backbone: {model.num_parameters():,} parameters, {len(tokenizer):,} tokens, {len(texts):,} conversations")
        pretrain(model, sequences, recipe)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_tokenizer(corpus: Sequence[Sequence[Message]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with a chat template and a reserved token that can be the pad token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, TURN, EOS, RESERVED],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((f"{turn['role']}\n{turn['content']}" for turns in corpus for turn in turns), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=BOS, eos_token=EOS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _config(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


def pretrain(model: LlamaForCausalLM, sequences: list[list[int]], recipe: Recipe) -> None:
    """Train on next tokens with AdamW: a short warm-up, then a linear decay to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    warm_up = max(1, recipe.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (recipe.steps - step) / (recipe.steps - warm_up + 1))
    )
    model.train()
    data = batches(sequences, recipe.conversations_per_step)
    losses: list[float] = []
    with Phase("training the demo's backbone", recipe.steps, "steps") as phase:
        for _ in range(recipe.steps):
            input_ids, labels = (tensor.to(model.device) for tensor in next(data))
            loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            phase.advance()
            losses.append(loss.item())
            phase.note = f"loss {losses[-1]:.3f}"
    say(f"backbone: trained for {recipe.steps} steps, loss {losses[0]:.3f} at first, {losses[-1]:.3f} at the end")
    model.eval()


def batches(sequences: list[list[int]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield endless right-padded (input_ids, labels), each [size, T], in random order and of similar lengths.

    Causal attention never attends to padding on the right, so there is no attention mask.
    """
    pool = POOL * size
    assert len(sequences) >= pool
    while True:
        order = torch.randperm(len(sequences)).tolist()
        for start in range(0, len(order) - pool + 1, pool):
            drawn = sorted((sequences[index] for index in order[start : start + pool]), key=len)
            for batch in torch.randperm(POOL).tolist():
                rows = [torch.tensor(ids) for ids in drawn[batch * size : (batch + 1) * size]]
                yield (
                    pad_sequence(rows, batch_first=True),
                    pad_sequence(rows, batch_first=True, padding_value=IGNORED),
                )
