"""What the vectors of a checkpoint are projected on, and which tokens of its vocabulary count.

This reads the tables of a checkpoint and applies the formulas of `rotate_edit.vocabulary.tokens`.
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
    """How a checkpoint's vocabulary is used.

    The defaults are the recommended values. Special tokens and rows beyond the tokenizer's last token never count.

    Attributes:
        projection: "unembedding" or "embedding" for every layer, the first layer that takes the unembedding, or "auto".
            "auto" chooses that layer with `first_unembedding_layer`; early layers of an untied model may use the
            embedding.
        words_only: Whether only tokens count that begin a word and are made of letters.
        ignore_undertrained: Whether under-trained tokens get weight 0.
        remove_frequency: Whether the token-frequency direction is removed from the tables
            (`tokens.frequency_direction`). Along it, rare tokens differ from the others.
        percentile: Percentile of the row norms above which a token gets weight 1e-4, in percent.
        fold_norm: Whether the table is multiplied by the gain of the norm between the vector and the vocabulary.
        centred: Whether the mean token is subtracted.
    """

    projection: str | int = "auto"
    words_only: bool = True
    ignore_undertrained: bool = True
    remove_frequency: bool = True
    percentile: float = 99.0
    fold_norm: bool = False
    centred: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """A checkpoint's vocabulary of V tokens under some rules.

    Attributes:
        rules: The rules, where a projection of "auto" is replaced by a layer.
        texts: Text of each token; "" where there is none.
        ignored: Tokens that do not count in the search, bool [V].
        untrained: Tokens that no training text held, bool [V]. Means over the vocabulary leave them out.
    """

    rules: VocabularyRules
    texts: tuple[str, ...]
    ignored: Tensor
    untrained: Tensor


@dataclass(frozen=True)
class Projections:
    """The tables that vectors are projected on, on one device.

    The weights are computed before a norm's gain is applied.

    Attributes:
        checkpoint: The opened checkpoint.
        rules: The vocabulary's rules.
        ignored: Tokens that do not count in the search, bool [V].
        names: For each layer, the name of its table: "unembedding" or "embedding".
        tables: Tables by name, float32 [V, d_model].
        weights: Token weights under each table, float32 [V].
    """

    checkpoint: Checkpoint
    rules: VocabularyRules
    ignored: Tensor
    names: tuple[str, ...]
    tables: dict[str, Tensor]
    weights: dict[str, Tensor]

    def of(self, layer: int, matrix: str) -> tuple[Tensor, Tensor]:
        """Return the table and the token weights of one layer's matrix.

        Args:
            layer: Index of the layer.
            matrix: "gate", "in" or "out". It decides which norm's gain is used when the rules fold the norm.

        Returns:
            The table, float32 [V, d_model], and the token weights, float32 [V].

        Raises:
            BadInput: If a gain cannot be read, or no token has weight 1.
        """
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
    """Find the first layer whose vectors are projected on the unembedding; the layers before it take the embedding.

    "auto" takes the published layer of a model that was studied. For other models the weights decide
    (`layer_choice.measured_switch`).

    Args:
        checkpoint: The opened checkpoint.
        rule: A layer, "unembedding" (layer 0), "embedding" (as many as there are layers), or "auto".

    Returns:
        The layer. It is always 0 for a tied head.

    Raises:
        BadInput: If the rule is unknown or the model has no such layer.
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
    """Name the table on which each layer's vectors are projected.

    Args:
        checkpoint: The opened checkpoint.
        rule: A rule as in `first_unembedding_layer`.

    Returns:
        "unembedding" or "embedding" for each layer.

    Raises:
        BadInput: If the rule is unknown or the model has no such layer.
    """
    first = first_unembedding_layer(checkpoint, rule)
    return tuple("embedding" if layer < first else "unembedding" for layer in range(checkpoint.layers))


