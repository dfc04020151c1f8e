"""What the explorer's page does, without the page: look up, turn, compare, write.

Everything here works on one loaded model, one call at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Queue
from threading import Event, Thread
from typing import Any

import torch

from rotate_edit import channel_job, pipeline
from rotate_edit.channel_job import Hit
from rotate_edit.channels.channel_set import Channel, search_channels
from rotate_edit.channels.chosen import Chosen, check_neuron, check_set
from rotate_edit.console import Report, silent
from rotate_edit.edits.apply import applied
from rotate_edit.edits.channel_edit import channel_edit
from rotate_edit.edits.edit import Edit
from rotate_edit.edits.edit_file import load_edit
from rotate_edit.errors import BadInput
from rotate_edit.evaluation.chat import Speaker, answer
from rotate_edit.evaluation.faithfulness import Activity, activations, read_activity
from rotate_edit.evaluation.variants import Variant
from rotate_edit.files import write_atomically
from rotate_edit.models.architectures import parse_neuron
from rotate_edit.recipe import Recipe, parse_recipe, recipe_text
from rotate_edit.session import Session
from rotate_edit.vocabulary.concept import find_tokens

# How many channels a search shows, how many texts a neuron's page shows, and how many tokens on either side.
SHOWN, TEXTS, AROUND = 20, 6, 8
# The name of the text of a cart in a chat: the edit that the sliders make.
CART = "edited"


@dataclass(frozen=True)
class Turned:
    """One channel in the cart.

    Attributes:
        name: The channel.
        strength: 1 takes it out of its neuron, -1 doubles it.
        tokens: Its strongest tokens, for people.
        words: The words by whose search it was found, where its neuron's decomposition gives it no number.
    """

    name: str
    strength: float
    tokens: tuple[str, ...] = ()
    words: tuple[str, ...] = ()

    @property
    def entry(self) -> dict[str, Any]:
        """Its entry in a recipe."""
        return {"channel": self.name, "strength": self.strength} | ({"tokens": list(self.words)} if self.words else {})


@dataclass(frozen=True)
class Firing:
    """A place in a text where a neuron is active.

    Attributes:
        before: The text before the token.
        token: The token.
        after: The text after it.
        activation: The neuron's activation at the token.
    """

    before: str
    token: str
    after: str
    activation: float


@dataclass(frozen=True)
class Workbench:
    """A loaded model and what is known of its channels.

    Attributes:
        session: Of the model.
        edit: An edit that stands beside the cart. None for none.
        known: Channels that were looked up, by name.
    """

    session: Session
    edit: Edit | None = None
    known: dict[str, Channel] = field(default_factory=dict)

    @property
    def matrices(self) -> tuple[str, ...]:
        """The kinds of matrices of the model."""
        return tuple(self.session.checkpoint.matrices)


def open_workbench(model: str, channel_set: str | None = None, edit: Path | None = None) -> Workbench:
    """Load a model for the page.

    Args:
        model: `demo`, a folder, a Hub id or a GGUF file.
        channel_set: A channel set or an atlas of it, in which words are looked up. None searches the model.
        edit: A run or an edit that stands beside the cart.

    Raises:
        BadInput: Something cannot be opened.
    """
    session = channel_job.open_model(model, channel_set)
    folder_of_channels = channel_job.source_of(session).folder
    if folder_of_channels is not None:
        check_set(folder_of_channels, session.checkpoint)
    folder = None if edit is None else (edit / "edit" if (edit / "edit").is_dir() else edit)
    return Workbench(session, None if folder is None else load_edit(folder))


def find(bench: Workbench, words: Sequence[str], matrix: str, report: Report = silent) -> list[Hit]:
    """The channels that say some words, the best first.

    Args:
        bench: The workbench.
        words: The words.
        matrix: The kind of matrices that is searched.
        report: Is told how far the search is.

    Raises:
        BadInput: No word was given, or none of them is one token.
    """
    if not words:
        raise BadInput("give a word, or several with commas between them.")
    source = channel_job.source_of(bench.session)
    if source.folder is None:
        hits = channel_job.look_up(bench.session, words=words, matrices=[matrix], limit=SHOWN, report=report)
    else:
        found = {}
        for word in words:
            for channel in search_channels(source.folder, token=word, matrix=matrix, limit=SHOWN, vectors=True):
                found[channel.name] = channel
        hits = [Hit(channel) for channel in sorted(found.values(), key=lambda one: -one.support)[:SHOWN]]
    bench.known.update({hit.channel.name: hit.channel for hit in hits})
    return hits


def neuron_page(bench: Workbench, address: str) -> dict[str, list[Channel]]:
    """The channels of a neuron, by matrix.

    Args:
        bench: The workbench.
        address: The neuron, such as "L3.N12".

    Raises:
        BadInput: There is no such neuron.
    """
    source = channel_job.source_of(bench.session)
    check_neuron(parse_neuron(address), bench.matrices, source.checkpoint)
    if source.folder is None:
        found = [hit.channel for hit in channel_job.look_up(bench.session, neuron=address)]
    else:
        # A recipe takes all of its channels from the set.
        found = search_channels(source.folder, neuron=address, limit=None, vectors=True)
    bench.known.update({channel.name: channel for channel in found})
    return {matrix: [channel for channel in found if channel.matrix == matrix] for matrix in bench.matrices}


def firing_texts(bench: Workbench, address: str) -> list[Firing]:
    """Where a neuron is most active in text that the model writes from nothing, the strongest first.

    Args:
        bench: The workbench.
        address: The neuron. Of an expert none is shown: which expert reads a token depends on the router.

    Raises:
        BadInput: There is no such neuron.
    """
    neuron, session = parse_neuron(address), bench.session
    check_neuron(neuron, bench.matrices, session.checkpoint)
    if neuron.expert is not None:
        return []
    _, passages = channel_job.text_of(session)
    key = f"activity of layer {neuron.layer}"
    if key not in session.kept:
        session.kept[key] = read_activity(session.model, passages, [neuron.layer])
    seen: Activity = session.kept[key]
    active = activations(session.model, neuron.layer, neuron.neuron, seen.inputs[neuron.layer])
    found: list[Firing] = []
    tokens = seen.tokens.tolist()
    for place in active.abs().argsort(descending=True).tolist():
        firing = Firing(
            _decoded(session, tokens[max(0, place - AROUND) : place]),
            _decoded(session, tokens[place : place + 1]),
            _decoded(session, tokens[place + 1 : place + AROUND]),
            float(active[place]),
        )
        if all(firing.before != other.before for other in found):
            found.append(firing)
        if len(found) == TEXTS:
            break
    return found


def _decoded(session: Session, ids: Sequence[int]) -> str:
    return "".join(session.vocabulary.texts[index] if index < len(session.vocabulary.texts) else "" for index in ids)


def edit_of(bench: Workbench, cart: Sequence[Turned]) -> Edit:
    """The edit that a cart makes, with the workbench's own edit beside it.

    Args:
        bench: The workbench. Every channel of the cart was looked up in it.
        cart: The channels. Those at strength 0 change nothing.
    """
    chosen = [Chosen(one.name, one.strength, (bench.known[one.name],)) for one in cart if one.strength]
    made = channel_edit(chosen, channel_job.reader(bench.session))
    if bench.edit is None:
        return made
    return replace(bench.edit, changes=(*bench.edit.changes, *made.changes))


def recipe_of(bench: Workbench, cart: Sequence[Turned]) -> Recipe:
    """The recipe of a cart: run by `rotate-edit edit`, it gives the same edit.

    Args:
        bench: The workbench.
        cart: The channels.

    Raises:
        BadInput: The cart is empty.
    """
    entries = [one.entry for one in cart if one.strength]
    if not entries:
        raise BadInput("the cart holds no channel that is turned; add one and move its slider.")
    recipe = bench.session.recipe
    return parse_recipe({"model": recipe.model, "channel_set": recipe.channel_set, "channels": entries}, "the cart")


def write_recipe(bench: Workbench, cart: Sequence[Turned], path: Path) -> Path:
    """Write the recipe of a cart.

    Args:
        bench: The workbench.
        cart: The channels.
        path: The file, which must not exist.

    Raises:
        BadInput: The cart is empty.
    """
    text = recipe_text(recipe_of(bench, cart))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)
    return path


def write_edit(bench: Workbench, cart: Sequence[Turned], folder: Path, report: Report = silent) -> Path:
    """Write the edit of a cart with its checkpoint, as `rotate-edit edit` does.

    Args:
        bench: The workbench. Its own edit is not written.
        cart: The channels.
        folder: Where to, which must not exist.
        report: Is told how far it is.

    Raises:
        BadInput: The cart is empty, or the folder exists.
    """
    pipeline.edit_only(recipe_of(bench, cart), folder, measured=False, report=report)
    return folder


def texts(bench: Workbench, cart: Sequence[Turned], prompt: str, *, new_tokens: int) -> Iterator[tuple[str, str]]:
    """What the base and the edited model write after a prompt, each time one of them has grown.

    Args:
        bench: The workbench.
        cart: The channels.
        prompt: What is said, in the chat template where the model has one.
        new_tokens: Most tokens of an answer.

    Raises:
        BadInput: The chat template cannot be filled in.
    """
    base = edited = ""
    for base in _written(bench, Speaker("base"), prompt, new_tokens):
        yield base, edited
    speaker = Speaker(CART, Variant(CART, edit=edit_of(bench, cart)))
    for edited in _written(bench, speaker, prompt, new_tokens):
        yield base, edited


def _written(bench: Workbench, speaker: Speaker, prompt: str, new_tokens: int) -> Iterator[str]:
    """A model's answer as it grows. It is written in a thread of its own, since generation calls back."""
    grown: Queue[str | Exception | None] = Queue()
    session = bench.session

    stopped = Event()

    def tell(text: str) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        grown.put(text)

    def write() -> None:
        try:
            answer(session.model, session.tokenizer, speaker, prompt, new_tokens=new_tokens, tell=tell)
            grown.put(None)
        except Exception as error:  # it is raised again where the page waits
            grown.put(error)

    thread = Thread(target=write, daemon=True)
    thread.start()
    try:
        while (found := grown.get()) is not None:
            if isinstance(found, Exception):
                raise found
            yield found
    finally:
        # A page that was left stops the answer, and no other work begins before the edit is out of the weights again.
        stopped.set()
        thread.join()


