"""The concepts for bookworm: their file is consistent and every word is usable."""

import runpy
from collections import Counter
from types import SimpleNamespace

import pytest
from places import ROOT

SHARED = ROOT.parent / "shared"
check = SimpleNamespace(**runpy.run_path(str(ROOT / "evals/bookworm/check.py")))


def plenty(content):
    """Counts in which every word occurs often enough."""
    words = {word for concept in content["concepts"] for word in [*concept["words"], *concept["neighbours"]]}
    return {split: Counter(dict.fromkeys(words, 1000)) for split in content["texts"]}, words


def test_the_file_is_consistent():
    content = check.read_concepts()
    counts, words = plenty(content)
    assert len(content["concepts"]) >= 24
    assert check.errors_in(content, counts, words) == []


def test_what_is_wrong_is_named():
    content = check.read_concepts()
    counts, words = plenty(content)
    counts["test"]["ship"] = counts["validation"]["ship"] = 3
    content["texts"]["test"].append(content["texts"]["validation"][0])
    content["concepts"][0]["neighbours"].append("boat")
    found = check.errors_in(content, counts, words - {"wolves"})
    assert "ships: 'ship' occurs 6 times." in found
    assert "a book stands in both splits." in found
    assert "ships has neighbours among its words: ['boat']." in found
    assert not [error for error in found if "royalty" in error]


def test_every_word_stands_for_a_token_of_bookworm():
    if not (SHARED / "models/bookworm").is_dir():
        pytest.skip("bookworm is not here")
    content = check.read_concepts()
    _, words = plenty(content)
    assert check.usable_words(content, str(SHARED / "models/bookworm")) == words


@pytest.mark.slow
def test_every_book_is_there_and_every_concept_is_common():
    if not (SHARED / "corpora/books").is_dir():
        pytest.skip("the books are not here")
    content = check.read_concepts()
    counts = check.count_words(content, SHARED / "corpora/books")
    _, words = plenty(content)
    assert check.errors_in(content, counts, words) == []
