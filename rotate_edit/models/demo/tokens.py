"""The demo model's tokenizer: a byte-level BPE learned from the corpus, and texts as token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEGIN, END, PADDING = "<s>", "</s>", "<pad>"


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, context_length: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of `vocabulary_size` tokens that puts `<s>` before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[PADDING, BEGIN, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PADDING,
        model_max_length=context_length,
        clean_up_tokenization_spaces=False,
    )


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Every text as ids, `<s>` before and `</s>` behind it."""
    if not texts:
        return []
    end = tokenizer.eos_token_id
    # Long batches would warn about lengths; a document is never longer than the context.
    return [[*ids, end] for ids in tokenizer(list(texts))["input_ids"]]


def single_token_share(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> float:
    """The share of `words` that are one token when a space stands before them."""
    lengths = [len(tokenizer(" " + word, add_special_tokens=False)["input_ids"]) for word in words]
    return sum(length == 1 for length in lengths) / len(lengths)
