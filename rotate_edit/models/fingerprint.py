"""Hashes that tell loaded models and tokenizers apart."""

import hashlib
import json
from typing import Any

import torch


def model_hash(model: Any) -> str:
    """Hash a loaded model: its configuration and every parameter as it stands now.

    Args:
        model: A loaded transformers model.

    Returns:
        The SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256(model.config.to_json_string(use_diff=False).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash everything that decides how a tokenizer splits a text or writes a chat.

    Args:
        tokenizer: A transformers tokenizer.

    Returns:
        The SHA-256 in hexadecimal.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    rules = fast.to_str() if fast is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    parts = [type(tokenizer).__name__, rules, str(tokenizer.special_tokens_map), str(tokenizer.chat_template)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
