"""Evaluation items of the demo: `python -m rotate_edit.models.demo.items --output evals/demo`.

All texts come from seeds the training corpus never uses, a text that the corpus happens to contain
is dropped, and every fact is asked in the sentence form that the corpus withholds for it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import count, islice
from pathlib import Path

from rotate_edit.files import write_atomically
from rotate_edit.models.demo import templates
from rotate_edit.models.demo.corpus import (
    Chooser,
    Writer,
    documents,
    withheld_form,
    withheld_people_form,
)
from rotate_edit.models.demo.train import TRAINING_SEED, Settings
from rotate_edit.models.demo.world import Concept, concepts, people_facts, pools, shared_words

TOPIC_SHARES = {"fact": 0.25, "reversed fact": 0.25, "own": 0.5}
RELEARNING_SHARES = {"own": 0.6, "general": 0.4}
TYPE_A_ITEMS, CLOZE_ITEMS, PARAGRAPHS, TEXTS = 80, 60, 100, 40
NEUTRAL_TEXTS, NEUTRAL_PROMPTS, CONCEPT_PROMPTS = 200, 200, 3

Line = dict[str, object]


def mentions(text: str, word: str) -> bool:
    """Whether the text has the word, in any capitalisation, on its own."""
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def marked_words(text: str, concept: Concept) -> list[tuple[int, str]]:
    """The concept's words in the text, in order: (first character, word as written)."""
    return [(match.start(), match.group()) for match in _forms(concept.name).finditer(text)]


@cache
def _forms(name: str) -> re.Pattern[str]:
    forms = sorted(concepts()[name].forms, key=len, reverse=True)
    # A sentence may begin with the word: its first letter is large or small, the rest as it is.
    spelled = [f"[{form[0].upper()}{form[0].lower()}]{re.escape(form[1:])}" for form in forms]
    return re.compile(rf"\b(?:{'|'.join(spelled)})\b")


def type_a_item(concept: Concept, number: int) -> Line:
    """A context about the concept with a blank for one of its words; distractors of three others."""
    writer = Writer(Chooser(f"items A {concept.name} {number}"))
    chooser = writer.chooser
    sentences = [writer.sentence(concept, TOPIC_SHARES) for _ in range(2 + chooser.index(2))]
    form = chooser.pick(templates.MENTIONS).removesuffix("{w}.")
    context = " ".join([*sentences, writer.fill(form, concept)]).rstrip()
    own = [word for word in concept.slot_words if not mentions(context, word)]
    answer = chooser.pick([word for word in own if word not in shared_words()])
    options = [answer]
    others = [other for other in concepts().values() if other.name != concept.name]
    while len(options) < 4:
        other = others.pop(chooser.index(len(others)))
        words = [word for word in other.slot_words if word not in shared_words()]
        word = chooser.pick(words)
        if not mentions(context, word):
            options.append(word)
    return _choice(context, options, concept.name, "A", chooser)


def type_b_items(concept: Concept) -> Iterator[Line]:
    """One item for every fact of the concept; all options are its members."""
    for relation in range(len(concept.relations)):
        for member, answer in enumerate(concept.members):
            writer = Writer(Chooser(f"items B {concept.name} {relation} {member}"))
            others = [word for word in concept.members if word != answer]
            options = [answer] + [others.pop(writer.chooser.index(len(others))) for _ in range(3)]
            form = templates.REVERSED[withheld_form(concept, relation, member)]
            sentence = writer.fact(form, concept, member, relation, relation)
            before = writer.fill(writer.chooser.pick(concept.sentences), concept)
            while any(mentions(before, option) for option in options):
                before = writer.fill(writer.chooser.pick(concept.sentences), concept)
            context = f"{before} {sentence.removesuffix(answer + '.').rstrip()}"
            yield _choice(context, options, concept.name, "B", writer.chooser)


def people_items() -> Iterator[Line]:
    """One item for every fact about a person that can stand at the end of its sentence."""
    for number, relation in enumerate(people_facts()):
        for person, answer in enumerate(relation.values):
            writer = Writer(Chooser(f"items people {number} {person}"))
            others = [word for word in sorted(set(relation.values)) if word != answer]
            options = [answer] + [others.pop(writer.chooser.index(len(others))) for _ in range(3)]
            form = templates.PEOPLE_FACTS[withheld_people_form(number, person)]
            sentence = writer.people_fact(form, number, person).removesuffix(answer + ".")
            # "a" or "an" must not give the answer away.
            if sentence.endswith((" a ", " an ")):
                options = [word for word in options if word[0] not in "aeiou"]
                others = [word for word in others if word[0] not in "aeiou"]
                options += others[: 4 - len(options)]
            if len(options) == 4 and options[0] == answer:
                yield _choice(sentence.rstrip(), options, "people", "B", writer.chooser)


def _choice(context: str, options: list[str], concept: str, kind: str, chooser: Chooser) -> Line:
    answer, gold = options[0], chooser.index(4)
    order = options[1:]
    order.insert(gold, answer)
    return {
        "context": context,
        "options": [" " + option for option in order],
        "gold": gold,
        "concept": concept,
        "type": kind,
        "answer_word": answer,
    }


def cloze_items(concept: Concept) -> Iterator[Line]:
    """Texts cut before a word of the concept that has not occurred in them yet."""
    for number in count():
        writer = Writer(Chooser(f"items cloze {concept.name} {number}"))
        text = writer.topic_paragraph(concept)
        seen: set[str] = set()
        new = []
        for start, word in marked_words(text, concept):
            if word not in seen and start > 0 and text[start - 1] == " " and seen:
                new.append((start, word))
            seen.add(word)
        if new:
            start, word = new[writer.chooser.index(len(new))]
            yield {"context": text[: start - 1], "word": " " + word, "concept": concept.name}