def probabilities(bench: Workbench, cart: Sequence[Turned], prompt: str, word: str) -> tuple[float, float]:
    """How probable a word is as what comes next after a prompt: in the base, and in the edited model.

    Args:
        bench: The workbench.
        cart: The channels.
        prompt: The text, as it is.
        word: The word, in all its forms that are one token.

    Raises:
        BadInput: No form of the word is one token, or the prompt is empty.
    """
    session = bench.session
    ids = find_tokens(word, [word], session.tokenizer, list(session.vocabulary.texts)).ids
    encoded = session.tokenizer(prompt)["input_ids"]
    if not encoded:
        raise BadInput("give a text after which the word may come.")

    def chance() -> float:
        tokens = torch.tensor([encoded], device=next(session.model.parameters()).device)
        with torch.no_grad():
            logits = session.model(input_ids=tokens, use_cache=False).logits[0, -1].float()
        return float(logits.softmax(-1)[ids.to(logits.device)].sum())

    before = chance()
    with applied(session.model, edit_of(bench, cart)):
        return before, chance()


def with_strengths(cart: Sequence[Turned], strengths: Mapping[str, float]) -> list[Turned]:
    """A cart with other strengths.

    Args:
        cart: The channels.
        strengths: By name. Channels that are not named keep theirs.
    """
    return [replace(one, strength=strengths.get(one.name, one.strength)) for one in cart]
