"""What the vectors of a checkpoint are projected on, and which tokens of its vocabulary count.

Reads the tables of a checkpoint and applies the formulas of `vocabulary`.
"""

import base64
import hashlib
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rotate_edit.errors import BadInput
from rotate_edit.models.checkpoint import Checkpoint, load_tokenizer, read_embedding, read_norm, read_unembedding
from rotate_edit.vocabulary import tokens as vocabulary
from rotate_edit.vocabulary.concept import token_texts
from rotate_edit.vocabulary.layer_choice import measured_switch

RULES = ("auto", "unembedding", "embedding")


@dataclass(frozen=True)
class VocabularyRules:
    """How a checkpoint's vocabulary is used; the defaults are the recommended ones.

    projection: "unembedding" or "embedding" for every layer, the first layer that takes the unembedding, or "auto"
    (`first_unembedding_layer`: early layers of an untied model may use the embedding); words_only: only tokens that
    begin a word and are made of letters count; ignore_undertrained: under-trained tokens get weight 0; level_rarity:
    the axis on which rare tokens differ from the rest is taken out of the tables (`vocabulary.rarity_axis`);
    percentile: of the row norms, above which a token weighs 1e-4; fold_norm: multiply by the gain of the norm between
    the vector and the vocabulary; centred: subtract the mean token. Special tokens and rows beyond the tokenizer never
    count.
    """

    projection: str | int = "auto"
    words_only: bool = True
    ignore_undertrained: bool = True
    level_rarity: bool = True
    percentile: float = 99.0
    fold_norm: bool = False
    centred: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """A checkpoint's vocabulary under some rules.

    rules: with "auto" settled; texts: of the V tokens ("" where there is none); ignored: bool [V], tokens that do not
    count in the search; untrained: bool [V], tokens that no training text held, so that means over the vocabulary
    leave them out.
    """

    rules: VocabularyRules
    texts: tuple[str, ...]
    ignored: Tensor
    untrained: Tensor


@dataclass(frozen=True)
class Projections:
    """The tables that project vectors, on one device.

    names: for each layer, which of `tables` it uses; tables: float32 [V, d_model] by name; weights: float32 [V], the
    token weights under each (both before a norm's gain).
    """

    checkpoint: Checkpoint
    rules: VocabularyRules
    ignored: Tensor
    names: tuple[str, ...]
    tables: dict[str, Tensor]
    weights: dict[str, Tensor]

    def of(self, layer: int, matrix: str) -> tuple[Tensor, Tensor]:
        """The projection [V, d_model] of one layer's matrix and its token weights [V]."""
        name = self.names[layer]
        if not self.rules.fold_norm:
            return self.tables[name], self.weights[name]
        table = self.tables[name]
        gain = read_norm(self.checkpoint, "final" if matrix == "out" else ("mlp", layer))
        folded = vocabulary.vocabulary_projection(
            table, None if gain is None else gain.to(table.device), self.rules.centred
        )
        return folded, vocabulary.token_weights(folded, ignored=self.ignored, percentile=self.rules.percentile)


def first_unembedding_layer(checkpoint: Checkpoint, rule: str | int) -> int:
    """The first layer whose vectors the unembedding projects; those before it take the embedding.

    rule: a layer, "unembedding" (0), "embedding" (as many as there are layers), or "auto": the published layer of a
    model that was studied, else what the weights say (`projection_switch.measured_switch`). Always 0 for a tied head.
    Raises BadInput for another rule.
    """
    named = {"unembedding": 0, "embedding": checkpoint.layers, "auto": checkpoint.published_switch}
    if isinstance(rule, str) and rule not in named:
        raise BadInput(f"projection {rule!r} is unknown; choose one of {', '.join(RULES)}, or a layer.")
    if isinstance(rule, int) and not 0 <= rule <= checkpoint.layers:
        raise BadInput(f"projection {rule} is no layer of {checkpoint.source}, which has {checkpoint.layers} layers.")
    if checkpoint.tied:
        return 0
    layer = named[rule] if isinstance(rule, str) else rule
    return measured_switch(checkpoint) if layer is None else layer


