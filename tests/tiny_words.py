"""A random model over whole words, built in memory: every measure can be checked on it by hand."""

from typing import Any

import torch

SENTENCE = "the a dog cat bird fish ran sat saw ate on under mat tree and then it was big small"
WORDS = ["<pad>", "<bos>", *SENTENCE.split()]


def tiny_tokenizer() -> Any:
    """One token per word; no special tokens are added."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="it"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>")


def tiny_model(seed: int = 0, scale: float = 8.0, *, tied: bool = False) -> Any:
    """A two-layer random Llama whose predictions are far from uniform (`scale` times the usual first weights)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.02 * scale,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def ids(*words: str) -> torch.Tensor:
    """Token ids of words, int64."""
    return torch.tensor([WORDS.index(word) for word in words])
