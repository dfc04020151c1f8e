"""The explorer's page, made with Gradio. Tokens and generations are hostile text: all of it is escaped here."""

import html
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio

from rotate_edit.channel_job import Hit
from rotate_edit.channels.channel_set import Channel
from rotate_edit.cli.explorer import workbench
from rotate_edit.cli.explorer.workbench import Firing, Turned, Workbench
from rotate_edit.console import Report, plain
from rotate_edit.errors import BadInput, Failure

# Gives a path that does not exist yet, from the end of its name.
NextPath = Callable[[str], Path]
# Sliders go so far to either side.
FURTHEST = 4.0
# Gradio gives a function that has this default the bar of its own request.
PROGRESS = gradio.Progress()
CSS = """
.gradio-container {max-width: 1280px !important}
.chip {display: inline-block; padding: 0 .35em; margin: .1em; border-radius: .4em; background: #8882; white-space: pre}
.channel {margin: .5em 0} .channel code {font-weight: 600} .note {opacity: .75; font-size: .9em}
.scroll {overflow-x: auto} .scroll table {border-collapse: collapse; width: 100%}
.scroll td, .scroll th {padding: .2em .5em; text-align: left; vertical-align: top; border-bottom: 1px solid #8884}
.firing b {background: #f5b04188; border-radius: .2em}
.matrices {display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: 1em}
"""


def safe(text: str) -> str:
    """Text of a model, harmless in a page.

    Args:
        text: Hostile text.
    """
    return html.escape(plain(text))


def chips(channel: Channel) -> str:
    """A channel's tokens, the larger the higher their z-scores.

    Args:
        channel: The channel.
    """
    top = max((abs(score) for score in channel.z_scores), default=1.0) or 1.0
    return "".join(
        f'<span class="chip" style="font-size:{0.8 + 0.6 * abs(score) / top:.2f}em" title="z {score:.1f}">'
        f"{safe(token.strip() or token)}</span>"
        for token, score in zip(channel.tokens, channel.z_scores)
    )


def _sign(channel: Channel) -> str:
    return "+" if channel.sign > 0 else "−"


def results_html(hits: Sequence[Hit]) -> str:
    """What a search found, as a table.

    Args:
        hits: The channels.
    """
    if not hits:
        return '<p class="note">No channel says this.</p>'
    rows = []
    for hit in hits:
        channel = hit.channel
        p = "" if channel.p_value is None else f"{channel.p_value:.2g}"
        mark = " ✓" if hit.passed else ""
        figures = f"<td>{channel.support:.1f}</td><td>{p}{mark}</td>"
        rows.append(
            f"<tr><td><code>{safe(channel.name)}</code></td><td>{_sign(channel)}</td>{figures}"
            f"<td>{chips(channel)}</td></tr>"
        )
    head = "<tr><th>channel</th><th>sign</th><th>support</th><th>p</th><th>strongest tokens</th></tr>"
    note = '<p class="note">✓: more support than chance gives.</p>' if any(hit.passed for hit in hits) else ""
    return f'<div class="scroll"><table>{head}{"".join(rows)}</table></div>{note}'


def neuron_html(address: str, by_matrix: dict[str, list[Channel]]) -> str:
    """A neuron's channels, matrix by matrix.

    Args:
        address: The neuron.
        by_matrix: Its channels.
    """
    what = {"gate": "responds to (gate)", "in": "responds to (in)", "out": "promotes (out)"}
    columns = []
    for matrix, found in by_matrix.items():
        parts = [
            f'<div class="channel"><code>{safe(channel.name)}</code> <span class="note">sign {_sign(channel)}, support '
            f"{channel.support:.1f}, kurtosis {channel.kurtosis:.0f}, cosine {channel.cosine:.2f}</span><br>"
            f"{chips(channel)}</div>"
            for channel in found
        ]
        columns.append(f"<div><h4>{what[matrix]}</h4>{''.join(parts) or 'no channel'}</div>")
    return f'<h3>{safe(address)}</h3><div class="matrices">{"".join(columns)}</div>'