def projection_names(checkpoint: Checkpoint, rule: str | int) -> tuple[str, ...]:
    """What each layer's vectors are projected on, "unembedding" or "embedding". Raises BadInput for an unknown rule."""
    first = first_unembedding_layer(checkpoint, rule)
    return tuple("embedding" if layer < first else "unembedding" for layer in range(checkpoint.layers))


def read_vocabulary(checkpoint: Checkpoint, rules: VocabularyRules, tokenizer: Any = None) -> Vocabulary:
    """The token texts of a checkpoint and which tokens are ignored under the rules; reads its tokenizer if not given.

    A projection of "auto" is settled here, once, so that whatever is done with the vocabulary agrees on it.
    Raises BadInput when no token is left.
    """
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(checkpoint)
    size = checkpoint.vocabulary_size
    known: list[str] = token_texts(tokenizer)[:size]
    pieces = [""] * size
    for piece, index in tokenizer.get_vocab().items():
        if index < size:
            pieces[index] = piece
    untrained = torch.tensor([not piece for piece in pieces])
    unembedding = read_unembedding(checkpoint)
    embedding = None if checkpoint.tied else read_embedding(checkpoint)
    untrained |= vocabulary.undertrained_tokens(unembedding, vocabulary.unused_tokens(pieces), embedding=embedding)
    ignored = torch.tensor([not piece for piece in pieces])
    ignored[[index for index in tokenizer.all_special_ids if index < size]] = True
    if rules.words_only:
        ignored |= ~vocabulary.words_mask(pieces)
    if rules.ignore_undertrained:
        ignored |= untrained
    if bool(ignored.all()):
        raise BadInput(
            f"no token of {checkpoint.source} counts under these rules; its vocabulary marks no beginnings of words, "
            "so try it without words_only."
        )
    if rules.projection == "auto":
        rules = replace(rules, projection=first_unembedding_layer(checkpoint, "auto"))
    return Vocabulary(rules, tuple(known) + ("",) * (size - len(known)), ignored, untrained)


def read_projections(checkpoint: Checkpoint, words: Vocabulary, device: str = "cpu") -> Projections:
    """Read the tables that the vocabulary's rules need onto a device and weigh their tokens."""
    rules, ignored = words.rules, words.ignored.to(device)
    names = projection_names(checkpoint, rules.projection)
    read = {"unembedding": read_unembedding, "embedding": read_embedding}
    tables, weights = {}, {}
    for name in sorted(set(names)):
        table = vocabulary.vocabulary_projection(
            read[name](checkpoint).to(device), None, rules.centred and not rules.fold_norm
        )
        axis = vocabulary.rarity_axis(table, words.untrained) if rules.level_rarity else None
        if axis is not None:
            table = table - torch.outer(table @ axis, axis)
        tables[name] = table
        weights[name] = vocabulary.token_weights(table, ignored=ignored, percentile=rules.percentile)
    return Projections(checkpoint, rules, ignored, names, tables, weights)


def mask_to_json(mask: Tensor) -> dict:
    """A bool mask [V] as plain JSON: how many entries, how many are true, their SHA-256, and the packed bits."""
    bits = mask.to(torch.uint8).numpy().tobytes()
    packed = base64.b64encode(zlib.compress(bits, 9)).decode("ascii")
    return {"size": len(bits), "true": sum(bits), "sha256": hashlib.sha256(bits).hexdigest(), "zlib": packed}


def mask_from_json(entry: dict) -> Tensor:
    """The mask that `mask_to_json` wrote: bool [V]. Raises BadInput when it is damaged."""
    damaged = BadInput("the mask of ignored tokens in the manifest is damaged.")
    try:
        stream = zlib.decompressobj()
        bits = stream.decompress(base64.b64decode(entry["zlib"], validate=True), entry["size"] + 1)
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise damaged from error
    if len(bits) != entry["size"] or hashlib.sha256(bits).hexdigest() != entry.get("sha256"):
        raise damaged
    return torch.frombuffer(bytearray(bits), dtype=torch.uint8).bool()
