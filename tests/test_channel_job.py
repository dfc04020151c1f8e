"""Chosen channels from a recipe to files, on the demo model: found, told, edited, measured, undone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_session import session_of, words_of

from rotate_edit import channel_job, pipeline
from rotate_edit.channels.channel_set import Channel, load_channels, save_channels
from rotate_edit.channels.chosen import same_channel
from rotate_edit.edits.apply import applied
from rotate_edit.edits.edit_file import load_edit
from rotate_edit.edits.writing.patch import revert, verify
from rotate_edit.errors import BadInput, Failure
from rotate_edit.evaluation.channel_effects import channel_effects
from rotate_edit.models.checkpoint import identity, open_checkpoint, read_matrix
from rotate_edit.models.self_text import self_text
from rotate_edit.recipe import Recipe, parse_recipe

NAMED = "L4.N374.out#1"


def recipe(*channels: dict[str, Any], **changes: Any) -> Recipe:
    return parse_recipe({"model": "demo", "channels": list(channels)} | changes)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pipeline.Written, list[str]]:
    folder, told = tmp_path_factory.mktemp("channels") / "edit", []

    def report(step: str, done: int, total: int) -> None:
        told.append(step)

    wanted = recipe({"channel": NAMED}, {"tokens": ["dog", "hound", "terrier"], "layers": [3, 4], "strength": -1})
    return folder, pipeline.edit_only(wanted, folder, adapter=True, report=report), told


def test_a_named_channel_is_gone_from_its_neuron_and_the_word_is_doubled_in_the_written_model(
    written: tuple[Path, pipeline.Written, list[str]],
) -> None:
    folder, made, _ = written
    base, patched = open_checkpoint("demo"), open_checkpoint(folder / "model")
    found = {channel.name: channel for channel in load_channels(folder / "channels")}
    for vector in made.edit.vectors:
        (name,) = vector.channels
        channel = found[name]
        assert channel.vector is not None
        unit = channel.vector / channel.vector.norm()
        rows = torch.tensor([channel.neuron])
        before, after = (read_matrix(model, channel.layer, "out", None, rows)[0] for model in (base, patched))
        wanted = 0.0 if name == NAMED else 2.0
        assert float(after @ unit) == pytest.approx(wanted * float(before @ unit), abs=0.01 * float(before.norm()))
    assert NAMED in found
    changed = {(vector.address, vector.matrix) for vector in made.edit.vectors}
    assert len(changed) == len(made.edit.vectors) >= 2


def test_everything_that_belongs_to_an_edit_works_on_it(
    written: tuple[Path, pipeline.Written, list[str]], tmp_path: Path
) -> None:
    folder, made, _ = written
    edit = load_edit(folder / "edit")
    assert [change.concept for change in edit.changes] == [change.concept for change in made.edit.changes]
    assert not verify(
        open_checkpoint(folder / "model"), edit, open_checkpoint("demo"), edit_folder=folder / "edit"
    ).problems
    revert(open_checkpoint(folder / "model"), folder / "edit", tmp_path / "back")
    assert identity(open_checkpoint(tmp_path / "back"))["tensors"] == identity(open_checkpoint("demo"))["tensors"]
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    assert edit.settings["channels"][0]["channel"] == NAMED
    assert edit.settings["found in"]["solver"]["solver"] == "circle"


def test_what_is_chosen_is_told_with_its_sign_and_measured_with_controls(
    written: tuple[Path, pipeline.Written, list[str]],
) -> None:
    folder, made, _ = written
    content = json.loads((folder / "channels.json").read_text())
    assert content["neurons"] == made.neurons
    turned = {channel["name"]: channel for neuron in made.neurons for channel in neuron["channels"]}
    assert turned[NAMED]["after"] == pytest.approx(0, abs=1e-5)
    assert turned[NAMED]["sign"] in (1, -1)
    assert {effect["name"] for effect in content["effects"]} <= turned.keys()
    trial = next(trial for trial in content["trials"] if trial["name"] == NAMED)
    assert trial["own"]["channel"] > max(trial["own"][name] for name in trial["own"] if name != "channel")
    assert any(note.startswith(f"{NAMED} (+: ") for note in made.edit.notes)


def test_a_recipe_that_was_written_gives_the_same_edit(
    written: tuple[Path, pipeline.Written, list[str]], tmp_path: Path
) -> None:
    from rotate_edit.recipe import read_recipe

    folder, made, _ = written
    again = pipeline.edit_only(
        read_recipe(folder / "recipe.yaml"), tmp_path / "again", checkpoint=False, measured=False
    )
    for one, other in zip(made.edit.changes, again.edit.changes, strict=True):
        assert torch.equal(one.delta(), other.delta())


def test_a_channel_of_a_set_is_the_one_that_is_found_on_the_spot(
    written: tuple[Path, pipeline.Written, list[str]],
) -> None:
    folder, _, _ = written
    on_the_spot = channel_job.choose_channels(session_of(recipe({"channel": NAMED})))
    from_set = channel_job.choose_channels(session_of(recipe({"channel": NAMED}, channel_set=str(folder))))
    assert same_channel(on_the_spot[0].channels[0], from_set[0].channels[0])
    assert on_the_spot[0].channels[0].tokens == from_set[0].channels[0].tokens
    said = channel_job.choose_channels(
        session_of(recipe({"tokens": ["dog", "hound", "terrier"]}, channel_set=str(folder)))
    )
    assert said[0].channels[0].name.startswith("L4.N393.out#")


def test_channels_beside_a_concept_are_in_one_edit(tmp_path: Path) -> None:
    both = recipe(
        {"channel": NAMED},
        concepts=[words_of("music", strength=2.0)],
        edit={"method": "least-collateral-everywhere"},
        evaluate={"items": "demo"},
    )
    made = pipeline.edit_only(both, tmp_path / "both", checkpoint=False, measured=False).edit
    assert made.concepts == ("music", NAMED)
    assert {change.strength for change in made.changes if change.concept == "music"} == {2.0}
    assert made.method == "least-collateral-everywhere"
    assert NAMED in {name for vector in made.vectors for name in vector.channels}


def test_effects_are_those_of_the_edited_model_and_none_without_a_change() -> None:
    session = session_of(recipe({"channel": NAMED}, {"channel": "L2.N10.gate#0", "strength": 2}))
    chosen = channel_job.choose_channels(session)
    edit = channel_job.with_channels(session, pipeline.Edit(pipeline.METHOD, ()), chosen)
    text = self_text(session.model, session.tokenizer, tokens=600, seed=0)
    effects, divergence = channel_effects(session.model, text, chosen, edit)
    assert {effect.name for effect in effects} >= {NAMED}
    assert all(effect.measure == ("probability" if ".out#" in effect.name else "activation") for effect in effects)
    still, none = channel_effects(session.model, text, chosen, edit.at(1e-12))
    assert none == pytest.approx(0, abs=1e-9)
    assert divergence > 0
    for effect in still:
        assert effect.after == pytest.approx(effect.before, rel=1e-6)
    with applied(session.model, edit):
        (reversed_, _) = channel_effects(session.model, text, chosen, edit.at(1e-12))
    assert reversed_[0].before == pytest.approx(effects[0].after, rel=1e-4)


REFUSED = [
    ({"channel": "L4.N374"}, "is not the name of a channel; write it as"),
    ({"channel": NAMED, "tokens": ["dog"]}, "give `channel` or `tokens`, and not both"),
    ({}, "give `channel` or `tokens`"),
    ({"channel": NAMED, "strength": 0}, "strength 0 changes nothing"),
    ({"tokens": ["dog"], "layers": [4, 2]}, "the first is above the last"),
]


@pytest.mark.parametrize(("entry", "message"), REFUSED)
def test_a_channel_that_cannot_be_is_an_error_of_the_recipe(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        recipe(entry)


def test_a_recipe_needs_something_to_edit_and_names_nothing_twice() -> None:
    with pytest.raises(BadInput, match="there is nothing to edit; give `concepts`, `channels` or both"):
        recipe()
    with pytest.raises(BadInput, match="two of the channels are the same"):
        recipe({"channel": NAMED}, {"channel": NAMED})


ABSENT = [
    ("L9.N0.out#0", "layer 9 is out of range"),
    ("L4.N999999.out#0", "L4.N999999 is not in the model"),
    ("L4.E1.N3.out#0", "layer 4 has no experts"),
    ("L4.N374.out#77", r"there is no channel L4.N374.out#77. There are L4.N374.out#0"),
    ("L4.N374.out#1000", "name these .token:.*, or the folder that holds it with --from"),
]


@pytest.mark.parametrize(("name", "message"), ABSENT)
def test_a_channel_that_is_not_there_is_said(name: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        channel_job.choose_channels(session_of(recipe({"channel": name})))


def test_a_model_is_searched_for_words_and_a_neuron_is_decomposed() -> None:
    session = session_of(recipe({"channel": NAMED}))
    found = channel_job.look_up(session, words=["dog", "hound", "terrier"], matrices=["out"], limit=4)
    assert [hit.channel.name for hit in found if hit.passed] == [found[0].channel.name]
    assert len(found) == 4
    values = [hit.channel.p_value for hit in found]
    assert None not in values
    assert values == sorted(values, key=lambda value: value or 0)
    # Every name that is told can be used.
    for hit in found:
        assert bool(hit.words) == (hit.channel.index >= 1000)
        entry = {"channel": hit.channel.name} | ({"tokens": list(hit.words)} if hit.words else {})
        (chosen,) = channel_job.choose_channels(session_of(recipe(entry)))
        assert same_channel(chosen.channels[0], hit.channel)
    own = channel_job.look_up(session, neuron="L4.N374")
    assert {hit.channel.matrix for hit in own} == {"gate", "in", "out"}
    assert NAMED in {hit.channel.name for hit in own}


def test_words_that_no_channel_says_are_a_failure_that_names_the_nearest() -> None:
    wanted = recipe({"tokens": ["dog"], "matrix": "in", "layers": [0, 0]}, select={"fdr": 1e-12})
    with pytest.raises(Failure, match=r"no channel of the in matrices of the layers 0 to 0 says dog"):
        channel_job.choose_channels(session_of(wanted))


def test_two_wishes_for_one_channel_are_refused(written: tuple[Path, pipeline.Written, list[str]]) -> None:
    folder, made, _ = written
    name = next(vector.channels[0] for vector in made.edit.vectors if vector.channels[0] != NAMED)
    both = recipe({"channel": name}, {"tokens": ["dog", "hound", "terrier"]}, channel_set=str(folder))
    with pytest.raises(BadInput, match="both mean the channel"):
        channel_job.choose_channels(session_of(both))


def test_a_set_of_another_model_or_without_vectors_is_refused(
    written: tuple[Path, pipeline.Written, list[str]], tmp_path: Path
) -> None:
    folder, _, _ = written
    found: list[Channel] = load_channels(folder / "channels")
    save_channels(found, tmp_path / "other", base={"headers": {"model.safetensors": "0"}}, settings={})
    save_channels(found, tmp_path / "bare", base=identity(open_checkpoint("demo")), settings={}, vectors=None)
    for name, message in (("other", "was made from another model"), ("bare", "was written without vectors")):
        with pytest.raises(BadInput, match=message):
            channel_job.choose_channels(session_of(recipe({"channel": NAMED}, channel_set=str(tmp_path / name))))


def test_a_run_of_channels_alone_says_what_to_use_instead(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="use `rotate-edit edit`"):
        pipeline.run(recipe({"channel": NAMED}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
