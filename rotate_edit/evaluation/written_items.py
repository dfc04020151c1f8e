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
