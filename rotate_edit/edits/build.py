"""From what was located to edits: what they leave alone, what text tells them, and the fits that they start from."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rotate_edit.channels.locate import Fitted, Located, Site, build_edits, by_concept, directions, key_rows, sites
from rotate_edit.edits.edit import KEYED, NEEDS_TEXT, SAMPLED, Edit, Evidence, concept_mean, through_logits
from rotate_edit.edits.evidence import SNMF_FEATURES, evidence_about
from rotate_edit.edits.key_moments import even_reading, fit_keys, key_moments
from rotate_edit.edits.low_rank import Wanted, fit_change, kindred, whitened
from rotate_edit.errors import BadInput
from rotate_edit.models import batches
from rotate_edit.models.checkpoint import read_norm, read_unembedding
from rotate_edit.models.output_head import Positions, Tail, positions, tail_of
from rotate_edit.models.self_text import own_text
from rotate_edit.recipe import ConceptRecipe
from rotate_edit.session import Opened
from rotate_edit.vocabulary.concept import find_tokens


def edits_of(
    opened: Opened,
    found: Sequence[Located],
    methods: Sequence[str],
    model: Any = None,
    fitted: Fitted | None = None,
) -> dict[str, Edit]:
    """The edits of the wanted methods. Each concept's direction leaves alone its kept and neighbour words, what the
    recipe protects and the other concepts. model: the loaded base, for methods that need text or samples; it is loaded
    when left out; fitted: from `fit`, which is called when it is left out."""
    evidence = {}
    if any(method in NEEDS_TEXT for method in methods):
        evidence = _evidence(opened, found, methods, model)
    if fitted is None:
        fitted = fit(opened, found, methods, model)
    untrained = opened.vocabulary.untrained
    kept = _kept(opened)
    return build_edits(opened.checkpoint, opened.recipe, untrained, found, methods, kept, evidence, fitted)


def _kept(opened: Opened) -> dict[str, list[Tensor]]:
    """By concept the token sets that its edit leaves alone."""
    texts = list(opened.vocabulary.texts)

    def ids_of(where: str, words: Sequence[str], plurals: bool = False) -> Tensor:
        return find_tokens(where, list(words), opened.tokenizer, texts, plurals=plurals).ids

    protected = [ids_of("protect", [entry] if isinstance(entry, str) else entry) for entry in opened.recipe.protect]
    kept: dict[str, list[Tensor]] = {}
    for concept in opened.recipe.concepts:
        words = [ids_of(f"{concept.name}.keep", [word], concept.plurals) for word in concept.keep]
        others = [tokens.ids for tokens in opened.tokens if tokens.name != concept.name]
        own = next(tokens.ids for tokens in opened.tokens if tokens.name == concept.name)
        kept[concept.name] = words + neighbours(opened, concept, own) + others + protected
    return kept


def neighbours(opened: Opened, concept: ConceptRecipe, own: Tensor) -> list[Tensor]:
    """The neighbour words that a concept's direction leaves alone, each by itself.

    Many together, above a sixteenth of the model's width, count as one, or little room would be left for the direction.
    """
    texts = list(opened.vocabulary.texts)
    found = [
        find_tokens("neighbours", [word], opened.tokenizer, texts, plurals=concept.plurals, required=False).ids
        for word in concept.neighbour_words
    ]
    apart = [ids[~torch.isin(ids, own)] for ids in found]
    kept = [ids for ids in apart if len(ids)]
    many = len(kept) > opened.checkpoint.hidden_size // 16
    return [torch.cat(kept).unique()] if many else kept


def fit(
    opened: Opened,
    found: Sequence[Located],
    methods: Sequence[str],
    model: Any = None,
    samples: batches.Passages | None = None,
) -> Fitted:
    """What the methods among these read off the model's own text; for the keyed ones which neurons they take and by how
    much, by concept and group.

    samples: the text that they are read on, which the model writes when it is left out; the model is loaded then.
    """
    recipe, keyed = opened.recipe, [method for method in methods if method in KEYED]
    if not any(method in SAMPLED for method in methods):
        return Fitted({})
    model = model if model is not None else opened.load_base()
    if samples is None:
        samples = own_text(model, opened.tokenizer, tokens=recipe.edit.key_tokens, seed=recipe.seed)
    moves_logits = any(
        through_logits(method, -1.0 if concept.amplified else 1.0) for method in methods for concept in recipe.concepts
    )
    reading = even_reading(model, samples) if moves_logits else None
    if not keyed:
        return Fitted({}, reading=reading)
    rows = [{method: key_rows(opened.checkpoint, recipe, located, method) for method in keyed} for located in found]
    every: dict[int, list[Tensor]] = {}
    for by_method in rows:
        for layers in by_method.values():
            for layer, wanted in layers.items():
                every.setdefault(layer, []).append(wanted)
    union = {layer: torch.cat(wanted).unique() for layer, wanted in every.items()}
    head = read_unembedding(opened.checkpoint) if recipe.edit.direction == "least-divergence" else None
    moments = key_moments(model, samples, union, [located.ids for located in found], head)
    keys = {
        (located.concept.name, located.group): {
            method: fit_keys(moments, place, layers, ridge=recipe.edit.key_ridge)
            for method, layers in rows[place].items()
        }
        for place, located in enumerate(found)
    }
    fitted = Fitted(keys, moments.metric, reading=reading)
    if "fitted" not in keyed:
        return fitted
    tail, seen = tail_of(model), positions(model, samples)
    changes = fit_changes(opened, found, fitted, tail, seen, recipe.edit.fit_rounds)
    return replace(fitted, changes={name: after[-1] for name, after in changes.items()})


def fit_changes(
    opened: Opened, found: Sequence[Located], fitted: Fitted, tail: Tail, seen: Positions, rounds: int
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """By concept the factors of the change that is fitted on positions of the model's own text, from its keyed change
    in `fitted` on, as they are after each round of steps."""
    checkpoint, recipe, kept = opened.checkpoint, opened.recipe, _kept(opened)
    last = Site(checkpoint.layers - 1, -1, "out")
    if last not in sites(checkpoint, recipe):
        raise BadInput(
            f"locate.layers: the method fitted rewrites the last layer, {last.layer}; add it, or set edit.method to "
            "keyed."
        )
    white = whitened(seen, ridge=recipe.edit.key_ridge)
    untrained = opened.vocabulary.untrained
    projection = read_unembedding(checkpoint)
    norm = read_norm(checkpoint, "final")
    gain = norm if recipe.edit.fold_norm and norm is not None else torch.ones(projection.shape[1])
    changes = {}
    for name, groups in by_concept(found).items():
        if groups[0].concept.amplified:
            continue
        near, ids = kept[name], groups[0].tokens.ids
        write = directions(checkpoint, recipe, untrained, groups[0], near, fitted.metric)(last)[0].write
        rows = torch.stack([gain * concept_mean(projection, own, ~untrained) for own in near]) if near else None
        close = torch.cat(near).unique() if near else ids[:0]
        lowered = torch.cat((ids, kindred(seen, tail, ids, close)))
        wanted = Wanted(lowered, recipe.edit.target, close[~torch.isin(close, ids)], rows)
        coefficients = fitted.keys[name, 0]["fitted"][last.layer][1]
        changes[name] = fit_change(
            white,
            tail,
            (coefficients, write),
            wanted,
            rank=recipe.edit.fit_rank,
            leash=recipe.edit.fit_leash,
            seed=recipe.seed,
            rounds=rounds,
        )
    return changes


def _evidence(
    opened: Opened, found: Sequence[Located], methods: Sequence[str], model: Any
) -> dict[str, dict[int, Evidence]]:
    if opened.items is None:
        named = next(method for method in methods if method in NEEDS_TEXT)
        raise BadInput(f"the method {named} needs text about the concept; give evaluate.items or evaluate.text.")
    model = model if model is not None else opened.load_base()
    layers = sorted({site.layer for site in sites(opened.checkpoint, opened.recipe)})
    features = SNMF_FEATURES if "snmf-features" in methods else 0
    limits = {"token_limit": opened.recipe.evaluate.tokens, "features": features, "seed": opened.recipe.seed}
    return {
        name: evidence_about(name, groups[0].tokens.ids, model, opened.tokenizer, opened.items, layers, **limits)
        for name, groups in by_concept(found).items()
    }
