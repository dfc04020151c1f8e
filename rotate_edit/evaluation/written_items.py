"""Evaluation items made from text that the model writes itself about its concepts and about other things."""

from collections.abc import Mapping, Sequence
from typing import Any

from rotate_edit.errors import BadInput
from rotate_edit.evaluation.tasks import Items
from rotate_edit.evaluation.text_tasks import items_from_documents
from rotate_edit.models.prompted_text import OTHER_SUBJECTS, prompted_text, prompts_about

SOURCE = "the text that the model wrote itself"


def written_items(
    model: Any,
    tokenizer: Any,
    words: Mapping[str, Sequence[str]],
    neighbour_words: Mapping[str, Sequence[str]],
    *,
    texts: int,
    seed: int,
    plurals: bool = False,
) -> Items:
    """Let a model write about its concepts and about other things, and make items from it.

    Args:
        model: The loaded base.
        tokenizer: Its tokenizer.
        words: Each concept's words, by concept.
        neighbour_words: The words of each concept's neighbours, by concept.
        texts: How many texts are written about each concept, and as many about other things.
        seed: Seed of the draw.
        plurals: Look for the plurals of the words too.

    Returns:
        The items.

    Raises:
        BadInput: The model does not name a concept often enough in its own text about it.
    """
    subjects = {name: list(dict.fromkeys([name, *own])) for name, own in words.items()}
    taken = {word.casefold() for own in (*subjects.values(), *neighbour_words.values()) for word in own}
    others = [subject for subject in OTHER_SUBJECTS if not taken & {subject, *subject.split()}]
    asked = {name: prompts_about(tokenizer, own, texts) for name, own in subjects.items()}
    asked_others = prompts_about(tokenizer, others, texts)
    every = [prompt for prompts in (*asked.values(), asked_others) for prompt in prompts]
    written = iter(prompted_text(model, tokenizer, every, seed=seed))
    about = {name: [next(written) for _ in prompts] for name, prompts in asked.items()}
    try:
        return items_from_documents(
            about, list(written), words, neighbour_words, tokenizer, source=SOURCE, plurals=plurals
        )
    except BadInput as error:
        raise BadInput(
            f"{str(error).rstrip('.')}; or give your own text with evaluate.text (a file or a folder)."
        ) from error


def stand_in_items(
    tokenizer: Any, words: Mapping[str, Sequence[str]], *, texts: int, plurals: bool = False
) -> Items | None:
    """Items of about the size of those that a model would write, for an estimate of what measuring them takes.

    Args:
        tokenizer: The model's tokenizer.
        words: Each concept's words, by concept.
        texts: How many texts are written about each concept, and as many about other things.
        plurals: Look for the plurals of the words too.

    Returns:
        The items. None where no word of a concept can be followed.
    """
    about = {
        name: [_stand_in(own[number % len(own)], number) for number in range(texts)] for name, own in words.items()
    }
    others = [_stand_in("evening", number) for number in range(texts)]
    try:
        return items_from_documents(about, others, words, {}, tokenizer, source=SOURCE, plurals=plurals)
    except BadInput:
        return None


def _stand_in(word: str, number: int) -> str:
    """About 64 tokens that name a word twice."""
    return (
        f"In the year {number} everybody in the old town had heard about the {word}. Some of them went to see it with "
        f"their friends after work, and they stayed until number {number} closed. The newspaper wrote that the {word} "
        f"had never been so close to the river before, and that more of it would come soon."
    )