def firing_html(firings: Sequence[Firing]) -> str:
    """Texts in which a neuron is active.

    Args:
        firings: The places.
    """
    rows = [
        f"<tr><td>{firing.activation:.2f}</td><td>{safe(firing.before)}<b>{safe(firing.token)}</b>{safe(firing.after)}"
        "</td></tr>"
        for firing in firings
    ]
    head = "<tr><th>activation</th><th>text that the model wrote from nothing</th></tr>"
    return f'<div class="scroll firing"><table>{head}{"".join(rows)}</table></div>' if rows else ""


def build_page(bench: Workbench, next_path: NextPath) -> gradio.Blocks:
    """The page of a workbench.

    Args:
        bench: The workbench.
        next_path: Where recipes and edits are written.
    """
    with gradio.Blocks(title="rotate_edit explorer", analytics_enabled=False) as page:
        cart = gradio.State([])
        strengths = gradio.State({})
        looked_up = gradio.State({})
        gradio.HTML(f"<h2>Channels of {safe(bench.session.checkpoint.source)}</h2>")
        with gradio.Row():
            with gradio.Column(scale=3, min_width=320):
                _look_up_part(bench, cart, looked_up)
            with gradio.Column(scale=2, min_width=320):
                _cart_part(bench, cart, strengths)
                _text_part(bench, cart, strengths)
                _write_part(bench, cart, strengths, next_path)
    return page


def _look_up_part(bench: Workbench, cart: Any, looked_up: Any) -> None:
    with gradio.Row():
        word = gradio.Textbox(label="Words, with commas", placeholder="beach, coast", elem_id="words", scale=3)
        matrix = gradio.Radio(bench.matrices, value=bench.matrices[-1], label="Matrix", elem_id="matrix", scale=2)
    search = gradio.Button("Search", elem_id="search", variant="primary")
    results = gradio.HTML(elem_id="results")
    with gradio.Row():
        channel = gradio.Dropdown([], label="Channel", elem_id="channel", scale=3, allow_custom_value=False)
        add = gradio.Button("Put in the cart", elem_id="add", scale=1)
    with gradio.Row():
        address = gradio.Textbox(label="Neuron", placeholder="L3.N12", elem_id="address", scale=3)
        show = gradio.Button("Show neuron", elem_id="show", scale=1)
    neuron = gradio.HTML(elem_id="neuron")
    fires = gradio.Button("Texts that fire it", elem_id="fires")
    firing = gradio.HTML(elem_id="firing")

    def searched(text: str, kind: str, progress: Any = PROGRESS) -> tuple[Any, ...]:
        words = [one.strip() for one in text.split(",") if one.strip()]
        hits = _told(lambda: workbench.find(bench, words, kind, _shown_on(progress)))
        known = {hit.channel.name: hit.words for hit in hits}
        first = hits[0].channel.name.rsplit(".", 1)[0] if hits else ""
        return results_html(hits), _choices(bench, known), known, first

    def shown(text: str, known: dict[str, tuple[str, ...]]) -> tuple[Any, ...]:
        found = _told(lambda: workbench.neuron_page(bench, text.strip()))
        names = {one.name: known.get(one.name, ()) for own in found.values() for one in own}
        return neuron_html(text.strip(), found), _choices(bench, {**known, **names}), {**known, **names}

    def added(name: str | None, items: list[Turned], known: dict[str, tuple[str, ...]]) -> list[Turned]:
        if not name or any(one.name == name for one in items):
            return items
        return [*items, Turned(name, 1.0, bench.known[name].tokens, tuple(known.get(name, ())))]

    search.click(searched, [word, matrix], [results, channel, looked_up, address])
    word.submit(searched, [word, matrix], [results, channel, looked_up, address])
    show.click(shown, [address, looked_up], [neuron, channel, looked_up])
    fires.click(lambda text: firing_html(_told(lambda: workbench.firing_texts(bench, text.strip()))), address, firing)
    add.click(added, [channel, cart, looked_up], cart)


def _choices(bench: Workbench, known: dict[str, Any]) -> Any:
    named = [
        (f"{name}: {plain(' '.join(token.strip() for token in bench.known[name].tokens[:5]))}", name) for name in known
    ]
    return gradio.Dropdown(choices=named, value=named[0][1] if named else None)


