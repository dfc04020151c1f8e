"""What a vector is projected on: vocabulary matrices, token weights, under-trained tokens, word masks.

Maths only: tensors and token texts in, tensors out.
"""

import math
import re

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


def vocabulary_projection(matrix: Tensor, gain: Tensor | None = None, centred: bool = False) -> Tensor:
    """The matrix U to project on, float [V, d]: `matrix` times the gain of the norm before it, centred if asked.

    gain: [d], the scale of the norm that stands between the vector and the vocabulary (final norm for `out`, the
    block's own norm for `gate`/`in`); None leaves it out. centred: subtract the mean row, so that a projection
    has mean 0 over the vocabulary.
    """
    projected = matrix if gain is None else matrix * gain
    return projected - projected.mean(dim=0) if centred else projected


def token_weights(
    unembedding: Tensor, *, ignored: Tensor | None = None, percentile: float = 99.0, overwrite_zero: bool = False
) -> Tensor:
    """How much each token counts in the objective, float32 [V].

    1 for an ordinary token, 1e-4 for one whose row norm in `unembedding` [V, d] lies above `percentile`, 0 where
    `ignored` (bool [V]) is true; where both apply the smaller counts. `overwrite_zero` repeats the order of the
    published code, where the norm rule comes last and turns zeros into 1e-4. Raises BadInput when the percentile is
    not within 0..100, `ignored` has another length, or no token is left.
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


def words_mask(pieces: list[str]) -> Tensor:
    """Which tokens begin a word and are made of letters, bool [V].

    `pieces` are the vocabulary's raw pieces by token id. A word begins where the piece carries the tokenizer's mark
    for a leading space: "Ġ" (byte-level BPE), "▁" (sentencepiece) or a space. In a vocabulary without any such mark
    (WordPiece) a piece begins a word unless it carries the "##" of a continuation. Byte-level pieces are turned back
    into text first, so that accented letters count as letters.
    """
    marked = any(piece[:1] in "Ġ▁ " for piece in pieces if len(piece) > 1)
    byte_level = any(piece.startswith("Ġ") for piece in pieces)

    def is_word(piece: str) -> bool:
        if marked:
            return piece[:1] in ("Ġ", "▁", " ") and _text(piece[1:], byte_level).isalpha()
        return not piece.startswith("##") and piece.isalpha()

    return torch.tensor([is_word(piece) for piece in pieces], dtype=torch.bool)


def unused_tokens(pieces: list[str]) -> Tensor:
    """Tokens that no text can produce, known from their pieces alone, bool [V].

    Placeholders (`<unused12>`, `<|reserved_special_token_3|>`, `<extra_id_0>`, an empty piece for a row beyond the
    tokenizer's last token) and single bytes that never occur in UTF-8 (0xC0, 0xC1, 0xF5 to 0xFF), written as `<0xF5>`
    or as the byte-level alphabet's letters.
    """
    letters = {_byte_alphabet()[byte] for byte in NEVER_IN_UTF8} if any("Ġ" in piece for piece in pieces) else set()

    def is_unused(piece: str) -> bool:
        byte = BYTE_PIECE.match(piece)
        if byte:
            return int(byte.group(1), 16) in NEVER_IN_UTF8
        return piece in letters or not piece or UNUSED_PIECE.fullmatch(piece) is not None

    return torch.tensor([is_unused(piece) for piece in pieces], dtype=torch.bool)


def undertrained_tokens(unembedding: Tensor, unused: Tensor, *, embedding: Tensor | None = None) -> Tensor:
    """Tokens that training hardly touched, bool [V], found from the weights alone.

    After Land & Bartolo, "Fishing for Magikarp" (arXiv 2405.05417): training moves all rows of tokens that never
    occur the same way, so they stay where the tokens known to be `unused` (bool [V]) lie. Indicator: the cosine of a
    row with the mean of the unused rows, both less the mean of all rows; a token is under-trained when its cosine is
    more than three robust standard deviations (median absolute deviation) above the median of the tokens not known
    to be unused, so that rarely seen pieces of words are found as well as those never seen. When the model keeps its
    input `embedding` apart (untied), rows whose norm is nearer to that of the unused there count as well, as an
    unseen input row only decays. Fewer than two unused tokens give no reference: only those are returned.
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


def rarity_axis(unembedding: Tensor, untrained: Tensor) -> Tensor | None:
    """The unit direction [d] from the mean trained row to the mean untrained one; None without an untrained token.

    Training pushes the rows of rare tokens along this line, the rarer the farther. A search for sharp projections then
    finds rarity before any meaning: on the demo model, without this axis taken out, no first channel of 600 candidate
    neurons carried the concept they were chosen for, with it taken out 130 did.
    """
    untrained = untrained.to(unembedding.device)
    if not bool(untrained.any()) or bool(untrained.all()):
        return None
    return normalize(unembedding[untrained].float().mean(0) - unembedding[~untrained].float().mean(0), dim=0)


def _alike(norms: Tensor, group: Tensor) -> Tensor:
    """Where the logarithm of a norm [V] lies nearer to the median of `group` (bool [V]) than to that of the rest;
    nowhere when the two medians are less than a factor 1.25 apart."""
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


def _text(piece: str, byte_level: bool) -> str:
    """The text of a piece; a byte-level one that is no complete UTF-8 becomes the replacement character."""
    if not byte_level or any(letter not in _BYTE_OF_LETTER for letter in piece):
        return piece
    return bytes(_BYTE_OF_LETTER[letter] for letter in piece).decode("utf-8", errors="replace")
