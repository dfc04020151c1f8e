"""The explorer's page: hostile text, the token, and a person who searches, slides, reads and exports."""

import html
import re
import secrets
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import Page, browser, chromium
from demo_session import session_of

gradio = pytest.importorskip("gradio")

from rotate_edit.channel_job import Hit  # noqa: E402
from rotate_edit.cli.explorer import page as explorer  # noqa: E402
from rotate_edit.cli.explorer import server  # noqa: E402
from rotate_edit.cli.explorer.workbench import Firing, Workbench, neuron_page  # noqa: E402
from rotate_edit.pipeline import edit_only  # noqa: E402
from rotate_edit.recipe import parse_recipe, read_recipe  # noqa: E402

HOSTILE = "<img src=x onerror=alert(1)>\u202e\x1b[31m"


@pytest.fixture(scope="module")
def bench() -> Workbench:
    return Workbench(session_of(parse_recipe({"model": "demo", "channels": [{"channel": "L0.N0.out#0"}]})))


def test_tokens_and_texts_are_shown_as_text(bench: Workbench) -> None:
    channel = neuron_page(bench, "L4.N374")["out"][0]
    bad = replace(channel, tokens=(HOSTILE,) * len(channel.tokens))
    shown = [
        explorer.results_html([Hit(bad, (), True)]),
        explorer.neuron_html(HOSTILE, {"out": [bad]}),
        explorer.firing_html([Firing(HOSTILE, HOSTILE, HOSTILE, 1.0)]),
    ]
    for text in shown:
        assert "<img" not in text
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert html.escape("<img src=x onerror=alert(1)>") in text
        assert re.fullmatch(r"[^<>]*(<[^<>]+>[^<>]*)*", text)


@pytest.fixture(scope="module")
def guarded(bench: Workbench, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str, Path]:
    server.without_telemetry()
    token, output = secrets.token_urlsafe(8), tmp_path_factory.mktemp("written")
    numbers = iter(range(100))
    page = explorer.build_page(bench, lambda name: output / f"{next(numbers)}-{name}")
    return server.guarded(page, token), token, output


def test_without_the_token_or_under_another_name_nothing_answers(guarded: tuple[Any, str, Path]) -> None:
    from fastapi.testclient import TestClient

    app, token, _ = guarded
    client = TestClient(app, base_url="http://127.0.0.1", follow_redirects=False)
    for path in ("/", "/config", "/gradio_api/info", "/?token=no", "/gradio_api/queue/join"):
        answer = client.post(path) if "join" in path else client.get(path)
        assert answer.status_code == 403
    entered = client.get(f"/?token={token}")
    assert (entered.status_code, entered.headers["location"]) == (303, "/")
    assert "HttpOnly" in entered.headers["set-cookie"]
    assert "SameSite=strict" in entered.headers["set-cookie"]
    answer = client.get("/")
    assert answer.status_code == 200
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    elsewhere = TestClient(app, base_url="http://evil.example", cookies={server.COOKIE: token})
    assert elsewhere.get("/").status_code == 400


@pytest.fixture(scope="module")
def address(guarded: tuple[Any, str, Path]) -> Iterator[str]:
    import uvicorn

    app, token, _ = guarded
    port = server.free_port(None)
    running = uvicorn.Server(uvicorn.Config(app, host=server.HOST, port=port, log_level="warning"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.05)
    yield f"http://{server.HOST}:{port}/?token={token}"
    running.should_exit = True
    thread.join(timeout=20)


def fill(page: Page, name: str, text: str) -> None:
    page.ask(
        f"(() => {{const e = document.querySelector('#{name} textarea, #{name} input');"
        "const kind = e.tagName == 'TEXTAREA' ? HTMLTextAreaElement : HTMLInputElement;"
        f"Object.getOwnPropertyDescriptor(kind.prototype, 'value').set.call(e, {text!r});"
        "e.dispatchEvent(new Event('input', {bubbles: true}))})()"
    )
    time.sleep(0.3)


def click(page: Page, name: str) -> None:
    page.ask(f"document.querySelector('button#{name}, #{name} button').click()")


def told(page: Page, name: str) -> str:
    return str(page.ask(f"document.querySelector('#{name}').innerText"))


@pytest.mark.skipif(chromium() is None, reason="this machine has no Chromium")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_person_searches_slides_reads_and_exports(
    address: str, guarded: tuple[Any, str, Path], tmp_path: Path, width: int
) -> None:
    with browser() as page:
        page.open(address, width=width, dark=width < 700)
        page.wait_for("!!document.querySelector('#search')")
        assert page.ask("document.documentElement.scrollWidth") <= width
        fill(page, "words", "dog, hound, terrier")
        click(page, "search")
        page.wait_for("document.querySelector('#results').innerText.includes('L4.N393.out')", 90)
        assert "✓" in told(page, "results")
        click(page, "add")
        page.wait_for("!!document.querySelector('.strength input[type=range]')")
        click(page, "show")
        page.wait_for("document.querySelector('#neuron').innerText.includes('promotes')", 60)
        fill(page, "prompt", "The collie barked at the gate. Greta looked at the")
        fill(page, "word", "spaniel")
        click(page, "ask")
        page.wait_for("document.querySelector('#chance').innerText.includes('in the base')", 60)
        before, after = map(float, re.findall(r"([\d.e-]+) (?:in the base|edited)", told(page, "chance")))
        assert after < before
        # The slider to its end: the same figure moves further.
        page.ask(
            "(() => {const e = document.querySelector('.strength input[type=range]');"
            "Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value').set.call(e, '4');"
            "for (const name of ['input', 'change', 'pointerup'])"
            " e.dispatchEvent(new Event(name, {bubbles: true}))})()"
        )
        time.sleep(1)
        click(page, "ask")
        page.wait_for(f"!document.querySelector('#chance').innerText.includes('{after:.4g} edited')", 60)
        further = float(re.findall(r"([\d.e-]+) edited", told(page, "chance"))[0])
        assert further < after
        click(page, "write")
        page.wait_for("document.querySelector('#edited textarea').value.length > 20", 60)
        click(page, "recipe")
        page.wait_for("document.querySelector('#status').innerText.includes('Written')", 60)
        outside = page.ask(
            "performance.getEntriesByType('resource').map(one => one.name)"
            ".filter(name => !name.startsWith(location.origin) && !name.startsWith('data:')).length"
        )
        assert outside == 0
        assert not [message for message in page.messages if "Content Security Policy" in message]
    _, _, output = guarded
    newest = max(output.glob("*-recipe.yaml"), key=lambda path: path.stat().st_mtime)
    made = edit_only(read_recipe(newest), tmp_path / "edit", checkpoint=False, measured=False).edit
    assert {change.strength for change in made.changes} == {4.0}
    assert made.concepts[0].startswith("L4.N393.out#")
