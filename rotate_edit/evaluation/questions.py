"""Questions with a few answers to choose from: read from files, found by keyword, taken from evaluation items.

A question is a text and the texts that may follow it. A model answers by the likelihood of what follows (`knowledge`),
so models that are too small to name a letter can be asked too.
"""

import csv
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rotate_edit.errors import BadInput
from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.items import divide
from rotate_edit.evaluation.tasks import Items, Row, Task, read_ember, read_rows

# Ways to put a question into words. Only the frame changes: the question itself stays as it was written.
FORMS = (
    "Question: {query}\nAnswer:",
    "{query} The answer is",
    "Here is a question from a quiz. {query}\nThe right answer is",
    "Q: {query}\nA:",
)
LANGUAGES = ("en", "de", "es", "fr", "zh", "ja")
MOST_CHOICES = 26
_PLAIN_FIELD = re.compile(r"\{\{\s*([A-Za-z]\w*)\s*\}\}")


@dataclass(frozen=True)
class Question:
    """A text and what may follow it.

    Attributes:
        prompt: What the model is given.
        choices: The possible continuations, each with the space it begins with.
        gold: The place of the right one.
        concept: The concept it is about. Empty where it is about none.
        query: The question itself where the prompt puts it in a frame. Empty otherwise.
    """

    prompt: str
    choices: tuple[str, ...]
    gold: int
    concept: str = ""
    query: str = ""

    @property
    def answer(self) -> str:
        """The right answer, without the space before it."""
        return self.choices[self.gold].strip()

    @property
    def statement(self) -> str:
        """The prompt with its right answer."""
        return self.prompt + self.choices[self.gold]


def make_question(query: str, choices: Sequence[str], gold: int, concept: str = "", form: str = FORMS[0]) -> Question:
    """Put a question in a frame.

    Args:
        query: The question. A "Question:" before it is left out.
        choices: The answers.
        gold: The place of the right one.
        concept: The concept that it is about.
        form: The frame, with `{query}` in it.

    Returns:
        The question.
    """
    query = query.strip().removeprefix("Question:").strip()
    answers = tuple(" " + choice.strip() for choice in choices)
    return Question(form.replace("{query}", query), answers, gold, concept, query)


def reworded(question: Question, form: str) -> Question:
    """The same question in another frame. One without a query of its own stays as it is."""
    return replace(question, prompt=form.replace("{query}", question.query)) if question.query else question


# Reading.


def read_questions(path: Path, form: str = FORMS[0], *, skip_unusable: bool = False) -> tuple[Question, ...]:
    """Read JSON lines with `query`, `choices` and `gold`, and `concept` where there is one.

    Args:
        path: The file.
        form: The frame that each query is put in.
        skip_unusable: Leave lines out that cannot be asked, as large public sets hold a few.

    Returns:
        The questions, in the file's order.

    Raises:
        BadInput: A line cannot be asked.
    """
    questions = []
    for number, row in enumerate(read_rows(path, ("query",)), start=1):
        problem = _problem(row.get("choices"), row.get("gold"))
        if problem and skip_unusable:
            continue
        if problem:
            raise BadInput(f"item {number} of {path.name}: {problem}.")
        questions.append(make_question(row["query"], row["choices"], row["gold"], str(row.get("concept") or ""), form))
    return tuple(questions)


def _problem(choices: Any, gold: Any) -> str:
    if not isinstance(choices, list) or not 2 <= len(choices) <= MOST_CHOICES:
        return f"choices must be a list of 2 to {MOST_CHOICES} texts"
    if any(not isinstance(choice, str) or not choice.strip() for choice in choices):
        return "one of its choices is empty or not a text"
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        return "gold must be the place of the right choice, from 0"
    return ""


def ember_questions(path: Path, concept: str, *, neighbours: bool = False) -> tuple[Question, ...]:
    """Read one concept's questions from a file in EMBER's layout, both of its splits.

    Args:
        path: The file, `mc_questions.json`.
        concept: The concept's name there.
        neighbours: Whether the questions about its neighbours are read instead (Simdom).

    Returns:
        The questions.

    Raises:
        BadInput: The file is not in that layout, or holds none of the concept's questions.
    """
    role = "neighbour" if neighbours else "concept"
    found = tuple(
        make_question(row["question"], row["options"], row["gold"], concept)
        for row in read_ember(path)
        if row["concept"] == concept and row["role"] == role
    )
    if not found:
        raise BadInput(f"{path.name} holds no questions about {concept}.")
    return found


def word_pattern(words: Sequence[str]) -> re.Pattern[str]:
    """A pattern that finds whole words, in any case."""
    longest_first = sorted(dict.fromkeys(words), key=lambda word: (-len(word), word))
    return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, longest_first)) + r")(?!\w)", re.IGNORECASE)


