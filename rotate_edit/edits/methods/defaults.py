"""Which edit method a recipe gets that names none, and which one `edit.embeddings` puts beside it."""

from collections.abc import Sequence

ROWS_METHOD = "token-embeddings"
# With neurons edited too, so much of a concept is taken out of its embedding rows at most. Without it the neurons'
# direction has nothing to push against, and past 1 the rows point the other way, where the neurons' change raises the
# concept.
ROWS_AT_MOST = 0.75


# What is removed of a concept: what the model knows of it, or only its words.
KNOWLEDGE, WORDS = "knowledge", "words"


def default_method(
    matrices: Sequence[str], *, remove: str, layers_named: bool, embeddings: bool, amplified: Sequence[bool]
) -> str:
    """The method that `auto` stands for.

    Knowledge is taken by the gradient of text about the concept and by its tokens' rows. For words alone a low-rank fit
    does least damage; it needs the last layer. Beside embedding rows it comes back sooner than a rank-one edit when it
    is relearned. What neurons write raises a concept where it is likely anyway; its tokens' logits raise it everywhere.

    Args:
        matrices: The kinds of matrices that may be edited. Empty where the recipe names none.
        remove: `KNOWLEDGE` or `WORDS`.
        layers_named: Whether only some layers may be edited.
        embeddings: Whether the concept's embedding rows are edited too.
        amplified: For each concept whether it is amplified.
    """
    if remove == KNOWLEDGE and not any(amplified) and not embeddings:
        return "remove-concept"
    if matrices and "out" not in matrices:
        return "channel-located"
    if layers_named or (embeddings and not any(amplified)):
        return "rank-one"
    return "token-logits" if all(amplified) else "silence-words"
