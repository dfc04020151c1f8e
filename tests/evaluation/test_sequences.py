"""The probability of words of several tokens, against sums and products written out."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotate_edit.evaluation.sequences import concept_mass_at, concept_steps, positions_read

VOCABULARY = 6


def naive(
    rows: list[list[int]], lengths: list[int], ids: list[int], sequences: list[tuple[int, ...]], log: torch.Tensor
) -> tuple[list[tuple[int, int]], list[float]]:
    """Places and probabilities, position by position."""
    places, masses = [], []
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        for before in range(length - 1):
            start = before + 1
            words = [s for s in sequences if start + len(s) <= length and tuple(row[start : start + len(s)]) == s]
            mass = sum(float(log[number, before, index].exp()) for index in set(ids))
            if row[start] not in ids:
                if not words:
                    continue
                word = min(words, key=len)
                terms = [log[number, before + place, token] for place, token in enumerate(word)]
                mass += float(torch.stack(terms).sum().exp())
            places.append((number, before))
            masses.append(mass)
    return places, masses


@settings(deadline=None)
@given(st.data())
def test_the_mass_of_words_is_that_of_a_search_position_by_position(data: st.DataObject) -> None:
    token = st.integers(0, 3)
    width = data.draw(st.integers(1, 9))
    rows = data.draw(st.lists(st.lists(token, min_size=width, max_size=width), min_size=1, max_size=3))
    lengths = data.draw(st.lists(st.integers(1, width), min_size=len(rows), max_size=len(rows)))
    ids = data.draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=2, unique=True))
    sequences = data.draw(st.lists(st.lists(token, min_size=2, max_size=4).map(tuple), max_size=4))
    generator = torch.Generator().manual_seed(width)
    log = torch.randn(len(rows), width, VOCABULARY, generator=generator, dtype=torch.float64).log_softmax(-1)

    batch, concept = torch.tensor(rows), torch.tensor(ids)
    steps = concept_steps(batch, torch.tensor(lengths), concept, sequences)
    mass = concept_mass_at(log[positions_read(steps)], batch, steps, concept)
    places, expected = naive(rows, lengths, ids, sequences, log)
    assert [tuple(place) for place in (steps > 0).nonzero().tolist()] == places
    torch.testing.assert_close(mass, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_without_sequences_it_is_the_mass_of_the_tokens() -> None:
    batch, ids = torch.tensor([[1, 2, 3, 2]]), torch.tensor([2, 5])
    log = torch.randn(1, 4, VOCABULARY, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    steps = concept_steps(batch, torch.tensor([4]), ids)
    assert steps.tolist() == [[1, 0, 1, 0]]
    assert torch.equal(positions_read(steps), steps > 0)
    mass = concept_mass_at(log[steps > 0], batch, steps, ids)
    torch.testing.assert_close(mass, log[0, [0, 2]][:, ids].exp().sum(-1), rtol=1e-6, atol=0)


def test_a_word_has_one_probability_however_it_is_split() -> None:
    """The same word as one token and as two of which the second always follows the first."""
    whole, split = torch.tensor([[0, 1]]), torch.tensor([[0, 2, 3]])
    log = torch.full((1, 3, VOCABULARY), -torch.inf)
    log[0, 0, [1, 2]] = torch.tensor([0.3, 0.3]).log()
    log[0, 1, 3] = 0.0
    none, ids = torch.zeros(0, dtype=torch.int64), torch.tensor([1])
    steps = concept_steps(whole, torch.tensor([2]), ids)
    alone = concept_mass_at(log[:, :2][positions_read(steps)], whole, steps, ids)
    steps = concept_steps(split, torch.tensor([3]), none, [(2, 3)])
    assert steps.tolist() == [[2, 0, 0]]
    torch.testing.assert_close(concept_mass_at(log[positions_read(steps)], split, steps, none), alone)


def test_a_word_in_the_padding_is_no_place() -> None:
    batch = torch.tensor([[5, 1, 0, 0]])
    assert concept_steps(batch, torch.tensor([2]), torch.tensor([0]), [(1, 0)]).tolist() == [[0, 0, 0, 0]]
    assert concept_steps(batch, torch.tensor([3]), torch.tensor([4]), [(1, 0)]).tolist() == [[2, 0, 0, 0]]
