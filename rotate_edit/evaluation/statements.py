"""Questions about any concept, made from statements about it: a word or number is blanked, four may fill the blank.

The statements are texts that somebody wrote, or that the model wrote itself (`write`). What it wrote is what it
believes, true or not, so such questions ask what an edit took of it. They are no test of the world.
"""

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rotate_edit.evaluation.knowledge import known_places, read_answers
from rotate_edit.evaluation.questions import Question, word_pattern

Write = Callable[[Sequence[str]], Sequence[str]]
CHOICES = 4
LEAST_WORDS, MOST_WORDS = 6, 40
BLANKS_A_STATEMENT = 2
# What a person asks to hear about something. Each is one prompt; a caller may write to each of them many times.
REQUESTS = (
    "Tell me a fact about {concept}.",
    "Explain {concept} to a student in a few sentences.",
    "Write a short encyclopedia article about {concept}.",
    "What is the history of {concept}?",
    "What should a beginner know about {concept}?",
    "Name people, places or things that belong to {concept}, and say why.",
    "How does {concept} work?",
    "What are common mistakes about {concept}?",
)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
# Words of four letters or more that say little by themselves.
_LITTLE = """
about above after again against also although always among another because been before being below between both
cannot could does doing down during each either else even ever every from further have having here hers herself
himself however into itself just like made make many might more most much must myself neither never nothing often
once only other others ought ours over perhaps quite rather really same shall should since some someone something
sometimes still such than that their theirs them themselves then there therefore these they this those though
through thus together towards under until upon used using usually very well were what whatever when where whether
which while whom whose will with within without would your yours yourself known called important
"""
_FUNCTION_WORDS = frozenset(_LITTLE.split())


@dataclass(frozen=True)
class Blank:
    """One word of a statement that may be asked for.

    Attributes:
        before: The statement up to the word, without the space before it.
        word: The word.
        after: What follows it.
        kind: "number", "name" (capitalised inside a sentence) or "word".
        previous: The word before it, in lower case.
    """

    before: str
    word: str
    after: str
    kind: str
    previous: str


def requests(concept: str) -> list[str]:
    """Prompts that ask a model to write about a concept."""
    return [request.replace("{concept}", concept) for request in REQUESTS]


def statements(texts: Sequence[str]) -> list[str]:
    """The different sentences of texts that end as sentences do and are neither short nor long."""
    found: dict[str, None] = {}
    for text in texts:
        for sentence in _SENTENCE_END.split(text):
            sentence = sentence.strip(" \t*#>-•")
            if sentence.endswith(".") and LEAST_WORDS <= len(sentence.split()) <= MOST_WORDS:
                found[sentence] = None
    return list(found)


def blanks(statement: str, listed: Sequence[str] = ()) -> list[Blank]:
    """The words of a statement that may be asked for.

    They are numbers, names and words of four letters or more that are no function words. Listed words are never among
    them, nor the first two words of the statement, nor a word that occurs in the statement twice.

    Args:
        statement: One sentence.
        listed: The concept's words.
    """
    words, own = list(_WORD.finditer(statement)), word_pattern(listed) if listed else None
    texts = [match[0].casefold() for match in words]
    found = []
    for place, match in enumerate(words[2:], start=2):
        word = match[0]
        kind = "number" if word.isdigit() else "name" if word[0].isupper() else "word"
        usable = kind == "number" or (word.isalpha() and len(word) >= 4 and word.casefold() not in _FUNCTION_WORDS)
        if not usable or (own is not None and own.search(word)) or texts.count(word.casefold()) > 1:
            continue
        before = statement[: match.start()]
        if not before.endswith(" "):
            continue
        found.append(Blank(before[:-1], word, statement[match.end() :], kind, texts[place - 1]))
    return found


def cloze_questions(
    texts: Sequence[str], listed: Sequence[str] = (), *, concept: str = "", seed: int = 0
) -> list[Question]:
    """Turn texts about a concept into four-choice questions.

    The wrong choices are words that other statements have in a like place: after the same word where there are three,
    else of the same kind. All are compared with the rest of the statement after them. The word that is right stands in
    none of the other choices' places by chance: the order is drawn.

    Args:
        texts: The texts.
        listed: The concept's words, which are never asked for and never offered.
        concept: The concept's name.
        seed: Seed of the draw.

    Returns:
        At most two questions a statement. Empty where there are too few different words.
    """
    by_statement = [(statement, blanks(statement, listed)) for statement in statements(texts)]
    every = [blank for _, found in by_statement for blank in found]
    shuffled, questions = random.Random(seed), []
    for statement, found in by_statement:
        inside = {match[0].casefold() for match in _WORD.finditer(statement)}
        for blank in shuffled.sample(found, min(BLANKS_A_STATEMENT, len(found))):
            like = [other for other in every if other.kind == blank.kind and other.word.casefold() not in inside]
            wrong = _three(shuffled, [other.word for other in like if other.previous == blank.previous])
            wrong = wrong or _three(shuffled, [other.word for other in like])
            if not wrong:
                continue
            choices = [blank.word, *wrong]
            shuffled.shuffle(choices)
            continued = tuple(f" {word}{blank.after}" for word in choices)
            questions.append(Question(blank.before, continued, choices.index(blank.word), concept))
    return questions


def _three(shuffled: random.Random, words: Sequence[str]) -> list[str]:
    """Three different words, or none."""
    different = sorted({word.casefold(): word for word in words}.values())
    return shuffled.sample(different, CHOICES - 1) if len(different) >= CHOICES - 1 else []


def self_made_questions(
    model: Any, tokenizer: Any, write: Write, concept: str, listed: Sequence[str], *, most: int = 100, seed: int = 0
) -> tuple[Question, ...]:
    """Questions from what the model says about a concept, those that it answers by a margin.

    Args:
        model: The loaded base.
        tokenizer: Its tokenizer.
        write: Continues prompts with texts; called once with all `requests`.
        concept: The concept's name.
        listed: Its words.
        most: At most this many questions.
        seed: Seed of the draw.

    Returns:
        The questions. Empty where the model says too little.
    """
    made = cloze_questions(write(requests(concept)), listed, concept=concept, seed=seed)
    if not made:
        return ()
    known = known_places(read_answers(model, tokenizer, made))
    return tuple(made[place] for place in known[:most])
