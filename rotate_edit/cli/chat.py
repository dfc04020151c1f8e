"""The command `chat`: a base model and edited ones side by side, while they write."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table

from rotate_edit.cli.options import FOLDER
from rotate_edit.console import print_line, shown
from rotate_edit.errors import BadInput

if TYPE_CHECKING:
    from rotate_edit.evaluation.chat import Speaker

HELP = (
    "/strength 2 multiplies the edits' strengths by 2; /strength NAME 2 that of one concept or channel; /off and /on "
    "switch the edits off and on; /reset forgets what was said; /quit ends."
)
# Shows the models' texts: what each has written so far.
Show = Callable[[Sequence[str]], None]


@click.command()
@click.argument("model")
@click.argument("edits", nargs=-1, type=FOLDER)
@click.option("--plain", is_flag=True, help="Continue the bare text, without the tokenizer's chat template.")
@click.option("--new-tokens", default=200, show_default=True, type=click.IntRange(1), help="Most tokens of an answer.")
@click.option("--temperature", type=click.FloatRange(min=0, min_open=True), help="Draw (default: most probable token).")
@click.option("--seed", default=0, show_default=True, help="Of the draw.")
def chat(
    model: str, edits: tuple[Path, ...], plain: bool, new_tokens: int, temperature: float | None, seed: int
) -> None:
    """Chat with MODEL and its EDITS (runs, edits, adapters, checkpoints) side by side; /help lists commands."""
    from rotate_edit.evaluation.chat import Speaker, answer
    from rotate_edit.evaluation.variants import read_variants
    from rotate_edit.machine import check_cost
    from rotate_edit.models.checkpoint import load_model, load_tokenizer, open_checkpoint
    from rotate_edit.models.cost import estimate_live

    variants = read_variants(list(edits))
    checkpoint = open_checkpoint(model)
    check_cost(estimate_live(checkpoint, 8 if any(variant.checkpoint for variant in variants) else 4), Path())
    tokenizer, loaded = load_tokenizer(checkpoint), load_model(checkpoint)
    speakers = [Speaker("base"), *(Speaker(variant.name, variant) for variant in variants)]
    templated = not plain and bool(getattr(tokenizer, "chat_template", None))
    print_line(f"{'What you say is answered.' if templated else 'What you write is continued.'} {HELP}")
    for message in _messages():
        if message.startswith("/"):
            speakers = _obeyed(message, speakers)
            continue
        texts = ["" for _ in speakers]
        with _columns([speaker.title for speaker in speakers]) as show:
            for place, speaker in enumerate(speakers):

                def tell(text: str, place: int = place, texts: list[str] = texts, show: Show = show) -> None:
                    texts[place] = text
                    show(texts)

                speakers[place] = answer(
                    loaded, tokenizer, speaker, message, chat=not plain, new_tokens=new_tokens,
                    seed=None if temperature is None else seed, temperature=temperature or 1.0, tell=tell,
                )  # fmt: skip
                texts[place] = speakers[place].turns[-1][1]
            show(texts)


def _messages() -> Iterator[str]:
    """What the user writes, line by line, until /quit or the end of the input."""
    while True:
        try:
            message = click.prompt("you", prompt_suffix="> ", default="", show_default=False).strip()
        except click.Abort:
            return
        if message == "/quit":
            return
        if message:
            yield message


def _obeyed(message: str, speakers: Sequence["Speaker"]) -> list["Speaker"]:
    """The models after a command. A command that cannot be obeyed changes nothing and is said."""
    from rotate_edit.evaluation.chat import with_factor

    command, *words = message.split()
    try:
        if command == "/reset" and not words:
            return [replace(speaker, turns=()) for speaker in speakers]
        if command in ("/off", "/on") and not words:
            return with_factor(speakers, float(command == "/on"))
        if command == "/strength" and words:
            named = " ".join(words[:-1]) or None
            changed = with_factor(speakers, _number(words[-1]), named)
            print_line(", ".join(speaker.title for speaker in changed if speaker.variant is not None) or "no edit")
            return changed
    except BadInput as error:
        print_line(str(error), error=True)
        return list(speakers)
    print_line(HELP)
    return list(speakers)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise BadInput(f"/strength takes a number, and {text!r} is none.") from None


@contextmanager
def _columns(titles: Sequence[str]) -> Iterator[Show]:
    """Side by side in a terminal, growing as the models write. Elsewhere one after another, once they are written."""
    console = Console(highlight=False)
    if not console.is_terminal:
        last: list[str] = []
        yield lambda texts: last.__setitem__(slice(None), texts)
        for title, text in zip(titles, last):
            print_line(f"{title}: {' '.join(text.split())}")
        return

    def table(texts: Sequence[str]) -> Table:
        drawn = Table(expand=True, show_lines=False)
        for title in titles:
            drawn.add_column(shown(title), ratio=1, overflow="fold")
        drawn.add_row(*("\n".join(shown(line) for line in text.split("\n")) for text in texts))
        return drawn

    with Live(table([""] * len(titles)), console=console, refresh_per_second=8, vertical_overflow="visible") as live:
        yield lambda texts: live.update(table(texts))


COMMANDS = (chat,)
