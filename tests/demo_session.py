"""Sessions on the demo model that share the loaded model and all that is read off it, so that it is read once."""

from dataclasses import replace
from functools import cache
from typing import Any

from rotate_edit.models.demo.world import concepts
from rotate_edit.recipe import Recipe
from rotate_edit.session import Session, open_session
from rotate_edit.vocabulary.projection import VocabularyRules


def words_of(name: str, **settings: Any) -> dict[str, Any]:
    """The entry of a recipe for one of the demo's concepts."""
    return {"name": name, "words": list(concepts()[name].words), "plurals": True} | settings


def session_of(recipe: Recipe) -> Session:
    """A session of a recipe for the demo model."""
    session = open_session(recipe)
    return replace(session, kept=_kept(session.vocabulary.rules))


@cache
def _kept(rules: VocabularyRules) -> dict[str, Any]:
    """What sessions under the same rules of the vocabulary have read."""
    return {}
