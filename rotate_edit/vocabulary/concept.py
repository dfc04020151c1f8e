"""Concepts: from a name and words to the tokens of one vocabulary, and to groups of these tokens."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from rotate_edit.errors import BadInput
from rotate_edit.models.batches import real_positions
from rotate_edit.vocabulary.tokens import decoder_of, ends_inside_character, has_no_case, is_byte_level, piece_text

# What a word is put between to see how it is split in running text. Special tokens are never written.
AFTER = " and"
BEFORE_SPACE = "the"
BEFORE_WORD = "\n"
NO_TOKEN = -1

Followed = Literal["token", "sequence", "left out"]


@dataclass(frozen=True)
class WordNote:
    """What became of one word in one vocabulary.

    Attributes:
        word: The word.
        followed: "token" if the word as written is one token, "sequence" if it is several, "left out" if the vocabulary
            cannot write it.
        tokens: Ids of its forms that are one token, ascending.
        sequences: Token ids of each of its forms that are several tokens.
        reason: Why it is not one token, as the end of a sentence. Empty for a token.
    """

    word: str
    followed: Followed
    tokens: tuple[int, ...]
    sequences: tuple[tuple[int, ...], ...]
    reason: str


@dataclass(frozen=True)
class TokenSet:
    """The tokens of one concept in one vocabulary.

    Attributes:
        name: The concept's name.
        ids: Ids of all forms of its words that are one token, int64 [n], ascending.
        words: These ids by word. Words without any are not in it.
        left_out: Words that the vocabulary cannot write.
        warnings: One sentence for each word that as written is not one token.
        sequences: Token ids of each form that is several tokens, by word. Words without any are not in it.
        notes: What became of each word, in the order given.
    """

    name: str
    ids: Tensor
    words: dict[str, tuple[int, ...]]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]
    sequences: dict[str, tuple[tuple[int, ...], ...]] = field(default_factory=dict)
    notes: tuple[WordNote, ...] = ()

    @property
    def every_sequence(self) -> tuple[tuple[int, ...], ...]:
        """The sequences of all words, each once."""
        return tuple(dict.fromkeys(sequence for found in self.sequences.values() for sequence in found))


def token_texts(tokenizer: Any) -> list[str]:
    """Decode every token id of a tokenizer on its own.

    A leading space is kept as a space. `decode` would drop it, although it marks the beginning of a word. So byte-level
    pieces (GPT-2, Llama 3, Qwen) are decoded through the byte alphabet here. SentencePiece's mark is turned into a
    space.

    Args:
        tokenizer: A transformers tokenizer.

    Returns:
        The text of every token id. An id without a piece has the empty text.
    """
    pieces: list[str] = [""] * (max(tokenizer.get_vocab().values()) + 1)
    for piece, index in tokenizer.get_vocab().items():
        pieces[index] = piece
    byte_level = is_byte_level(pieces, decoder_of(tokenizer))
    return [piece_text(piece, byte_level) for piece in pieces]


def plural(word: str) -> str:
    """Form the English plural of the last word of a phrase with the `inflect` library.

    Args:
        word: A word or phrase.

    Returns:
        The plural; the word itself if it has none.
    """
    return _inflections().plural_noun(word) or word


@lru_cache(maxsize=1)
def _inflections() -> Any:
    import inflect

    return inflect.engine()


def find_tokens(
    name: str, words: list[str], tokenizer: Any, texts: list[str], *, plurals: bool = False, required: bool = True
) -> TokenSet:
    """Find the tokens of a concept's words, as the tokenizer writes them in the middle of a sentence.

    Each word has several forms: as written and capitalised, with a leading space and without. A form without its space
    is the inside of other words (*ant* in *giant*). So it counts only where it is capitalised or its script has no
    upper and lower case.

    A form that is one token is followed by that token. A capitalised form of a word that as written is several tokens
    is not: it is mostly a name. A form that is several tokens is followed where all of them
    stand together. Its first token alone is never followed, since that is often another word: *putter* begins with
    ` put`. Nothing in a vocabulary tells such a word from a mere beginning.

    Args:
        name: The concept's name.
        words: The concept's words.
        tokenizer: A transformers tokenizer.
        texts: Text of every token id (`token_texts`). Ids beyond its end have no row in the model.
        plurals: Whether each word is also looked up in the plural.
        required: Whether at least one form of a word must be one token.

    Returns:
        The concept's tokens and sequences.

    Raises:
        BadInput: If `required` is True and no form of any word is one token.
    """
    notes = tuple(_note(word, tokenizer, texts, plurals) for word in dict.fromkeys(words))
    ids = sorted({index for note in notes for index in note.tokens})
    if required and not ids:
        raise BadInput(
            f"concept {name!r}: none of its words ({', '.join(words)}) is one token of this tokenizer; "
            "add words that are common enough to be tokens of their own."
        )
    return TokenSet(
        name=name,
        ids=torch.tensor(ids, dtype=torch.int64),
        words={note.word: note.tokens for note in notes if note.tokens},
        left_out=tuple(note.word for note in notes if note.followed == "left out"),
        warnings=tuple(_warning(name, note, texts) for note in notes if note.followed != "token"),
        sequences={note.word: note.sequences for note in notes if note.sequences},
        notes=notes,
    )


def described_words(tokens: TokenSet, texts: list[str]) -> list[list[str]]:
    """Describe what became of each word of a concept.

    Args:
        tokens: The concept's tokens.
        texts: Text of every token id (`token_texts`).

    Returns:
        For each word and each way in which it is followed a row: the word, the way, and its tokens with their ids. A
        word stands in its first row only.
    """
    rows = []
    for note in tokens.notes:
        single = ", ".join(_with_id(index, texts) for index in note.tokens)
        split = [" + ".join(_with_id(index, texts) for index in sequence) for sequence in note.sequences]
        ways = [("token", single)] * bool(single) + [("sequence", one) for one in split]
        if note.followed == "left out":
            ways = [("left out", note.reason)]
        rows += [[note.word if not place else "", *way] for place, way in enumerate(ways)]
    return rows


def sequence_starts(batch: Tensor, sequence: Sequence[int]) -> Tensor:
    """Find where a sequence of tokens begins.

    Args:
        batch: Token ids, int64 [rows, length].
        sequence: The token ids that stand together, at least one.

    Returns:
        True at the first token of each place where the whole sequence stands, bool [rows, length].
    """
    starts = torch.zeros_like(batch, dtype=torch.bool)
    places = batch.shape[1] - len(sequence) + 1
    if places > 0:
        windows = batch.unfold(1, len(sequence), 1)
        starts[:, :places] = (windows == torch.tensor(sequence, device=batch.device)).all(dim=-1)
    return starts


def sequence_positions(
    batch: Tensor, sequences: Iterable[Sequence[int]], lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find where words of several tokens stand.

    Args:
        batch: Token ids, int64 [rows, length].
        sequences: Token ids of each word (`TokenSet.every_sequence`).
        lengths: Number of real tokens in each row, int64 [rows]. What follows is padding. None if there is none.

    Returns:
        Two masks, bool [rows, length]. The first is True at the last token of each place where a whole sequence stands.
        The second is True at the position before its first token. A sequence at the beginning of a row has none.
    """
    last, before = torch.zeros_like(batch, dtype=torch.bool), torch.zeros_like(batch, dtype=torch.bool)
    if lengths is not None:
        batch = batch.where(real_positions(batch, lengths).to(batch.device), NO_TOKEN)
    for sequence in sequences:
        starts = sequence_starts(batch, sequence)
        last[:, len(sequence) - 1 :] |= starts[:, : batch.shape[1] - len(sequence) + 1]
        before[:, :-1] |= starts[:, 1:]
    return last, before


