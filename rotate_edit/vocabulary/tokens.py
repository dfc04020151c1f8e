"""What a vector is projected on: vocabulary matrices, token weights, under-trained tokens and word masks.

This is maths only: tensors and token texts in, tensors out.
"""

import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rotate_edit.errors import BadInput

HIGH_NORM_WEIGHT = 1e-4
"""Weight of a token whose row norm lies above the percentile (published ROTATE reference settings)."""

UNUSED_PIECE = re.compile(
    r"(<\|?|\[)(unused|reserved_special_token|extra_id|extra|control)_?\d+(\|?>|\])", re.IGNORECASE
)
BYTE_PIECE = re.compile(r"^<0x([0-9A-F]{2})>$")
CLEARLY = math.log(1.25)
MAD_TO_DEVIATION = 1.4826
NEVER_IN_UTF8 = frozenset([0xC0, 0xC1, *range(0xF5, 0x100)])
WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "BOPOMOFO", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "JAVANESE")
"""First words of the Unicode names of the letters of scripts that write no spaces between words."""


def vocabulary_projection(matrix: Tensor, gain: Tensor | None = None, centred: bool = False) -> Tensor:
    """Compute the matrix on which vectors are projected.

    Args:
        matrix: Embedding or unembedding, float [V, d].
        gain: Gain of the norm between the vector and the vocabulary, [d]. That is the final norm for `out`, and the
            block's own norm for `gate` and `in`. None leaves it out.
        centred: Whether the mean row is subtracted, so that a projection has mean 0 over the vocabulary.

    Returns:
        The matrix U, float [V, d].
    """
    projected = matrix if gain is None else matrix * gain
    return projected - projected.mean(dim=0) if centred else projected


def token_weights(
    unembedding: Tensor, *, ignored: Tensor | None = None, percentile: float = 99.0, overwrite_zero: bool = False
) -> Tensor:
    """Compute how much each token counts in the objective.

    The weight is 1 for an ordinary token. It is 1e-4 for a token whose row norm lies above the percentile. It is 0 for
    an ignored token. Where both apply, the smaller weight counts.

    Args:
        unembedding: Table of the tokens, [V, d].
        ignored: Tokens that do not count, bool [V]; None for none.
        percentile: Percentile of the row norms, in percent.
        overwrite_zero: Whether to repeat the order of the published code. There the norm rule comes last and turns
            zeros into 1e-4.

    Returns:
        The weights, float32 [V].

    Raises:
        BadInput: If the percentile is not above 0 and at most 100, `ignored` has another length, or no token has weight
            1.
    """
    if not 0 < percentile <= 100:
        raise BadInput(f"The norm percentile of the token weights must lie above 0 and at most 100, not {percentile}.")
    norms = unembedding.float().norm(dim=1)
    high = norms > torch.quantile(norms.cpu().double(), percentile / 100).to(norms)
    weights = torch.ones_like(norms)
    if ignored is not None:
        if ignored.shape != norms.shape:
            raise BadInput(f"The ignored-token mask has {ignored.numel()} entries for a vocabulary of {len(norms)}.")
        weights[ignored.to(norms.device)] = 0.0
    weights[high & ((weights > 0) | overwrite_zero)] = HIGH_NORM_WEIGHT
    if not bool((weights == 1).any()):
        raise BadInput("No token of the vocabulary counts: the mask of ignored tokens leaves none.")
    return weights


def is_byte_level(pieces: Sequence[str], decoder: str = "") -> bool:
    """Tell whether a vocabulary's pieces are written in the byte-level alphabet (GPT-2's scheme).

    The tokenizer's own decoder decides. Where it is not known, most pieces do: one piece tells nothing, since a
    SentencePiece vocabulary of many languages holds every letter.

    Args:
        pieces: The vocabulary's raw pieces.
        decoder: The name or description of the tokenizer's decoder, such as "ByteLevel(...)".

    Returns:
        True if a leading space is written as "Ġ".
    """
    if decoder and decoder != "None":
        return "ByteLevel" in decoder
    return sum(piece.startswith("Ġ") for piece in pieces) > sum(piece.startswith("▁") for piece in pieces)


