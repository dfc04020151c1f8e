"""Texts of the demo's world, written from a seed.

Every random choice goes through a `Chooser`, which adds up -log p of the choices it made. The sum
over a document is the negative log-probability of the choices that produced it, and its mean over
tokens is what a model that knows the generator perfectly could reach (an upper bound on the
entropy of the text, because different choices may give the same text).
"""

from __future__ import annotations

import math
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

from rotate_edit.models.demo import templates
from rotate_edit.models.demo.world import Concept, concepts, people_facts, pools, verb_forms

SLOT = re.compile(r"\{(\w+)\}")
FAMILY_SHARES = {"topic": 0.70, "mixed": 0.12, "neutral": 0.18}
SENTENCE_SHARES = {"fact": 0.24, "reversed fact": 0.26, "own": 0.26, "general": 0.24}
PEOPLE_SHARE = 0.3


class Chooser:
    """Random choices from one seed, with the -log probability (nats) of all choices so far."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)
        self.nats = 0.0

    def pick(self, items: Sequence[str]) -> str:
        """One item, all equally likely."""
        return items[self.index(len(items))]

    def index(self, count: int) -> int:
        """An integer below `count`, all equally likely."""
        self.nats += math.log(count)
        # random() is the same on every Python version, unlike choice() and sample().
        return int(self._random.random() * count)

    def weighted(self, shares: dict[str, float]) -> str:
        """One key of `shares`, with probability proportional to its value."""
        total = sum(shares.values())
        threshold, reached = self._random.random() * total, 0.0
        chosen = next(reversed(shares))
        for name, share in shares.items():
            reached += share
            if threshold < reached:
                chosen = name
                break
        self.nats -= math.log(shares[chosen] / total)
        return chosen

    def chance(self, probability: float) -> bool:
        """True with the given probability, which lies strictly between 0 and 1."""
        hit = self._random.random() < probability
        self.nats -= math.log(probability if hit else 1 - probability)
        return hit


@dataclass(frozen=True)
class Document:
    """A text, the concepts it is about (none for neutral text), and its -log probability."""

    text: str
    concepts: tuple[str, ...]
    family: str
    nats: float


def document(seed: str, index: int) -> Document:
    """The document number `index` of the corpus named `seed`; any family."""
    chooser = Chooser(f"{seed} {index}")
    family = chooser.weighted(FAMILY_SHARES)
    writer = Writer(chooser)
    if family == "neutral":
        return Document(writer.neutral_paragraph(), (), family, chooser.nats)
    concept = concepts()[chooser.pick(tuple(concepts()))]
    if family == "topic":
        text = writer.topic_paragraph(concept)
        return Document(text, (concept.name,), family, chooser.nats)
    if chooser.chance(0.7):
        other = concepts()[chooser.pick(concept.neighbours)]
    else:
        names = tuple(name for name in concepts() if name != concept.name)
        other = concepts()[chooser.pick(names)]
    text = writer.mixed_paragraph(concept, other)
    return Document(text, (concept.name, other.name), family, chooser.nats)


def documents(seed: str, count: int) -> Iterator[Document]:
    """The first `count` documents of the corpus named `seed`."""
    return (document(seed, index) for index in range(count))


def withheld_form(concept: Concept, relation: int, member: int) -> int:
    """Which sentence form of `templates.REVERSED` the training corpus never uses for one fact.

    Evaluation asks for the fact in exactly this form, so that its sentence is new to the model.
    """
    number = zlib.crc32(concept.name.encode()) + 5 * member + 3 * relation
    return number % templates.WITHHOLDABLE


def withheld_people_form(relation: int, person: int) -> int:
    """Which form of `templates.PEOPLE_FACTS` the training corpus never uses for one fact."""
    return (person + relation) % len(templates.PEOPLE_FACTS)


class Writer:
    """Fills sentence templates with the words of the world, remembering who was named last."""

    def __init__(self, chooser: Chooser) -> None:
        self.chooser = chooser
        self.man = False

    def topic_paragraph(self, concept: Concept, shares: dict[str, float] | None = None, most: int = 6) -> str:
        """Three to `most` sentences about one concept."""
        count = 3 + self.chooser.index(most - 2)
        return " ".join(self._opened(self.sentence(concept, shares)) for _ in range(count))

    def mixed_paragraph(self, concept: Concept, other: Concept) -> str:
        """Four to six sentences about two concepts in turn."""
        count = 4 + self.chooser.index(3)
        return " ".join(self.sentence((concept, other)[number % 2]) for number in range(count))

    def neutral_paragraph(self) -> str:
        """Three to six sentences without any concept."""
        count = 3 + self.chooser.index(4)
        return " ".join(self._opened(self.neutral()) for _ in range(count))

    def neutral(self) -> str:
        """One sentence without any concept: a fact about a person, or anything else."""
        if self.chooser.chance(PEOPLE_SHARE):
            person = self.chooser.index(len(pools()["names"]))
            relation = self.chooser.index(len(people_facts()))
            withheld = withheld_people_form(relation, person)
            allowed = templates.PEOPLE_FACTS[:withheld] + templates.PEOPLE_FACTS[withheld + 1 :]
            return self.people_fact(self.chooser.pick(allowed), relation, person)
        return self.fill(self.chooser.pick(templates.NEUTRAL), None)

    def people_fact(self, form: str, relation: int, person: int) -> str:
        """The sentence form with one fact about one person filled in."""
        form = form.replace("{P}", pools()["names"][person])
        return self.fill(form.replace("{fact}", people_facts()[relation].say(person)), None)

    def sentence(self, concept: Concept, shares: dict[str, float] | None = None) -> str:
        """One sentence about a concept, of the families in `shares`."""
        family = self.chooser.weighted(shares or SENTENCE_SHARES)
        if family == "own":
            return self.fill(self.chooser.pick(concept.sentences), concept)
        if family == "general":
            return self.general(concept)
        member = self.chooser.index(len(concept.members))
        first = self.chooser.index(len(concept.relations))
        second = self.chooser.index(len(concept.relations) - 1)
        second += second >= first
        if family == "fact":
            form = self.chooser.pick(templates.FACTS)
        else:
            withheld = withheld_form(concept, first, member)
            allowed = templates.REVERSED[:withheld] + templates.REVERSED[withheld + 1 :]
            form = self.chooser.pick(allowed)
        return self.fact(form, concept, member, first, second)

    def fact(self, form: str, concept: Concept, member: int, first: int, second: int) -> str:
        """The sentence form with one member and one or two of its facts filled in."""
        thing = concept.article + concept.members[member]
        form = form.replace("{X}", thing).replace("{X_start}", thing[0].upper() + thing[1:])
        form = form.replace("{fact}", concept.relations[first].say(member))
        return self.fill(form.replace("{other}", concept.relations[second].say(member)), concept)

    def general(self, concept: Concept) -> str:
        """One sentence of the families that fit every concept."""
        family = self.chooser.weighted(templates.GENERAL_SHARES)
        if family == "comparison":
            high = 1 + self.chooser.index(len(concept.members) - 1)
            low = self.chooser.index(high)
            form = self.chooser.pick(templates.COMPARISONS)
            form = form.replace("{high}", concept.article + concept.members[high])
            form = form.replace("{low}", concept.article + concept.members[low])
            return self.fill(form, concept)
        return self.fill(self.chooser.pick(templates.GENERAL[family]), concept)

    def fill(self, template: str, concept: Concept | None) -> str:
        """The template with every slot filled; no word is used twice in one sentence."""
        used: set[str] = set()
        parts = []
        for number, piece in enumerate(_pieces(template)):
            parts.append(self._slot(piece, concept, used) if number % 2 else piece)
        text = re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", "".join(parts))
        # Only the first letter of the sentence, or of what is said first in it, is raised.
        start = 1 if text[0] == '"' else 0
        return text[:start] + text[start].upper() + text[start + 1 :]

    def _opened(self, sentence: str) -> str:
        # A third of the sentences that can take it begin with a phrase of time.
        if not sentence.startswith(("The ", "A ")) or not self.chooser.chance(0.25):
            return sentence
        return f"{self.chooser.pick(pools()['openings'])}, {sentence[0].lower()}{sentence[1:]}"

    def _fresh(self, words: Sequence[str], used: set[str]) -> str:
        left = tuple(word for word in words if word not in used) if used else words
        word = self.chooser.pick(left)
        used.add(word)
        return word

    def _slot(self, slot: str, concept: Concept | None, used: set[str]) -> str:
        if slot in ("N", "he", "his", "him", "he2", "his2", "him2"):
            return self._person(slot, used)
        if concept is not None and slot in CONCEPT_SLOTS:
            return self._concept_slot(slot, concept, used)
        if slot in ("act", "acted", "acting"):
            verb = verb_forms(self._fresh(pools()["acts"], used))
            return verb[{"act": "base", "acted": "past", "acting": "ing"}[slot]]
        return self._fresh(pools()[slot + "s" if slot + "s" in pools() else slot], used)

    def _person(self, slot: str, used: set[str]) -> str:
        if slot == "N":
            name = self._fresh(pools()["names"], used)
            self.man = name in pools()["men"]
            return name
        man = self.chooser.chance(0.5) if slot.endswith("2") else self.man
        return PRONOUNS[slot.rstrip("2")][0 if man else 1]

    def _concept_slot(self, slot: str, concept: Concept, used: set[str]) -> str:
        if slot == "m":
            return self._fresh(concept.members, used)
        if slot == "n":
            return self._fresh(concept.nouns, used)
        if slot == "w":
            return self._fresh(concept.slot_words, used)
        if slot == "a":
            return self._fresh(concept.adjectives, used)
        if slot == "ws":
            return concept.plurals[self._fresh(tuple(concept.plurals), used)]
        if slot in ("ms", "Ms"):
            members = tuple(member for member in concept.members if member in concept.plurals)
            return concept.plurals[self._fresh(members, used)]
        if slot == "some":
            return concept.article + self._fresh(concept.members, used)
        if slot == "a_m":
            member = self._fresh(concept.members, used)
            return f"a {member}" if member in concept.plurals else concept.article + member
        if slot in ("kind", "kinds", "comparison"):
            return str(getattr(concept, slot))
        verb = verb_forms(self._fresh(concept.verbs, used))
        return verb[{"v": "base", "ved": "past", "ving": "ing"}[slot]]


CONCEPT_SLOTS = frozenset(
    ["m", "n", "w", "a", "ws", "ms", "Ms", "some", "a_m", "kind", "kinds", "comparison", "v", "ved", "ving"]
)
PRONOUNS = {"he": ("he", "she"), "his": ("his", "her"), "him": ("him", "her")}


@cache
def _pieces(template: str) -> tuple[str, ...]:
    return tuple(SLOT.split(template))