def _cart_part(bench: Workbench, cart: Any, strengths: Any) -> None:
    gradio.HTML("<h3>Cart</h3><p class='note'>1 takes a channel out of its neuron, 0 leaves it, −1 doubles it.</p>")

    @gradio.render(inputs=[cart], triggers=[cart.change])
    def items(held: list[Turned]) -> None:
        if not held:
            gradio.HTML("<p class='note'>Nothing is in it yet.</p>")
        for one in held:
            with gradio.Row():
                slider = gradio.Slider(
                    -FURTHEST, FURTHEST, value=one.strength, step=0.25, scale=4, elem_classes="strength",
                    label=f"{one.name}: {plain(' '.join(token.strip() for token in one.tokens[:4]))}",
                )  # fmt: skip
                remove = gradio.Button("Remove", scale=1, min_width=80)

            def moved(value: float, known: dict[str, float], name: str = one.name) -> dict[str, float]:
                return {**known, name: value}

            def removed(now: list[Turned], name: str = one.name) -> list[Turned]:
                return [other for other in now if other.name != name]

            slider.change(moved, [slider, strengths], strengths, show_progress="hidden")
            remove.click(removed, cart, cart)


def _text_part(bench: Workbench, cart: Any, strengths: Any) -> None:
    prompt = gradio.Textbox(label="Prompt", lines=2, elem_id="prompt", value="I went to the")
    with gradio.Row():
        count = gradio.Slider(5, 200, value=40, step=5, label="New tokens", scale=2)
        go = gradio.Button("Write", elem_id="write", variant="primary", scale=1)
    with gradio.Row():
        base = gradio.Textbox(label="Base", lines=6, elem_id="base", interactive=False, min_width=140)
        edited = gradio.Textbox(label="Edited", lines=6, elem_id="edited", interactive=False, min_width=140)
    with gradio.Row():
        word = gradio.Textbox(label="A word that may come next", elem_id="word", scale=2)
        ask = gradio.Button("How probable?", elem_id="ask", scale=1)
    chance = gradio.HTML(elem_id="chance")

    def written(text: str, held: list[Turned], turned: dict[str, float], tokens: int) -> Iterator[tuple[str, str]]:
        try:
            yield from workbench.texts(bench, workbench.with_strengths(held, turned), text, new_tokens=int(tokens))
        except (BadInput, Failure) as error:
            raise gradio.Error(html.escape(str(error))) from error

    def probable(text: str, held: list[Turned], turned: dict[str, float], named: str) -> str:
        now = workbench.with_strengths(held, turned)
        before, after = _told(lambda: workbench.probabilities(bench, now, text, named.strip()))
        return f"<p><b>{safe(named)}</b> after the prompt: {before:.4g} in the base, {after:.4g} edited.</p>"

    go.click(written, [prompt, cart, strengths, count], [base, edited])
    ask.click(probable, [prompt, cart, strengths, word], chance)


def _write_part(bench: Workbench, cart: Any, strengths: Any, next_path: NextPath) -> None:
    with gradio.Row():
        recipe = gradio.Button("Save as recipe", elem_id="recipe")
        edit = gradio.Button("Write the edit", elem_id="edit")
    status = gradio.HTML(elem_id="status")

    def saved(held: list[Turned], turned: dict[str, float]) -> str:
        now = workbench.with_strengths(held, turned)
        path = _told(lambda: workbench.write_recipe(bench, now, next_path("recipe.yaml")))
        return f"<p>Written: <code>{safe(str(path))}</code></p>"

    def wrote(held: list[Turned], turned: dict[str, float], progress: Any = PROGRESS) -> str:
        now = workbench.with_strengths(held, turned)
        folder = _told(lambda: workbench.write_edit(bench, now, next_path("edit"), _shown_on(progress)))
        return f"<p>Written: <code>{safe(str(folder))}</code></p>"

    recipe.click(saved, [cart, strengths], status)
    edit.click(wrote, [cart, strengths], status)


def _told(work: Callable[[], Any]) -> Any:
    """What some work gives. What is wrong with its input is shown to the user."""
    try:
        return work()
    except (BadInput, Failure) as error:
        raise gradio.Error(html.escape(str(error))) from error


def _shown_on(progress: Any) -> Report:
    def report(step: str, done: int, total: int) -> None:
        progress((done, max(total, 1)), desc=step)

    return report
