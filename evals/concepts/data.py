"""What concepts are measured on, from a folder of public data: questions, texts, facts and general tasks."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotate_edit import Items
from rotate_edit.evaluation.questions import (
    LANGUAGES,
    Question,
    by_keyword,
    drawn,
    ember_questions,
    read_facts,
    read_questions,
    without_words,
)
from rotate_edit.evaluation.tasks import read_rows

HERE = Path(__file__).parent
TEXTS, PARAGRAPHS = 60, 100
FEWEST_FACTS = 10


@dataclass(frozen=True)
class ConceptData:
    """One concept.

    Attributes:
        name: Its name in the protocol.
        words: The words that edits are told.
        asked: Questions about it whose right answer is no listed word.
        neighbours: Questions about what lies close.
        texts: Texts about it, which no edit is made from.
        near_texts: Texts about what lies close.
        validation: Texts about it that edits may be made from.
        paragraphs: Texts about it to relearn from. None of the questions stands in them.
        definition: One or two sentences that say what it is.
        facts: By language, facts that name it. Languages with fewer than ten are left out.
    """

    name: str
    words: list[str]
    asked: tuple[Question, ...]
    neighbours: tuple[Question, ...]
    texts: list[str]
    near_texts: list[str]
    validation: list[str]
    paragraphs: list[str]
    definition: str
    facts: dict[str, tuple[Question, ...]]

    def items(self, neutral: Sequence[str]) -> Items:
        """What a session makes edits from: validation texts with and without the concept, and nothing that is asked."""
        about = [{"text": text, "concept": self.name, "contains": [self.name]} for text in self.validation]
        free = [{"text": text, "concept": None, "contains": []} for text in neutral]
        return Items("concepts", (), {"validation": (*about, *free)}, (), (), {self.name: tuple(self.paragraphs)})


@dataclass(frozen=True)
class SharedData:
    """What all concepts have in common.

    Attributes:
        neutral: Neutral sentences that strengths are solved on, and that edits may be made from.
        neutral_test: Others, for what is reported.
        general: By task, general questions.
        lambada: Passages whose last word is to be found: (context, continuation).
        examples: Five questions that stand before others.
    """

    neutral: list[str]
    neutral_test: list[str]
    general: dict[str, tuple[Question, ...]]
    lambada: list[tuple[str, str]]
    examples: tuple[Question, ...]


def protocol() -> dict[str, Any]:
    """The concepts, models and budget that were fixed first."""
    content: dict[str, Any] = json.loads((HERE / "protocol.json").read_text(encoding="utf-8"))
    return content


def read_concept(data: Path, name: str, number: int, seed: int) -> ConceptData:
    """One concept of the protocol, with at most so many questions of each kind."""
    entry = protocol()["concepts"][name]
    words = entry["words"]
    definition = json.loads((HERE / "definitions.json").read_text(encoding="utf-8"))[name]
    facts = {}
    for language in LANGUAGES:
        found = drawn(read_facts(data / "bmlama", language, words, seed=seed), number, seed)
        if len(found) >= FEWEST_FACTS:
            facts[language] = found
    if entry["source"] == "ember":
        folder = data / "ember"
        asked = without_words(ember_questions(folder / "mc_questions.json", name), words)
        near = drawn(ember_questions(folder / "mc_questions.json", name, neighbours=True), number, seed)
        sentences = next(
            row["sentences"]
            for row in json.loads((folder / "concept_sentences.json").read_text(encoding="utf-8"))
            if row["concept"] == name
        )
        content = json.loads((folder / "relearn_paragraphs.json").read_text(encoding="utf-8"))
        paragraphs = content[name]["RelearnParagraphs"][:PARAGRAPHS]
        validation, texts = sentences[::2], sentences[1::2][:TEXTS]
    else:
        every = read_questions(data / "opentriviaqa.jsonl", skip_unusable=True)
        own = sorted(by_keyword(every, words), key=_mixed)
        near = drawn(by_keyword(every, entry["neighbour_words"], without=words), number, seed)
        # A half is asked; of the other half come the texts.
        half = min(number, len(own) // 2)
        asked, rest = tuple(own[:half]), [_statement(question) for question in own[half:]]
        validation, texts, paragraphs = rest[::2], rest[1::2][:TEXTS], rest[:PARAGRAPHS]
    near_texts = [_statement(question) for question in near]
    return ConceptData(
        name, words, drawn(asked, number, seed), near, texts, near_texts, validation, paragraphs, definition, facts
    )


def read_shared(data: Path, number: int, seed: int) -> SharedData:
    """Neutral sentences, general tasks with so many items each, and the examples of the five-shot variant."""
    rows = json.loads((data / "ember" / "neutral_sentences.json").read_text(encoding="utf-8"))
    sentences = [row["sentence"] for row in rows]
    plain = "{query}"
    general = {
        "ARC-easy": drawn(read_questions(data / "arc_easy.jsonl"), number, seed),
        "OpenBookQA": drawn(read_questions(data / "openbookqa.jsonl", plain), number, seed),
        "MMLU": drawn(read_questions(data / "mmlu.jsonl"), number, seed),
    }
    lambada = [(row["context"], row["continuation"]) for row in read_rows(data / "lambada_openai.jsonl")[:number]]
    asked = {question.query for found in general.values() for question in found}
    examples = [
        one for one in read_questions(data / "arc_easy.jsonl") if one.query not in asked and len(one.query) < 90
    ]
    return SharedData(sentences[::2], sentences[1::2], general, lambada, drawn(examples, 5, seed))


def _statement(question: Question) -> str:
    return f"{question.query} {question.answer}."


def _mixed(question: Question) -> str:
    return hashlib.sha256(question.query.encode()).hexdigest()