def by_keyword(
    questions: Sequence[Question], words: Sequence[str], *, without: Sequence[str] = ()
) -> tuple[Question, ...]:
    """Find the questions that name one of the words and whose right answer holds none of them.

    Args:
        questions: The questions.
        words: Words of the concept.
        without: Words that neither the question nor any of its answers may hold.

    Returns:
        Those questions, in their order.
    """
    wanted, unwanted = word_pattern(words), word_pattern(without) if without else None

    def fits(question: Question) -> bool:
        text = question.query or question.prompt
        whole = " ".join((text, *question.choices))
        return bool(
            wanted.search(text)
            and not wanted.search(question.answer)
            and not (unwanted is not None and unwanted.search(whole))
        )

    return tuple(question for question in questions if fits(question))


def without_words(questions: Sequence[Question], words: Sequence[str]) -> tuple[Question, ...]:
    """The questions whose right answer holds none of the words.

    Such an answer is not a word that an edit was told to silence.
    """
    if not words:
        return tuple(questions)
    listed = word_pattern(words)
    return tuple(question for question in questions if not listed.search(question.answer))


def drawn(questions: Sequence[Question], number: int, seed: int) -> tuple[Question, ...]:
    """At most so many of the questions, shuffled by a seed."""
    return tuple(random.Random(seed).sample(list(questions), min(number, len(questions))))


def read_facts(
    folder: Path, language: str, words: Sequence[str], *, choices: int = 4, seed: int = 0
) -> tuple[Question, ...]:
    """Read a concept's facts in one language from BMLAMA's tables, whose rows are aligned.

    A fact belongs to the concept when its English sentence names one of the words. The candidates follow what stands
    before the mask, each with the rest of the sentence, so that whole sentences are compared.

    Args:
        folder: The folder with `en.tsv` and the other languages.
        language: One of `LANGUAGES`.
        words: English words of the concept.
        choices: How many candidates are kept, the right one among them.
        seed: Seed of their draw and order.

    Returns:
        The facts as questions.

    Raises:
        BadInput: A table is missing, or the tables are not aligned.
    """
    english, rows = (_table(folder / f"{name}.tsv") for name in ("en", language))
    if len(english) != len(rows):
        raise BadInput(f"{language}.tsv has {len(rows)} facts and en.tsv {len(english)}; their rows must be aligned.")
    about = word_pattern(words)
    questions = []
    for number, (plain, row) in enumerate(zip(english, rows, strict=True)):
        if not about.search(plain["Prompt"]) or row["Prompt"].count("<mask>") != 1:
            continue
        others = [one for one in row["Candidate Ans"].split(", ") if one and one != row["Ans"]]
        shuffled = random.Random(f"{seed} {number}")
        chosen = [row["Ans"], *shuffled.sample(others, min(choices - 1, len(others)))]
        if len(chosen) < 2:
            continue
        shuffled.shuffle(chosen)
        before, after = row["Prompt"].split("<mask>")
        space = " " if before.endswith(" ") else ""
        questions.append(
            Question(before.rstrip(), tuple(space + one + after for one in chosen), chosen.index(row["Ans"]))
        )
    return tuple(questions)


def _table(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path.name} cannot be read as a table of facts: {error}.") from error
    if any(row.get(name) is None for row in rows for name in ("Prompt", "Ans", "Candidate Ans")):
        raise BadInput(f"{path.name} needs the columns Prompt, Ans and Candidate Ans.")
    return rows


# From evaluation items.


def questions_of(items: Items, plan: Plan, role: str) -> tuple[Question, ...]:
    """The multiple-choice questions of one role among evaluation items.

    Questions that ask for a word of the concept (type A) are left out, and so is every question whose right answer
    names a listed word.

    Args:
        items: The items.
        plan: The concepts, their neighbours, their words and the number of items.
        role: "concept", "neighbour" or "general".

    Returns:
        The questions. Empty where there are none, or where a definition does more than name fields.
    """
    tasks, parts = divide([task for task in items.tasks if task.kind == "accuracy"], plan)
    by_name = {task.name: task for task in tasks}
    own = [part for part in parts if part.role == role and not (role == "concept" and plan.amplifies(part.concept))]
    found = [
        question
        for part in own
        if part.type != "A"
        for place in part.rows
        if (question := _of_row(by_name[part.task], by_name[part.task].rows[place])) is not None
    ]
    return without_words(found, plan.words)


def _of_row(task: Task, row: Row) -> Question | None:
    config: Mapping[str, Any] = task.config or {}
    if config.get("output_type") != "multiple_choice":
        return None
    prompt, choices = _rendered(config.get("doc_to_text"), row), row.get(str(config.get("doc_to_choice")))
    gold = row.get(str(config.get("doc_to_target")))
    if prompt is None or not isinstance(choices, list):
        return None
    place = choices.index(gold) if isinstance(gold, str) and gold in choices else gold
    if not isinstance(place, int):
        return None
    delimiter = str(config.get("target_delimiter", " "))
    return Question(prompt, tuple(delimiter + str(one) for one in choices), place, str(row.get("concept") or ""))


def _rendered(template: Any, row: Row) -> str | None:
    """A field, or a template that only looks fields up. None where it does more."""
    if not isinstance(template, str):
        return None
    if template in row:
        return str(row[template])
    text = _PLAIN_FIELD.sub(lambda match: str(row.get(match[1], "")), template)
    return None if "{{" in text or "{%" in text else text