def read_vocabulary(checkpoint: Checkpoint, rules: VocabularyRules, tokenizer: Any = None) -> Vocabulary:
    """Read the token texts of a checkpoint and find the tokens that do not count.

    A projection of "auto" is replaced by a layer here. So everything done with the vocabulary uses the same one.

    Args:
        checkpoint: The opened checkpoint.
        rules: The vocabulary's rules.
        tokenizer: The checkpoint's tokenizer; None reads it from the checkpoint.

    Returns:
        The vocabulary.

    Raises:
        BadInput: If no token counts, or the checkpoint has no tokenizer that works.
    """
    tokenizer = tokenizer if tokenizer is not None else load_tokenizer(checkpoint)
    size = checkpoint.vocabulary_size
    known: list[str] = token_texts(tokenizer)[:size]
    pieces = [""] * size
    for piece, index in tokenizer.get_vocab().items():
        if index < size:
            pieces[index] = piece
    decoder = vocabulary.decoder_of(tokenizer)
    untrained = torch.tensor([not piece for piece in pieces])
    unembedding = read_unembedding(checkpoint)
    embedding = None if checkpoint.tied else read_embedding(checkpoint)
    untrained |= vocabulary.undertrained_tokens(
        unembedding, vocabulary.unused_tokens(pieces, decoder), embedding=embedding
    )
    ignored = torch.tensor([not piece for piece in pieces])
    ignored[[index for index in tokenizer.all_special_ids if index < size]] = True
    if rules.words_only:
        ignored |= ~vocabulary.words_mask(pieces, decoder)
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
    """Read the tables that the vocabulary's rules need onto a device, and compute the token weights.

    Args:
        checkpoint: The opened checkpoint.
        words: The vocabulary.
        device: Device of the tables.

    Returns:
        The tables and weights.

    Raises:
        BadInput: If no token has weight 1.
    """
    rules, ignored = words.rules, words.ignored.to(device)
    names = projection_names(checkpoint, rules.projection)
    read = {"unembedding": read_unembedding, "embedding": read_embedding}
    tables, weights = {}, {}
    for name in sorted(set(names)):
        table = vocabulary.vocabulary_projection(
            read[name](checkpoint).to(device), None, rules.centred and not rules.fold_norm
        )
        axis = vocabulary.frequency_direction(table, words.untrained) if rules.remove_frequency else None
        if axis is not None:
            table = table - torch.outer(table @ axis, axis)
        tables[name] = table
        weights[name] = vocabulary.token_weights(table, ignored=ignored, percentile=rules.percentile)
    return Projections(checkpoint, rules, ignored, names, tables, weights)


def mask_to_json(mask: Tensor) -> dict[str, Any]:
    """Write a mask as plain JSON.

    Args:
        mask: The mask, bool [V], on the CPU.

    Returns:
        The keys size (number of entries), true (number of true entries), sha256, and zlib (the packed entries).
    """
    bits = mask.to(torch.uint8).numpy().tobytes()
    packed = base64.b64encode(zlib.compress(bits, 9)).decode("ascii")
    return {"size": len(bits), "true": sum(bits), "sha256": hashlib.sha256(bits).hexdigest(), "zlib": packed}


def mask_from_json(entry: dict[str, Any]) -> Tensor:
    """Read a mask that `mask_to_json` wrote.

    Args:
        entry: The JSON object, which is untrusted.

    Returns:
        The mask, bool [V], on the CPU.

    Raises:
        BadInput: If the object is damaged.
    """
    damaged = BadInput("the mask of ignored tokens in the manifest is damaged.")
    try:
        stream = zlib.decompressobj()
        bits = stream.decompress(base64.b64decode(entry["zlib"], validate=True), entry["size"] + 1)
    except (KeyError, TypeError, ValueError, zlib.error) as error:
        raise damaged from error
    if len(bits) != entry["size"] or hashlib.sha256(bits).hexdigest() != entry.get("sha256"):
        raise damaged
    return torch.frombuffer(bytearray(bits), dtype=torch.uint8).bool()
