"""Text that a model writes about given subjects, kept between runs."""

import math
from collections.abc import Sequence
from typing import Any

from rotate_edit.models.fingerprint import tokenizer_hash
from rotate_edit.models.generation import as_user, generate
from rotate_edit.models.text_cache import kept_text

VERSION = 1
NEW_TOKENS = 64
# Cooler than the model's own distribution, so that a small model keeps to the subject.
TEMPERATURE = 0.7
ROWS_AT_ONCE = 128
# What a chat model is asked, and how a text begins for a model without a chat template.
QUESTIONS = (
    "Write a short paragraph about {subject}.",
    "Tell me some facts about {subject}.",
    "Explain {subject} to a beginner.",
    "Write a short news report about {subject}.",
    "What should everybody know about {subject}?",
    "Write the first lines of an encyclopedia article about {subject}.",
    "Write a short story about {subject}.",
    "Describe the history of {subject} in a few sentences.",
)
OPENINGS = (
    "Here is a short paragraph about {subject}.",
    "Some facts about {subject}:",
    "A beginner's introduction to {subject}\n\n",
    "NEWS: A report on {subject}.",
    "What everybody should know about {subject}:",
    "From an encyclopedia, under the heading {subject}:",
    "Once upon a time there was a story about {subject}.",
    "A short history of {subject}\n\n",
)
# What text without a concept is about.
OTHER_SUBJECTS = (
    "the weather", "gardening", "railways", "mathematics", "cooking", "the sea", "music", "a family", "the economy",
    "history", "medicine", "the night sky", "painting", "computers", "a journey", "farming", "law", "school", "birds",
    "a city", "football", "languages", "clothes", "chemistry", "the government", "a friend", "films", "health",
    "a house", "mountains", "cars", "books", "animals", "religion", "philosophy", "ships", "money", "photography",
    "a hospital", "the police", "food", "trees", "physics", "an election", "theatre", "the internet", "rivers",
    "a wedding",
)  # fmt: skip


def prompts_about(tokenizer: Any, subjects: Sequence[str], count: int) -> list[list[int]]:
    """Make prompts that ask for text about subjects, each subject and each way of asking in turn.

    Args:
        tokenizer: A transformers tokenizer. Its chat template is used where it has one.
        subjects: What the text is to be about.
        count: How many prompts.

    Returns:
        Token ids of each prompt.
    """
    chat = bool(getattr(tokenizer, "chat_template", None))
    forms = QUESTIONS if chat else OPENINGS
    # The way of asking moves on by one more after each round of the subjects, so that every pair comes up.
    places = [divmod(number, len(subjects)) for number in range(count)]
    asked = [forms[(turn + place) % len(forms)].format(subject=subjects[place]) for turn, place in places]
    if chat:
        asked = as_user(tokenizer, asked)
    return [list(ids) for ids in tokenizer(asked, add_special_tokens=not chat)["input_ids"]]


def prompted_text(model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], *, seed: int) -> list[str]:
    """Return what a model writes after prompts, from the cache folder if it is there.

    The cache is used when the same weights wrote after the same prompts on the same kind of device.

    Args:
        model: A loaded transformers model.
        tokenizer: Its tokenizer.
        prompts: Token ids of each prompt.
        seed: Seed of the draw.

    Returns:
        One text for each prompt, of at most 64 tokens, drawn at temperature 0.7.
    """
    parts = {
        "version": VERSION,
        "tokenizer": tokenizer_hash(tokenizer),
        "prompts": [list(prompt) for prompt in prompts],
        "draw": [NEW_TOKENS, TEMPERATURE, ROWS_AT_ONCE, seed],
    }

    def write() -> list[str]:
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
        room = longest - max(len(prompt) for prompt in prompts)
        written = generate(
            model,
            tokenizer,
            prompts,
            new_tokens=int(max(1, min(NEW_TOKENS, room))),
            seed=seed,
            temperature=TEMPERATURE,
            rows_at_once=ROWS_AT_ONCE,
        )
        return [texts[0] for texts in written]

    def is_sound(texts: Any) -> bool:
        return isinstance(texts, list) and len(texts) == len(prompts) and all(isinstance(text, str) for text in texts)

    return kept_text("prompted", model, parts, write, is_sound)
