"""Concepts: from a name and words to the tokens of one vocabulary, and to groups of these tokens."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotate_edit.errors import BadInput
from rotate_edit.vocabulary.tokens import decoder_of, is_byte_level

MOST_OTHER_WORDS = 5


@dataclass(frozen=True)
class TokenSet:
    """The tokens of one concept in one vocabulary.

    Attributes:
        name: The concept's name.
        ids: Token ids, int64 [n], ascending.
        words: Token ids of each usable word.
        left_out: Words that no token stands for.
        warnings: One sentence for each word that was left out or is followed by its first token only.
    """

    name: str
    ids: Tensor
    words: dict[str, tuple[int, ...]]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]


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
    if is_byte_level(pieces, decoder_of(tokenizer)):
        alphabet = _byte_alphabet()
        return [_from_bytes(piece, alphabet) for piece in pieces]
    return [piece.replace("\u2581", " ") for piece in pieces]


def plural(word: str) -> str:
    """Form the English plural of the last word of a phrase with the `inflect` library.

    Args:
        word: A word or phrase.

    Returns:
        The plural; the word itself if it has none.
    """
    import inflect

    engine = inflect.engine()
    return engine.plural_noun(word) or word


def find_tokens(
    name: str, words: list[str], tokenizer: Any, texts: list[str], *, plurals: bool = False, required: bool = True
) -> TokenSet:
    """Find the token ids of a concept's words.

    Each word is looked up with and without a leading space, as written and capitalised. The tokenizer may split a word.
    Such a word is followed by its first token if that token begins at most five other words of the vocabulary.
    Otherwise it is left out.

    Args:
        name: The concept's name.
        words: The concept's words.
        tokenizer: A transformers tokenizer.
        texts: Text of every token id (`token_texts`).
        plurals: Whether each word is also looked up in the plural.
        required: Whether at least one word must be usable.

    Returns:
        The concept's tokens.

    Raises:
        BadInput: If `required` is True and no word is usable.
    """
    index_of = {text: index for index, text in enumerate(texts) if text}
    known: dict[str, tuple[int, ...]] = {}
    left_out: list[str] = []
    warnings: list[str] = []
    for word in dict.fromkeys(words):
        forms = [word, plural(word)] if plurals else [word]
        ids = sorted({index for form in forms for index in _whole_tokens(form, index_of)})
        if ids:
            known[word] = tuple(ids)
            continue
        first = _first_token(word, tokenizer, texts)
        others = _words_beginning_with(texts[first], texts) if first is not None else []
        if first is not None and len(others) <= MOST_OTHER_WORDS:
            known[word] = (first,)
            warnings.append(
                f"concept {name!r}: {word!r} is split by the tokenizer and is followed by its first token "
                f"{texts[first]!r} only, which begins {len(others)} other words."
            )
        else:
            left_out.append(word)
            reason = "has no token of its own" if first is None else f"begins with {texts[first]!r} like many words"
            warnings.append(
                f"concept {name!r}: {word!r} is left out, because it is split by the tokenizer and {reason}."
            )
    if required and not known:
        raise BadInput(
            f"concept {name!r}: none of its words ({', '.join(words)}) is usable with this tokenizer; "
            "add words that are common enough to be tokens of their own."
        )
    ids = sorted({index for found in known.values() for index in found})
    return TokenSet(name, torch.tensor(ids, dtype=torch.int64), known, tuple(left_out), tuple(warnings))


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


def _whole_tokens(word: str, index_of: dict[str, int]) -> list[int]:
    spellings = {word, word[:1].upper() + word[1:]}
    forms = [f"{space}{spelling}" for spelling in spellings for space in (" ", "")]
    # A word without its space is the inside of other words ("ant" in "giant") unless it is capitalised.
    return [index_of[form] for form in forms if form in index_of and (form[0] == " " or form[0].isupper())]


def _first_token(word: str, tokenizer: Any, texts: list[str]) -> int | None:
    frame = tokenizer.encode("the", add_special_tokens=False)
    ids = tokenizer.encode(f"the {word}", add_special_tokens=False)
    if ids[: len(frame)] != frame:
        return None
    for index in ids[len(frame) :]:
        if texts[index].strip():
            return index if texts[index].startswith(" ") else None
    return None


def _words_beginning_with(text: str, texts: list[str]) -> list[str]:
    return [other for other in texts if other.startswith(text) and other != text and re.fullmatch(r" [^\W\d_]+", other)]


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, inverted (GPT-2's published alphabet)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(rest)}


def _from_bytes(piece: str, alphabet: dict[str, int]) -> str:
    if not all(character in alphabet for character in piece):
        return piece
    return bytes(alphabet[character] for character in piece).decode("utf-8", errors="replace")