def group_tokens(rows: Tensor, ids: Tensor, distance: float) -> list[Tensor]:
    """Divide a concept's tokens into groups that point the same way.

    A concept is seldom one direction. The breeds of dogs are one group and the kennel another, carried by other
    neurons. The groups come from average linkage on cosine distance.

    Args:
        rows: The tokens' vectors less the vocabulary's mean, float32 [n, d_model].
        ids: Token ids, int64 [n].
        distance: Cosine distance at which the linkage is cut. 2 leaves one group.

    Returns:
        Token ids of each group, int64 each, the largest group first.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    if len(ids) < 2:
        return [ids]
    unit = torch.nn.functional.normalize(rows.cpu().double(), dim=1).numpy()
    labels = torch.from_numpy(fcluster(linkage(unit, "average", metric="cosine"), distance, "distance"))
    groups = [ids[labels == label] for label in labels.unique()]
    return sorted(groups, key=lambda group: (-len(group), int(group[0])))


def _note(word: str, tokenizer: Any, texts: list[str], plurals: bool) -> WordNote:
    tokens: set[int] = set()
    sequences: dict[tuple[int, ...], None] = {}
    # The plural is English.
    spellings = [word, plural(word)] if plurals and not has_no_case(word[:1]) else [word]
    usual = [_written(_usual(spelling), tokenizer, texts) for spelling in spellings]
    if not usual[0]:
        return WordNote(word, "left out", (), (), "cannot be written with the tokens of this model")
    for spelling, ids in zip(spellings, usual, strict=True):
        for form in _forms(spelling):
            found = _written(form, tokenizer, texts)
            # A capitalised form alone is a name (*Blanch* of *Blanchett*) where the word as written is no token.
            if len(found) == 1 and (len(ids) == 1 or form.strip() == spelling):
                tokens.add(found[0])
            elif len(found) > 1:
                sequences[found] = None
    whole = len(usual[0]) == 1
    reason = "" if whole else f"is split into {_told(usual[0], texts)}"
    return WordNote(word, "token" if whole else "sequence", tuple(sorted(tokens)), tuple(sequences), reason)


def _usual(spelling: str) -> str:
    """How a word mostly stands in running text: behind a space where its script has upper and lower case."""
    return spelling if has_no_case(spelling[:1]) else f" {spelling}"


def _forms(spelling: str) -> Iterator[str]:
    """The forms of a spelling that are looked for, with and without a leading space."""
    for form in dict.fromkeys([spelling, spelling[:1].upper() + spelling[1:]]):
        yield f" {form}"
        if form[:1].isupper() or has_no_case(form[:1]):
            yield form


def _written(form: str, tokenizer: Any, texts: list[str]) -> tuple[int, ...]:
    """The tokens of a form in running text. None where the vocabulary has no such token or it joins its neighbours."""
    before = BEFORE_SPACE if form.startswith(" ") else BEFORE_WORD
    start, frame, whole = (
        tuple(tokenizer.encode(text, add_special_tokens=False))
        for text in (before, before + AFTER, before + form + AFTER)
    )
    end = frame[len(start) :]
    inside = whole[len(start) : len(whole) - len(end)]
    if whole != start + inside + end or any(not _known(index, tokenizer, texts) for index in inside):
        return ()
    # Where the script has no case a space in front tells nothing.
    skipped = next((place for place, index in enumerate(inside) if texts[index].strip()), 0)
    return inside[skipped:] if has_no_case(form[1:2]) else inside


def _known(index: int, tokenizer: Any, texts: list[str]) -> bool:
    return index < len(texts) and bool(texts[index]) and index != tokenizer.unk_token_id


def _with_id(index: int, texts: list[str]) -> str:
    return f"{texts[index]!r} {index}"


def _told(ids: Sequence[int], texts: list[str]) -> str:
    if any(ends_inside_character(texts[index]) for index in ids):
        return f"{len(ids)} tokens, some of them parts of a character"
    return " + ".join(repr(texts[index]) for index in ids)


def _warning(name: str, note: WordNote, texts: list[str]) -> str:
    if note.followed == "left out":
        return f"concept {name!r}: {note.word!r} is left out, because it {note.reason}."
    others = ", ".join(repr(texts[index]) for index in note.tokens)
    beside = f", and by {others}" if others else ""
    return (
        f"concept {name!r}: {note.word!r} {note.reason}; it is followed where these tokens stand together{beside}, "
        "and not by the first of them alone."
    )
