"""The chosen channels of a recipe: found, edited beside its concepts or alone, and measured."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rotate_edit.channels.channel_set import ASKED, Channel
from rotate_edit.channels.chosen import (
    Chosen,
    Source,
    Wish,
    choose,
    neuron_channels,
    plainly_named,
    search_model,
)
from rotate_edit.channels.locate import carries
from rotate_edit.console import Report, silent
from rotate_edit.edits.channel_edit import channel_edit, turned_neurons
from rotate_edit.edits.edit import Edit
from rotate_edit.errors import BadInput, Failure
from rotate_edit.evaluation.channel_effects import FEWEST, Effect, channel_effects
from rotate_edit.evaluation.faithfulness import Trial, faithfulness, plain_trials
from rotate_edit.evaluation.text_tasks import read_documents
from rotate_edit.files import plain
from rotate_edit.models.architectures import parse_neuron
from rotate_edit.models.batches import Passages, tokenise
from rotate_edit.models.checkpoint import identity, read_matrix
from rotate_edit.models.prompted_text import NEW_TOKENS, prompted_text, prompts_about
from rotate_edit.models.self_text import self_text
from rotate_edit.recipe import ChannelRecipe, parse_recipe
from rotate_edit.session import Session, open_session
from rotate_edit.vocabulary.concept import find_tokens

# How many tokens of text channels are measured on, whoever wrote it.
TOKENS = 2048
# The strongest tokens of a channel that the model writes about.
WORDS_OF_A_CHANNEL = 5


def wishes_of(session: Session) -> tuple[Wish, ...]:
    """What a recipe asks of single channels.

    Args:
        session: The opened recipe.

    Raises:
        BadInput: None of an entry's words is one token.
    """
    return tuple(_wish(session, entry) for entry in session.recipe.channels)


def _wish(session: Session, entry: ChannelRecipe) -> Wish:
    if entry.channel is not None and not entry.tokens:
        return Wish(entry.name, entry.strength, entry.channel)
    texts = list(session.vocabulary.texts)
    tokens = find_tokens(entry.name, list(entry.tokens), session.tokenizer, texts)
    if entry.channel is not None:
        return Wish(entry.name, entry.strength, entry.channel, tokens)
    layers = None if entry.layers is None else tuple(range(entry.layers[0], entry.layers[1] + 1))
    return Wish(entry.name, entry.strength, None, tokens, entry.matrix, layers)


def choose_channels(session: Session, report: Report = silent) -> tuple[Chosen, ...]:
    """Find the channels that a recipe chooses. None are looked for where it chooses none.

    Args:
        session: The opened recipe.
        report: Is told how far the search is.

    Raises:
        BadInput: As `channels.chosen.choose`.
        Failure: No channel says some words.
    """
    return choose(wishes_of(session), source_of(session), report) if session.recipe.channels else ()


def source_of(session: Session) -> Source:
    """Where a recipe's channels are looked for.

    Args:
        session: The opened recipe.
    """
    named = session.recipe.channel_set
    folder = None if named is None else Path(named)
    if folder is not None and (folder / "channels").is_dir():
        folder = folder / "channels"
    settings = session.search_settings
    return Source(session.checkpoint, session.projections, session.vocabulary, settings, folder)


@dataclass(frozen=True)
class Hit:
    """A channel that was looked up.

    Attributes:
        channel: The channel, with its vector. Its `p_value` is that of the search.
        words: The words by whose search it was found, where its neuron's decomposition gives it no number.
        passed: Whether it has more support than chance gives.
    """

    channel: Channel
    words: tuple[str, ...] = ()
    passed: bool = False


def look_up(
    session: Session,
    *,
    words: Sequence[str] = (),
    neuron: str | None = None,
    matrices: Sequence[str] = (),
    layers: Sequence[int] = (),
    limit: int | None = None,
    report: Report = silent,
) -> list[Hit]:
    """The channels of a model that say some words, or those of one neuron.

    Args:
        session: Of the model.
        words: The words.
        neuron: A neuron such as "L3.N12", in place of words.
        matrices: Kinds of matrices. All that the model has when empty.
        layers: The layers that are searched for words. All when empty.
        limit: At most so many.
        report: Is told how far the search is.

    Returns:
        The channels that say the words, the least probable in a neuron drawn at random first. Or the neuron's.

    Raises:
        BadInput: None of the words is one token, or there is no such neuron.
    """
    source, kinds = source_of(session), list(matrices or session.checkpoint.matrices)
    if not words:
        return [Hit(channel) for channel in neuron_channels(parse_neuron(str(neuron)), kinds, source)][:limit]
    tokens = find_tokens(",".join(words), list(words), session.tokenizer, list(session.vocabulary.texts))
    found: list[tuple[Channel, bool]] = []
    # One kind at a time, as an edit that names words does.
    for kind in kinds:
        every, own = search_model(tokens, kind, list(layers) or None, source, report)
        passed = {channel.name for channel in own}
        for channel in every:
            if channel.p_value is not None and carries(channel, tokens, tokens.ids, source.settings):
                found.append((channel, channel.name in passed))
    found = sorted(found, key=lambda entry: 1.0 if entry[0].p_value is None else entry[0].p_value)[:limit]
    named = plainly_named([channel for channel, _ in found], source)
    return [
        Hit(channel, tuple(words) if channel.index >= ASKED else (), passed)
        for channel, (_, passed) in zip(named, found, strict=True)
    ]


def open_model(model: str, channel_set: str | None = None) -> Session:
    """A session in which channels are looked up, with no concept of its own.

    Args:
        model: `demo`, a folder, a Hub id or a GGUF file.
        channel_set: A channel set of the model, or None.
    """
    # A recipe needs something to edit; nothing is made of this entry.
    content = {"model": model, "channel_set": channel_set, "channels": [{"channel": "L0.N0.out#0"}]}
    return open_session(parse_recipe(content, "what the options say"))


def with_channels(session: Session, edit: Edit, chosen: Sequence[Chosen]) -> Edit:
    """An edit with that of chosen channels beside it.

    Args:
        session: The opened recipe.
        edit: The edit of the recipe's concepts, which may be empty.
        chosen: The channels.
    """
    if not chosen:
        return edit
    own = channel_edit(chosen, reader(session))
    record = {
        "channels": [entry.model_dump() for entry in session.recipe.channels],
        "found in": source_of(session).record,
    }
    places = {session.checkpoint.place(made.matrix, made.layer, made.expert).name for made in own.changes}
    known = edit.base.get("tensors", {})
    base = identity(session.checkpoint, {*places, *known}, full=session.recipe.save.full_hash or None)
    return replace(
        edit if edit.does_something else own,
        changes=(*edit.changes, *own.changes),
        vectors=(*edit.vectors, *own.vectors),
        notes=(*edit.notes, *own.notes),
        settings=edit.settings | record,
        base=base,
    )


def reader(session: Session) -> Any:
    """What reads neurons' vectors of a recipe's model.

    Args:
        session: The opened recipe.
    """
    return lambda site, rows: read_matrix(session.checkpoint, site.layer, site.matrix, site.expert_or_none, rows)


def described(session: Session, chosen: Sequence[Chosen]) -> list[dict[str, Any]]:
    """What becomes of every neuron and of its other channels, as plain JSON.

    Args:
        session: The opened recipe.
        chosen: The channels.
    """
    neurons: list[dict[str, Any]] = plain([asdict(neuron) for neuron in turned_neurons(chosen, reader(session))])
    return neurons


def measured(session: Session, chosen: Sequence[Chosen], edit: Edit) -> dict[str, Any]:
    """What the edit does to the running model on some text, and whether the channels do what they claim.

    Args:
        session: The opened recipe.
        chosen: The channels.
        edit: The edit that turns them.

    Returns:
        Plain JSON: "effects" in the edited model, "divergence" over all positions, "trials" that take each channel out
        beside three controls (`evaluation.faithfulness`), and "unmeasured", a sentence for what there is no figure of.
    """
    texts, passages = text_of(session, _words_of(chosen))
    effects, divergence = channel_effects(session.model, passages, chosen, edit)
    every = {channel.name: channel for wish in chosen for channel in (*wish.channels, *wish.beside)}
    names = {channel.name for wish in chosen for channel in wish.channels}
    try:
        trials = faithfulness(
            session.model, session.tokenizer, list(every.values()), texts, tokens=TOKENS, seed=session.recipe.seed
        )
    except (BadInput, Failure):
        # Of experts, or of neurons with one channel: there is nothing to compare with.
        trials = []
    found: dict[str, Any] = plain(
        {
            "effects": [asdict(effect) for effect in effects],
            "divergence": divergence,
            "tokens": passages.tokens(),
            "unmeasured": _unmeasured(names, effects, trials),
            "trials": [trial for trial in plain_trials(trials) if trial["name"] in names],
        }
    )
    return found


def _unmeasured(names: set[str], effects: Sequence[Effect], trials: Sequence[Trial]) -> list[str]:
    """One sentence for each kind of figure that some channels have none of."""
    rare = sorted(names - {effect.name for effect in effects})
    alone = sorted(names - {trial.name for trial in trials})
    found = []
    if rare:
        found.append(
            f"Not measured in the model, since their tokens stand at fewer than {FEWEST} places of the text, or they "
            f"are of experts: {', '.join(rare)}. Give a text with more of them (evaluate.text, or --text)."
        )
    if alone:
        found.append(
            "Not tested alone, since their neurons have no other channel whose tokens are in the text: "
            f"{', '.join(alone)}."
        )
    return found


def text_of(session: Session, words: Sequence[str] = ()) -> tuple[list[str], Passages]:
    """The text that channels are measured on: the recipe's own, or what the model writes.

    The model writes from nothing. Where words are given, half of the text is about them, since they may not come up
    otherwise.

    Args:
        session: The opened recipe.
        words: What the model writes about.

    Returns:
        The texts, and their tokens.
    """
    config, tokenizer = session.model.config.get_text_config(), session.tokenizer
    if session.recipe.evaluate.text is not None:
        texts = read_documents(session.recipe.evaluate.text)
    else:
        passages = self_text(
            session.model, tokenizer, tokens=TOKENS // 2 if words else TOKENS, seed=session.recipe.seed
        )
        rows = [
            row[:length]
            for batch, lengths in zip(passages.batches, passages.lengths)
            for row, length in zip(batch, lengths)
        ]
        texts = [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        if not words:
            return texts, passages
        prompts = prompts_about(tokenizer, words, math.ceil(TOKENS / 2 / NEW_TOKENS))
        about = prompted_text(session.model, tokenizer, prompts, seed=session.recipe.seed)
        # In turn, so that a limit on tokens cuts both off alike.
        texts = [text for pair in zip_longest(about, texts, fillvalue="") for text in pair if text]
    longest = getattr(config, "max_position_embeddings", None)
    limit = None if session.recipe.evaluate.text is None else TOKENS
    return texts, tokenise(tokenizer, texts, vocabulary_size=config.vocab_size, longest=longest, token_limit=limit)


def _words_of(chosen: Sequence[Chosen]) -> list[str]:
    """The strongest tokens of channels that are words, each once."""
    texts = [
        token.strip() for wish in chosen for channel in wish.channels for token in channel.tokens[:WORDS_OF_A_CHANNEL]
    ]
    return list(dict.fromkeys(text for text in texts if len(text) > 1 and text.isalpha()))