def decoder_of(tokenizer: Any) -> str:
    """Describe a tokenizer's decoder. It is empty for a tokenizer that is not a fast one."""
    return str(getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", "") or "")


def words_mask(pieces: list[str], decoder: str = "") -> Tensor:
    """Find the tokens that begin a word and are made of letters.

    A word begins where the piece carries the tokenizer's mark for a leading space. The mark is "Ġ" (byte-level BPE),
    "▁" (SentencePiece) or a space. A vocabulary without any such mark is taken for WordPiece. There a piece begins a
    word unless it carries the "##" of a continuation. Byte-level pieces are turned back into text first, so that
    accented letters count as letters. So do the vowel signs of scripts such as Devanagari.

    A piece of a script that writes no spaces (Chinese, Japanese, Thai ...) needs no mark. Korean, Arabic, Hebrew and
    the scripts of India do write spaces. Their pieces without the mark are mostly endings, so they do not count.

    Args:
        pieces: The vocabulary's raw pieces by token id.
        decoder: Description of the tokenizer's decoder, where it is known.

    Returns:
        True for these tokens, bool [V].
    """
    byte_level = is_byte_level(pieces, decoder)
    marks = ("Ġ", " ") if byte_level else ("▁", " ")
    marked = any(piece[:1] in marks for piece in pieces if len(piece) > 1)

    def is_word(piece: str) -> bool:
        if marked and piece[:1] in marks:
            return is_letters(piece_text(piece[1:], byte_level))
        if marked:
            return writes_no_spaces(piece_text(piece, byte_level))
        return not piece.startswith("##") and is_letters(piece)

    return torch.tensor([is_word(piece) for piece in pieces], dtype=torch.bool)


def is_letters(text: str) -> bool:
    """Tell whether a text is made of letters and of signs that belong to the letter before them.

    Args:
        text: The text.

    Returns:
        True if it begins with a letter and holds nothing else. Accents and vowel signs belong to letters.
    """
    return text[:1].isalpha() and all(sign.isalpha() or unicodedata.category(sign) in ("Mn", "Mc") for sign in text)


def writes_no_spaces(text: str) -> bool:
    """Tell whether a text is made of letters of a script that writes no spaces between words.

    Args:
        text: The text.

    Returns:
        True for Chinese, Japanese, Thai, Lao, Khmer, Burmese, Tibetan and Javanese letters alone.
    """
    return is_letters(text) and all(unicodedata.name(sign, "").startswith(WITHOUT_SPACES) for sign in text)


def has_no_case(text: str) -> bool:
    """Tell whether a text is made of letters that are neither upper nor lower case.

    Args:
        text: The text.

    Returns:
        True for words of Chinese, Japanese, Thai, Korean, Arabic, Hindi and other scripts without case.
    """
    return is_letters(text) and all(unicodedata.category(letter) in ("Lo", "Lm", "Mn", "Mc") for letter in text)


def unused_tokens(pieces: list[str], decoder: str = "") -> Tensor:
    """Find the tokens that no text can produce, from their pieces alone.

    Some are placeholders: `<unused12>`, `<|reserved_special_token_3|>`, `<extra_id_0>`, or an empty piece for a row
    beyond the tokenizer's last token. The others are single bytes that never occur in UTF-8 (0xC0, 0xC1, 0xF5 to 0xFF).
    These are written as `<0xF5>` or as letters of the byte-level alphabet.

    Args:
        pieces: The vocabulary's raw pieces by token id.
        decoder: Description of the tokenizer's decoder, where it is known.

    Returns:
        True for these tokens, bool [V].
    """
    letters = {_byte_alphabet()[byte] for byte in NEVER_IN_UTF8} if is_byte_level(pieces, decoder) else set()

    def is_unused(piece: str) -> bool:
        byte = BYTE_PIECE.match(piece)
        if byte:
            return int(byte.group(1), 16) in NEVER_IN_UTF8
        return piece in letters or not piece or UNUSED_PIECE.fullmatch(piece) is not None

    return torch.tensor([is_unused(piece) for piece in pieces], dtype=torch.bool)


def undertrained_tokens(unembedding: Tensor, unused: Tensor, *, embedding: Tensor | None = None) -> Tensor:
    """Find the tokens that training hardly touched, from the weights alone.

    This follows Land & Bartolo, "Fishing for Magikarp" (arXiv 2405.05417). Training moves all rows of tokens that never
    occur in the same way. So these rows stay where the tokens known to be unused lie.

    The indicator is the cosine of a row with the mean of the unused rows, both less the mean of all rows. Its median is
    taken over the tokens not known to be unused. A token is under-trained when its cosine lies more than three robust
    standard deviations (median absolute deviation) above that median. So rarely seen pieces of words are found as well
    as pieces that were never seen.

    An untied model gives a second sign, because an input row that is never seen only decays. Input rows count as well
    when their norm is nearer to that of the unused rows.

    Args:
        unembedding: The unembedding, [V, d].
        unused: Tokens known to be unused, bool [V].
        embedding: The input embedding of an untied model, [V, d]; None if tied.

    Returns:
        True for under-trained tokens, bool [V]. Fewer than two unused tokens give no reference, so then only they are
        returned.
    """
    unused = unused.to(unembedding.device)
    if int(unused.sum()) < 2 or bool(unused.all()):
        return unused.clone()
    rows = normalize(unembedding.float() - unembedding.float().mean(dim=0), dim=1)
    cosines = rows @ normalize(rows[unused].mean(dim=0), dim=0)
    rest = cosines[~unused]
    spread = (rest - rest.median()).abs().median() * MAD_TO_DEVIATION
    found = unused | (cosines > rest.median() + 3 * spread)
    return found if embedding is None else found | _alike(embedding.float().norm(dim=1), unused)


def frequency_direction(unembedding: Tensor, untrained: Tensor) -> Tensor | None:
    """Compute the token-frequency direction, from the mean trained row to the mean untrained row.

    Training pushes the rows of rare tokens along this line, the rarer the farther. A search for sharp projections then
    finds token frequency before any meaning. This was measured on the demo model with 600 candidate neurons. With the
    direction left in, no first channel carried the concept for which its neuron was chosen. With it removed, 130 did.

    Args:
        unembedding: Table of the tokens, [V, d].
        untrained: Tokens that no training text held, bool [V].

    Returns:
        The unit direction, float32 [d]; None if no token or every token is untrained.
    """
    untrained = untrained.to(unembedding.device)
    if not bool(untrained.any()) or bool(untrained.all()):
        return None
    return normalize(unembedding[untrained].float().mean(0) - unembedding[~untrained].float().mean(0), dim=0)


def _alike(norms: Tensor, group: Tensor) -> Tensor:
    """Find where the norm of a token is like the norms of a group.

    That is where the logarithm of the norm [V] lies nearer to the median of `group` (bool [V]) than to that of the
    rest. It is nowhere when the two medians are less than a factor of 1.25 apart.
    """
    known, rest = norms[group].median().log(), norms[~group].median().log()
    if abs(float(known - rest)) < CLEARLY:
        return torch.zeros_like(group)
    return (norms.log() - known).abs() < (norms.log() - rest).abs()


def _byte_alphabet() -> dict[int, str]:
    """The letter that byte-level BPE (GPT-2's scheme) writes for each byte: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + index) for index, byte in enumerate(rest)}


_BYTE_OF_LETTER = {letter: byte for byte, letter in _byte_alphabet().items()}


def piece_text(piece: str, byte_level: bool) -> str:
    """Turn a raw piece of a vocabulary into the text that it stands for.

    Args:
        piece: The piece.
        byte_level: Whether it is written in the byte-level alphabet (`is_byte_level`).

    Returns:
        The text, with a space for the mark of a leading space. Bytes that are no complete UTF-8 become U+FFFD.
    """
    if not byte_level:
        return piece.replace("\u2581", " ")
    if any(letter not in _BYTE_OF_LETTER for letter in piece):
        return piece
    return bytes(_BYTE_OF_LETTER[letter] for letter in piece).decode("utf-8", errors="replace")


def ends_inside_character(text: str) -> bool:
    """Tell whether a token holds a part of a character only, so that it stands for no text by itself.

    Args:
        text: The token's text (`piece_text`).

    Returns:
        True if the text ends in bytes that are no complete UTF-8, or is a byte of SentencePiece beyond ASCII such as
        `<0xE4>`.
    """
    byte = BYTE_PIECE.match(text)
    return text.endswith("\ufffd") or (byte is not None and int(byte.group(1), 16) >= 0x80)
