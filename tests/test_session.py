"""What a session settles when it opens, what it reads and what it does not, and the strengths that it solves for."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_session import session_of, words_of
from tiny_items import write_items
from tiny_models import FAMILIES

from rotate_edit import pipeline
from rotate_edit.edits.apply import applied
from rotate_edit.edits.edit import Edit
from rotate_edit.edits.edit_file import edit_identity
from rotate_edit.edits.methods import declaration, default_controls, make_method
from rotate_edit.errors import BadInput
from rotate_edit.evaluation import measures
from rotate_edit.evaluation.measures import Reference
from rotate_edit.models.checkpoint import load_tokenizer, open_checkpoint
from rotate_edit.recipe import Recipe, parse_recipe
from rotate_edit.session import Session, open_session

CONTROLS = (*default_controls(), "rank-one", "rank-one-channels", "channel-located", "zero-neurons")
READS_ACTIVATIONS = [name for name in CONTROLS if declaration(name).reads & {"activations", "text"}]
WRITES_OUT_ALONE = [name for name in CONTROLS if not declaration(name).writes & {"gate", "in"}]


def recipe(model: str, **changes: Any) -> Recipe:
    small = {"candidates": 20, "group_distance": 2.0}
    content: dict[str, Any] = {
        "model": model,
        "concepts": [{"name": "dogs", "words": ["dog", "puppy"], "strength": 2.0}],
        "locate": small,
        "decompose": {"channels": 1},
        "edit": {"self_text": 1000} | changes.pop("edit", {}),
    }
    if "locate" in changes:
        changes["locate"] = small | changes["locate"]
    return parse_recipe(content | changes)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random mixture of experts whose first layer is dense, with the demo's tokens."""
    import transformers

    folder = tmp_path_factory.mktemp("mixture") / "model"
    tokenizer = load_tokenizer(open_checkpoint("demo"))
    family = FAMILIES["qwen3_moe-dense-layer"]
    settings = family.sizes | family.extra | {"vocab_size": len(tokenizer), "tie_word_embeddings": False}
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3MoeConfig(**settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def built(session: Session) -> dict[str, Edit]:
    """The edits of the recipe's method and of its controls."""
    methods = (session.method, *session.controls)
    return session.build(methods, session.locate(methods))


# What the model and the matrices allow.


def test_a_mixture_of_experts_is_edited_with_the_controls_that_work_there(mixture: str) -> None:
    session = open_session(
        recipe(mixture, edit={"method": "direction-everywhere"}, evaluate={"controls": list(CONTROLS)})
    )
    assert READS_ACTIVATIONS
    assert not {*READS_ACTIVATIONS} & {*session.recipe.evaluate.controls}
    (note,) = session.notes
    assert all(control in note for control in READS_ACTIVATIONS)
    assert "experts" in note
    edits = built(session)
    # Layer 0 is dense, layer 1 has four experts.
    changed = edits["direction-everywhere"].changes
    assert {(change.layer, change.expert) for change in changed} == {(0, None), *((1, expert) for expert in range(4))}


@pytest.mark.parametrize("edit", [{}, {"method": "rank-one"}, {"method": "snmf-features"}])
def test_a_method_that_reads_activations_is_refused_at_once_for_a_mixture(mixture: str, edit: dict[str, str]) -> None:
    settings = {"items": "demo"}
    with pytest.raises(BadInput, match=r"this model has experts; set edit.method to channel-located"):
        open_session(recipe(mixture, edit=edit, evaluate=settings))


@pytest.mark.parametrize("matrices", [["gate"], ["gate", "in"]])
def test_the_read_side_goes_without_controls_that_write(matrices: list[str]) -> None:
    session = session_of(
        recipe(
            "demo",
            locate={"matrices": matrices},
            edit={"method": "lm-head-located"},
            evaluate={"controls": list(CONTROLS)},
        )
    )
    left = [name for name in CONTROLS if name not in WRITES_OUT_ALONE]
    assert session.recipe.evaluate.controls == left
    assert WRITES_OUT_ALONE
    assert "out matrices" in session.notes[0]
    assert built(session)["lm-head-located"].changes


def test_a_dense_model_keeps_every_control() -> None:
    session = session_of(recipe("demo"))
    assert session.recipe.evaluate.controls == list(default_controls())
    assert session.notes == ()


def test_an_empty_list_of_layers_is_refused() -> None:
    with pytest.raises(BadInput, match=r"locate.layers"):
        recipe("demo", locate={"layers": []})


# What is read.


@pytest.mark.parametrize("method", ["silence-words", "rank-one", "direction-everywhere", "token-logits"])
def test_a_method_that_needs_no_channels_triggers_no_search_and_reads_no_scores(method: str) -> None:
    reported: list[str] = []
    session = session_of(recipe("demo", edit={"method": method}))
    (group,) = session.locate(report=lambda step, done, total: reported.append(step))
    assert torch.equal(group.ids, session.tokens[0].ids)
    assert (group.scores, group.candidates, group.channels, group.chosen) == ({}, {}, (), ())
    assert reported == []
    session.check_located((group,))


def test_what_the_methods_read_is_looked_for_and_no_more() -> None:
    reported: list[str] = []
    session = session_of(recipe("demo", edit={"method": "lm-head-located"}))

    def located(*names: str) -> Any:
        methods = [make_method(name) for name in names]
        (group,) = session.locate(methods, lambda step, done, total: reported.append(step))
        return group

    scanned = located("lm-head-located", "rank-one")
    assert set(scanned.scores) == set(session.sites)
    assert (scanned.candidates, scanned.channels, reported) == ({}, (), [])
    searched = located("lm-head-located", "channel-located")
    assert len(searched.channels) > 0
    assert reported
    assert sum(map(len, searched.candidates.values())) == 20


# Edits.


@pytest.fixture(scope="module")
def solvable() -> Session:
    """A cheap method and a strength, with texts to measure on."""
    concept = words_of("dogs", strength=2.0)
    edit = {"method": "rank-one", "self_text": 2000}
    return session_of(recipe("demo", concepts=[concept], edit=edit, evaluate={"items": "demo", "tokens": 300}))


def with_goal(session: Session, **goal: float) -> Session:
    """The session with another goal for its concept."""
    (concept,) = session.recipe.concepts
    (wanted,) = parse_recipe(
        {"model": "demo", "concepts": [concept.model_dump() | {"strength": None} | goal], "evaluate": {"items": "demo"}}
    ).concepts
    return replace(session, recipe=session.recipe.model_copy(update={"concepts": [wanted]}))


def test_an_edit_is_located_built_and_at_its_strength(solvable: Session) -> None:
    edit = solvable.edit()
    unit = solvable.build([solvable.method], solvable.locate())["rank-one"]
    assert edit_identity(edit) == edit_identity(unit.at(2.0))
    assert edit.base == unit.base
    (change,) = edit.changes
    assert [vector.concept for vector in edit.vectors] == ["dogs"] * len(change.rows)
    assert min(vector.cosine for vector in edit.vectors) < 0.999
    louder = solvable.edit(3.5)
    assert {change.strength for change in louder.changes} == {3.5}
    assert edit_identity(louder) == edit_identity(unit.at(3.5))


def test_the_same_session_built_twice_gives_the_same_edit() -> None:
    wanted = recipe("demo", edit={"settings": {"steps": 2, "rank": 4}})
    first, second = open_session(wanted), open_session(wanted)
    edits = [session.edit() for session in (first, second, first)]
    assert len({edit_identity(edit) for edit in edits}) == 1
    assert edits[0].vectors == edits[1].vectors == edits[2].vectors


def test_other_settings_leave_the_first_session_as_it_was(solvable: Session) -> None:
    before, edit = solvable.recipe.model_copy(deep=True), edit_identity(solvable.edit())
    other = solvable.with_settings(
        {"edit.ridge": 3.0, "edit.settings.key_ridge": 0.5, "edit.self_text": 1200, "last layer": 2, "target": 0.3}
    )
    assert (other.recipe.edit.ridge, other.recipe.edit.settings) == (3.0, {"key_ridge": 0.5})
    assert other.recipe.locate.layers == [0, 1, 2]
    assert other.model is solvable.model
    assert edit_identity(other.edit()) != edit
    assert solvable.recipe == before
    assert edit_identity(solvable.edit()) == edit
    # What was read for the first is not taken for the other's.
    alone = open_session(other.recipe)
    assert edit_identity(other.edit()) == edit_identity(alone.edit())


def test_other_settings_that_are_not_possible_are_refused(solvable: Session) -> None:
    with pytest.raises(BadInput, match=r"edit.ridge"):
        solvable.with_settings({"edit.ridge": -1.0})
    with pytest.raises(BadInput, match=r"no setting 'rank'"):
        solvable.with_settings({"edit.settings.rank": 3})


def test_a_fit_of_other_settings_is_its_own() -> None:
    few = session_of(recipe("demo", edit={"settings": {"steps": 2, "rank": 4}}))
    few.edit()
    more = few.with_settings({"edit.self_text": 1200})
    assert edit_identity(more.edit()) == edit_identity(open_session(more.recipe).edit())


# Strengths.


def solved(session: Session) -> tuple[Edit, float, Reference]:
    """The edit at strength 1, its strength, and what it was solved on."""
    unit = session.build([session.method], session.locate())[session.recipe.method]
    known = session.reference("dogs", "validation")
    assert known is not None
    return unit, session.strengths(unit)["dogs"], known


def test_a_budget_is_kept_and_used_up(solvable: Session) -> None:
    session = with_goal(solvable, budget=0.02)
    unit, strength, known = solved(session)

    def damage(at: float) -> float:
        with applied(session.model, unit.at(at)):
            return measures.collateral_kl(session.model, known.others, known.others_base, draws=1).value

    assert strength > 0
    assert damage(strength) <= 0.02 < damage(1.03 * strength)


def test_odds_are_raised_as_many_times_as_asked(solvable: Session) -> None:
    session = with_goal(solvable.with_settings({"edit.method": "token-logits"}), odds=5.0)
    unit, strength, known = solved(session)
    before = measures.mean_log_odds(known.others_base, known.concept_ids)

    def times(at: float) -> float:
        with applied(session.model, unit.at(at)):
            after = measures.mean_log_odds(measures.every_position(session.model, known.others), known.concept_ids)
        return math.exp(after - before)

    assert strength < 0
    assert times(strength) >= 5.0 > times(0.97 * strength)
    # Nats at every position alike: a little more than log 5, since the concept takes some of it from itself.
    assert strength == pytest.approx(-math.log(5), rel=0.2)


def test_what_remains_is_as_little_as_asked(solvable: Session) -> None:
    session = with_goal(solvable, remaining=0.2)
    unit, strength, known = solved(session)

    def left(at: float) -> float:
        with applied(session.model, unit.at(at)):
            return float(measures.mass_by_text(session.model, known.concept, known.concept_ids)[0].sum())

    whole = float(known.concept_mass[0].sum())
    assert left(strength) / whole <= 0.2 < left(0.97 * strength) / whole


@pytest.mark.parametrize("goal", [{"remaining": 0.1}, {"budget": 0.02}, {"odds": 5.0}])
def test_no_strength_is_chosen_on_test_texts(goal: dict[str, float], solvable: Session) -> None:
    assert solvable.items is not None
    assert solvable.items.texts["test"]
    without = replace(solvable.items, texts={"test": solvable.items.texts["test"]})
    session = replace(with_goal(solvable, **goal), given_items=without)
    assert session.reference("dogs", "test") is not None
    unit = session.build([session.method], session.locate())["rank-one"]
    with pytest.raises(BadInput, match=f"concepts.dogs.{next(iter(goal))}: the items hold no validation text"):
        session.strengths(unit)
    with pytest.raises(BadInput, match="no validation text"):
        session.edit()
    # A strength that is given needs none.
    assert replace(solvable, given_items=without).strengths(unit) == {"dogs": 2.0}


def test_an_edit_with_a_goal_and_items_without_validation_texts_writes_nothing(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items")
    concept = {"name": "dog", "words": ["dog"]}
    settings = {"evaluate": {"items": str(items)}, "edit": {"method": "rank-one"}}
    wanted = recipe("demo", concepts=[concept], **settings)
    given = recipe("demo", concepts=[concept | {"strength": 1}], **settings)
    assert session_of(given).reference("dog", "test") is not None
    with pytest.raises(BadInput, match=r"concepts\.dog\.remaining: the items hold no validation text"):
        pipeline.edit_only(wanted, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["items"]


# Words.


def test_words_are_told_of_before_the_items_are_read() -> None:
    told: list[str] = []
    unreadable = recipe(
        "demo",
        concepts=[{"name": "dogs", "words": ["dog", "dogfight"], "keep": ["dogfighter"], "strength": 2.0}],
        protect=["violin", "violinmaker"],
        evaluate={"text": "nowhere.txt"},
    )
    with pytest.raises(BadInput, match="nowhere"):
        open_session(unreadable, tell=told.extend)
    split, protected, keep = told
    assert split.startswith("concept 'dogs': 'dogfight' is split into ' dog' + ")
    assert protected == "protect: an edit cannot leave 'violinmaker' alone, for want of a token of its own."
    assert keep.startswith("concepts.dogs.keep: an edit cannot leave 'dogfighter' alone")


def test_a_word_to_keep_that_is_no_token_is_told_of_and_the_edit_is_built() -> None:
    kept = recipe("demo", protect=["violinmaker"], edit={"method": "rank-one"})
    session = open_session(kept)
    assert any("violinmaker" in note for note in session.notes)
    methods = (session.method,)
    assert session.build(methods, session.locate(methods))["rank-one"].changes