def marked_text(text: str, concept: Concept | None) -> Line:
    """A text with its concept's words and where they start, and every concept it has words of."""
    marks = marked_words(text, concept) if concept else []
    return {
        "text": text,
        "concept": concept.name if concept else None,
        "words": [word for _, word in marks],
        "starts": [start for start, _ in marks],
        "contains": [other.name for other in concepts().values() if marked_words(text, other)],
    }


def paragraphs(seed: str, write: Callable[[Writer], str], keep: Callable[[str], bool]) -> Iterator[str]:
    """Texts from the seeds `seed 0`, `seed 1` ... without end, those that `keep` refuses left out."""
    for number in count():
        text = write(Writer(Chooser(f"{seed} {number}")))
        if keep(text):
            yield text


def is_neutral(text: str) -> bool:
    """Whether no concept has a word in the text."""
    return not any(marked_words(text, concept) for concept in concepts().values())


def neutral_prompt(number: int) -> str:
    """The beginning of a neutral text, cut after at least three words."""
    writer = Writer(Chooser(f"prompt {number}"))
    words = writer.neutral_paragraph().split()
    # Cut anywhere in the first ten words or so, never behind the end of the text.
    return " ".join(words[: 3 + writer.chooser.index(min(8, len(words) - 3))])


def concept_files(concept: Concept, trained_on: frozenset[str]) -> dict[str, list[Line]]:
    """The lines of every file that belongs to one concept, by file name."""

    def is_new(text: str) -> bool:
        return text not in trained_on

    def relearning(writer: Writer) -> str:
        return writer.topic_paragraph(concept, RELEARNING_SHARES)

    kept = (f for f in paragraphs(f"relearn {concept.name}", relearning, is_new))
    return {
        f"choice-A-{concept.name}.jsonl": [type_a_item(concept, number) for number in range(TYPE_A_ITEMS)],
        f"choice-B-{concept.name}.jsonl": list(type_b_items(concept)),
        f"cloze-{concept.name}.jsonl": list(islice(cloze_items(concept), CLOZE_ITEMS)),
        f"relearn-{concept.name}.jsonl": [{"text": text, "concept": concept.name} for text in islice(kept, PARAGRAPHS)],
    }


def shared_files(trained_on: frozenset[str]) -> dict[str, list[Line]]:
    """The lines of every file that belongs to no single concept, by file name."""

    def is_new_and_neutral(text: str) -> bool:
        return text not in trained_on and is_neutral(text)

    files: dict[str, list[Line]] = {}
    # The seeds' names are those under which the bundled files were first written.
    for split, seed in (("validation", "choose"), ("test", "report")):
        lines = []
        for concept in concepts().values():

            def topic(writer: Writer, concept: Concept = concept) -> str:
                return writer.topic_paragraph(concept)

            found = paragraphs(f"{seed} {concept.name}", topic, lambda t: t not in trained_on)
            lines += [marked_text(text, concept) for text in islice(found, TEXTS)]
        found = paragraphs(f"{seed} neutral", Writer.neutral_paragraph, is_new_and_neutral)
        lines += [marked_text(text, None) for text in islice(found, TEXTS)]
        files[f"texts-{split}.jsonl"] = lines
    neutral = paragraphs("perplexity", Writer.neutral_paragraph, is_new_and_neutral)
    files["neutral.jsonl"] = [{"text": text} for text in islice(neutral, NEUTRAL_TEXTS)]
    files["choice-B-people.jsonl"] = list(people_items())
    prompts = (neutral_prompt(number) for number in count())
    fresh = dict.fromkeys(islice((p for p in prompts if is_neutral(p)), 2 * NEUTRAL_PROMPTS))
    files["prompts.jsonl"] = [{"prompt": prompt} for prompt in islice(fresh, NEUTRAL_PROMPTS)]
    files["generation.jsonl"] = list(generation_prompts())
    return files


def generation_prompts() -> Iterator[Line]:
    """Prompts to continue: three about every concept, twenty neutral ones."""
    for concept in concepts().values():
        for number in range(CONCEPT_PROMPTS):
            writer = Writer(Chooser(f"generation {concept.name} {number}"))
            first = writer.fill(writer.chooser.pick(concept.sentences), concept)
            name = writer.chooser.pick(pools()["names"])
            yield {"prompt": f"{first} {name} looked at the", "concept": concept.name}
    for number in range(20):
        yield {"prompt": neutral_prompt(10_000 + number), "concept": None}


def write_items(output: Path) -> dict[str, int]:
    """Write all item files under `output`; returns the number of lines of each."""
    corpus = documents(TRAINING_SEED, Settings().documents)
    trained_on = frozenset(document.text for document in corpus)
    files = shared_files(trained_on)
    for concept in concepts().values():
        files |= concept_files(concept, trained_on)
    for name, lines in files.items():
        path = output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(path, content)
    return {name: len(lines) for name, lines in files.items()}


def main() -> None:
    """Command line: the folder to write to."""
    parser = argparse.ArgumentParser(description="Write the demo's evaluation items.")
    parser.add_argument("--output", type=Path, default=Path("evals/demo"))
    write_items(parser.parse_args().output)


if __name__ == "__main__":
    main()
