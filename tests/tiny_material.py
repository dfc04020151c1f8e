"""A tiny checkpoint over whole words on disk, and the material of edits of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_words import WORDS, ids, tiny_model, tiny_tokenizer

from rotate_edit.channels.channel_set import Channel
from rotate_edit.channels.locate import ConceptGroup, Site, sites_of
from rotate_edit.edits.material import BuildSettings, Concept, Material
from rotate_edit.models.batches import Passages, tokenise
from rotate_edit.models.checkpoint import Checkpoint, open_checkpoint
from rotate_edit.vocabulary.concept import TokenSet

ABOUT = ["the dog ran under a big dog", "a cat saw the small dog", "the dog and the cat ate"]
FREE = ["the bird sat on the mat", "it was big and then it ate", "a fish on a tree"]


def word_checkpoint(folder: Path, *, tied: bool = False) -> Checkpoint:
    """The tiny word model, saved; its norms have gains of their own."""
    model = tiny_model(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(folder)
    return open_checkpoint(folder)


def tokenised(texts: Sequence[str]) -> Passages:
    """Texts of whole words as the model reads them."""
    return tokenise(tiny_tokenizer(), texts, vocabulary_size=len(WORDS))


def group_of(
    tokens: TokenSet,
    number: int = 0,
    words: Sequence[str] | None = None,
    *,
    scores: dict[Site, torch.Tensor] | None = None,
    chosen: Sequence[Channel] = (),
) -> ConceptGroup:
    """A group of a concept's tokens, the whole concept when no words are given."""
    own = tokens.ids if words is None else ids(*words).sort().values
    return ConceptGroup(tokens, number, own, scores or {}, {}, tuple(chosen), tuple(chosen))


def token_set(name: str, *words: str) -> TokenSet:
    """The tokens of a concept."""
    return TokenSet(name, ids(*words).sort().values, {word: (WORDS.index(word),) for word in words}, (), ())


def material(
    checkpoint: Checkpoint,
    concepts: Sequence[Concept],
    *,
    matrices: Sequence[str] = ("out",),
    layers: Sequence[int] | None = None,
    **settings: Any,
) -> Material:
    """What is read off the word model for some concepts."""
    from rotate_edit.models.checkpoint import load_model

    return Material(
        checkpoint=checkpoint,
        tokenizer=tiny_tokenizer(),
        untrained=torch.zeros(len(WORDS), dtype=torch.bool),
        sites=tuple(sites_of(checkpoint, matrices, layers)),
        concepts=tuple(concepts),
        settings=BuildSettings(**{"self_text_tokens": 640} | settings),
        load=lambda: load_model(checkpoint),
        texts=lambda name: (tokenised(ABOUT), tokenised(FREE)),
    )
