"""Which edit method a recipe gets that names none."""

from collections.abc import Sequence


def default_method(
    matrices: Sequence[str], *, layers_named: bool, embeddings: bool, amplified: Sequence[bool]
) -> str:
    """The method that `auto` stands for.

    A low-rank fit needs the last layer. Beside embedding rows it comes back sooner than a rank-one edit when it is
    relearned. What neurons write raises a concept where it is likely anyway; its tokens' logits raise it everywhere.

    Args:
        matrices: The kinds of matrices that may be edited.
        layers_named: Whether only some layers may be edited.
        embeddings: Whether the concept's embedding rows are edited too.
        amplified: For each concept whether it is amplified.
    """
    if "out" not in matrices:
        return "channel-located"
    if layers_named or (embeddings and not any(amplified)):
        return "rank-one"
    return "token-logits" if all(amplified) else "silence-words"
