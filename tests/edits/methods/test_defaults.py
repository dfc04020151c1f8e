"""The method that `auto` stands for, case by case."""

import pytest

from rotate_edit.edits.methods import declaration, method_names
from rotate_edit.edits.methods.defaults import KNOWLEDGE, ROWS_METHOD, WORDS, default_method


@pytest.mark.parametrize(
    ("matrices", "layers_named", "embeddings", "amplified", "method"),
    [
        (("out",), False, False, [False], "silence-words"),
        (("gate", "in", "out"), False, False, [False, False], "silence-words"),
        (("out",), False, False, [True], "token-logits"),
        (("out",), False, False, [True, True], "token-logits"),
        (("out",), False, False, [True, False], "silence-words"),
        (("out",), True, False, [False], "rank-one"),
        (("out",), True, False, [True], "rank-one"),
        (("out",), False, True, [False], "rank-one"),
        (("out",), False, True, [True], "token-logits"),
        (("out",), False, True, [True, False], "silence-words"),
        (("gate",), False, False, [False], "channel-located"),
        (("gate", "in"), True, True, [True], "channel-located"),
    ],
)
def test_the_method_follows_what_may_be_edited(
    matrices: tuple[str, ...], layers_named: bool, embeddings: bool, amplified: list[bool], method: str
) -> None:
    assert method in method_names()
    found = default_method(
        matrices, remove=WORDS, layers_named=layers_named, embeddings=embeddings, amplified=amplified
    )
    assert found == method
    # Knowledge is taken where something is only suppressed, whatever may be edited. Rows beside it are its own.
    knows = default_method(
        matrices, remove=KNOWLEDGE, layers_named=layers_named, embeddings=embeddings, amplified=amplified
    )
    assert knows == (method if any(amplified) or embeddings else "remove-concept")
    assert declaration("remove-concept").removes_knowledge
    # Every method that may be chosen can write one of the matrices, or the tokens' own rows.
    assert declaration(found).writes & {*matrices, "embedding"}


def test_the_rows_method_edits_both_tables() -> None:
    assert declaration(ROWS_METHOD).writes == {"embedding", "unembedding"}
