"""Generate text with a loaded model."""

from collections.abc import Sequence
from typing import Any

import torch

from rotate_edit.errors import BadInput


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    new_tokens: int = 40,
    samples: int = 1,
    seed: int | None = None,
    temperature: float = 1.0,
    rows_at_once: int = 64,
    special_tokens: bool = True,
) -> list[list[str]]:
    """Continue each prompt with generated texts.

    The texts come without the prompt. The same seed draws the same random numbers for the base and the edited model.
    Torch's own generator is left as it was.

    Args:
        model: A loaded transformers model.
        tokenizer: Its tokenizer.
        prompts: The prompts, as texts or as token ids.
        new_tokens: Most tokens in a continuation.
        samples: Number of continuations for each prompt.
        seed: Seed of the draw from the whole vocabulary; None for greedy decoding.
        temperature: Temperature of the draw. Greedy decoding ignores it.
        rows_at_once: Most continuations generated in one batch.
        special_tokens: Whether the tokenizer adds its own, such as one at the beginning. A chat template holds them.

    Returns:
        For each prompt, a list of `samples` texts.
    """
    device = next(model.parameters()).device
    encoded = [_encoded(tokenizer, prompt, special_tokens) or [first_token(tokenizer)] for prompt in prompts]
    rows = [index for index in range(len(encoded)) for _ in range(samples)]
    texts: list[list[str]] = [[] for _ in prompts]
    # Every setting is given, because a checkpoint's generation_config.json may hold other ones.
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    if seed is not None:
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for start in range(0, len(rows), rows_at_once):
            chosen = rows[start : start + rows_at_once]
            width = max(len(encoded[index]) for index in chosen)
            ids = torch.zeros(len(chosen), width, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, index in enumerate(chosen):
                ids[row, width - len(encoded[index]) :] = torch.tensor(encoded[index])
                mask[row, width - len(encoded[index]) :] = 1
            if seed is not None:
                torch.manual_seed(seed + start)
            with torch.no_grad():
                written = model.generate(
                    input_ids=ids.to(device),
                    attention_mask=mask.to(device),
                    max_new_tokens=new_tokens,
                    num_beams=1,
                    repetition_penalty=1.0,
                    pad_token_id=padding_token(tokenizer),
                    **choice,
                )
            for index, row_ids in zip(chosen, written[:, width:], strict=True):
                texts[index].append(tokenizer.decode(row_ids, skip_special_tokens=True))
    return texts


def as_user(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Put each prompt in the tokenizer's chat template, as what a user says to the model.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        prompts: The prompts.

    Returns:
        The texts up to where the model's answer begins, special tokens in them.

    Raises:
        BadInput: When the template cannot be filled in.
    """
    try:
        return [
            str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
                )
            )
            for prompt in prompts
        ]
    except Exception as error:
        # A template is code of whoever made the model, and may end in any error.
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BadInput(
            f"the tokenizer's chat template cannot be filled in ({reason}); compare goes without it with --plain, and "
            "evaluate.text replaces text that the model writes."
        ) from error


def _encoded(tokenizer: Any, prompt: str | Sequence[int], special_tokens: bool) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    return list(tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"])


def padding_token(tokenizer: Any) -> int:
    """Choose a token to pad rows with.

    Args:
        tokenizer: A transformers tokenizer.

    Returns:
        The id of its padding, end or beginning token, in this order; 0 if it has none.
    """
    for index in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        if index is not None:
            return int(index)
    return 0


def first_token(tokenizer: Any) -> int:
    """Choose the token with which a text without a prompt starts.

    Args:
        tokenizer: A transformers tokenizer.

    Returns:
        The id of its beginning token, or of its padding token if it has none.
    """
    return int(tokenizer.bos_token_id if tokenizer.bos_token_id is not None else padding_token(tokenizer))
