"""The demo's small world: concepts, their words and the facts that link them.

The word lists are data (`world.json`); this file turns them into frozen dataclasses. Facts are
drawn once, from a fixed seed, so that every text generator sees the same world.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

WORLD_SEED = 20261121
PEOPLE_RELATIONS = {
    "works as a {v}": "jobs",
    "was born in {v}": "months",
    "prefers the colour {v}": "colours",
}


@dataclass(frozen=True)
class Relation:
    """One kind of fact: `phrase` says it of a member, `values[i]` belongs to `members[i]`.

    The phrase is a verb phrase with `{v}` where the value stands ("sleeps in the {v}").
    """

    phrase: str
    values: tuple[str, ...]

    def say(self, member_index: int) -> str:
        """The verb phrase with the value of one member filled in."""
        return self.phrase.replace("{v}", self.values[member_index])


@dataclass(frozen=True)
class Concept:
    """A topic of the world with the words that belong to it.

    `members` are the things facts are told about (collie, poodle ...), `nouns` the singular nouns
    that go with them (kennel, leash ...), `verbs` what they do, in the base form. `plurals` maps
    each countable noun to its plural. `article` is "the " or, for proper names, "".
    """

    name: str
    kind: str
    kinds: str
    article: str
    members: tuple[str, ...]
    nouns: tuple[str, ...]
    verbs: tuple[str, ...]
    adjectives: tuple[str, ...]
    comparison: str
    neighbours: tuple[str, ...]
    plurals: dict[str, str]
    relations: tuple[Relation, ...]
    sentences: tuple[str, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """The concept's words in the singular: members, then the other nouns, the kind last."""
        own_kind = (self.kind,) if " " not in self.kind else ()
        return tuple(dict.fromkeys((*self.members, *self.nouns, *own_kind)))

    @property
    def slot_words(self) -> tuple[str, ...]:
        """The singular nouns that can stand after "the" in any sentence."""
        return (*self.members, *self.nouns) if self.article else self.nouns

    @property
    def forms(self) -> tuple[str, ...]:
        """Every form of the concept's words: singular, plural, and the verbs in four forms."""
        verbs = [form for verb in self.verbs for form in verb_forms(verb).values()]
        return tuple(dict.fromkeys((*self.words, *self.plurals.values(), *verbs)))


def plural(noun: str) -> str:
    """The plural of an English noun, from the world's list of exceptions or by rule."""
    irregular = _raw()["irregular_plurals"]
    if noun in irregular:
        return str(irregular[noun])
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def verb_forms(verb: str) -> dict[str, str]:
    """The forms of a verb: `base`, `third` (barks), `past` (barked) and `ing` (barking)."""
    past = _raw()["irregular_verbs"].get(verb)
    if verb.endswith(("s", "x", "z", "ch", "sh")):
        third = verb + "es"
    elif verb.endswith("y") and verb[-2] not in "aeiou":
        third = verb[:-1] + "ies"
    else:
        third = verb + "s"
    if past is None:
        if verb.endswith("e"):
            past = verb + "d"
        elif third.endswith("ies"):
            past = verb[:-1] + "ied"
        else:
            past = verb + "ed"
    if past.endswith(verb[-1] + "ed") and past == verb + verb[-1] + "ed":
        ing = verb + verb[-1] + "ing"
    elif verb.endswith("e") and not verb.endswith(("ee", "oe")):
        ing = verb[:-1] + "ing"
    elif verb in ("run", "win", "spin", "swim", "cut", "dig"):
        ing = verb + verb[-1] + "ing"
    else:
        ing = verb + "ing"
    return {"base": verb, "third": third, "past": past, "ing": ing}


@cache
def concepts() -> dict[str, Concept]:
    """Every concept of the world by name, in a fixed order."""
    return {name: _concept(name, entry) for name, entry in _raw()["concepts"].items()}


@cache
def pools() -> dict[str, tuple[str, ...]]:
    """The words that belong to no concept: names, places, colours, things, feelings, adverbs ..."""
    lists = {name: _split(text) for name, text in _raw()["pools"].items()}
    lists["names"] = lists["women"] + lists["men"]
    return lists


@cache
def people_facts() -> tuple[Relation, ...]:
    """What is known of every person, in the order of `pools()["names"]`: job, birth, colour."""
    people = len(pools()["names"])
    facts = []
    for phrase, pool in PEOPLE_RELATIONS.items():
        values = _shuffled(pools()[pool] * people, f"{WORLD_SEED} {phrase}")
        facts.append(Relation(phrase, values[:people]))
    return tuple(facts)


@cache
def shared_words() -> dict[str, tuple[str, ...]]:
    """The words of two or more concepts (bark, crane, mint ...) with the concepts' names."""
    owners: dict[str, list[str]] = {}
    for concept in concepts().values():
        for form in concept.forms:
            owners.setdefault(form, []).append(concept.name)
    return {form: tuple(names) for form, names in owners.items() if len(names) > 1}


@cache
def _raw() -> dict[str, dict[str, Any]]:
    return json.loads((Path(__file__).parent / "world.json").read_text(encoding="utf-8"))


def _split(text: str) -> tuple[str, ...]:
    # A list with commas holds phrases, one without holds single words.
    parts = text.split(",") if "," in text else text.split()
    return tuple(dict.fromkeys(part.strip() for part in parts))


def _shuffled(items: tuple[str, ...], seed: str) -> tuple[str, ...]:
    # Sorting by random() keeps the facts the same on every Python version.
    generator = random.Random(seed)
    return tuple(sorted(items, key=lambda _: generator.random()))


def _concept(name: str, entry: dict[str, Any]) -> Concept:
    members, nouns = _split(entry["members"]), _split(entry["nouns"])
    kind, _, kinds = entry["kind"].partition(" ")
    if "kinds" in entry:
        kind, kinds = entry["kind"], entry["kinds"]
    countable = nouns if entry.get("plural", "yes") == "" or "article" in entry else members + nouns
    plurals = {noun: plural(noun) for noun in countable}
    if " " not in kind:
        plurals[kind] = kinds
    relations = []
    for phrase, values in entry["relations"]:
        drawn = _split(values)
        if values.startswith("@"):
            seed = f"{WORLD_SEED} {name} {phrase}"
            drawn = _shuffled(pools_of(values[1:]), seed)[: len(members)]
        relations.append(Relation(phrase, drawn))
    return Concept(
        name=name,
        kind=kind,
        kinds=kinds,
        article=entry.get("article", "the "),
        members=members,
        nouns=nouns,
        verbs=_split(entry["verbs"]),
        adjectives=_split(entry["adjectives"]),
        comparison=entry["comparison"],
        neighbours=_split(entry["neighbours"]),
        plurals=plurals,
        relations=tuple(relations),
        sentences=tuple(entry["sentences"]),
    )


def pools_of(name: str) -> tuple[str, ...]:
    """The pool from which a relation's values are drawn; months are too few and take the seasons too."""
    if name == "months":
        return pools()["months"] + ("autumn", "winter", "summer")
    return pools()[name]
