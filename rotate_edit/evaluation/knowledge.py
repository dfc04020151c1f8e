"""What a model knows, read off the likelihood of answers.

Every answer of a question is scored by its log-likelihood after the question. A model knows a question when it finds
the right answer likeliest by a margin. An edit is judged on the questions that the base knows, and on all of them by
the right answer's log-odds, a figure that moves before an answer changes.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rotate_edit.errors import BadInput
from rotate_edit.evaluation import statistics
from rotate_edit.evaluation.questions import Question
from rotate_edit.evaluation.statistics import Measure
from rotate_edit.models.batches import CELLS_IN_A_BATCH
from rotate_edit.models.generation import first_token

UNITS = ("character", "token", "total")
# The base knows a question when its right answer is ahead of the next by this many nats a character.
LEAST_MARGIN = 0.05
SHOTS = 5
ROWS_AT_ONCE = 64
# Prompts that are read together differ by at most so many tokens, which are read again with every answer.
SPREAD = 4
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Answers:
    """How likely one model finds every answer of every question.

    Questions with fewer answers than others are filled up with answers of log-likelihood minus infinity.

    Attributes:
        totals: Log-likelihoods in nats, float64 [questions, choices].
        characters: Lengths of the answers in characters, float64 [questions, choices].
        tokens: Lengths in tokens, float64 [questions, choices].
        gold: Places of the right answers, int64 [questions].
    """

    totals: Floats
    characters: Floats
    tokens: Floats
    gold: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.gold)

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return float((1 / np.isfinite(self.totals).sum(axis=1)).mean()) if len(self) else float("nan")

    def scores(self, unit: str = "character") -> Floats:
        """Log-likelihoods a character, a token or in total, float64 [questions, choices].

        Args:
            unit: One of `UNITS`.

        Raises:
            BadInput: There is no such unit.
        """
        if unit not in UNITS:
            raise BadInput(f"answers are scored by {', '.join(UNITS)}, not by {unit!r}.")
        lengths = {"character": self.characters, "token": self.tokens, "total": np.ones_like(self.totals)}
        return self.totals / lengths[unit]

    def right(self, unit: str = "character") -> Floats:
        """1 where the right answer scores highest, else 0, float64 [questions]. A tie is not right."""
        return (self.margins(unit) > 0).astype(np.float64)

    def margins(self, unit: str = "character") -> Floats:
        """How far the right answer is ahead of the best other one, float64 [questions], in the unit of the scores."""
        own, others = self._divided(self.scores(unit))
        return own - others.max(axis=1)

    def log_odds(self, unit: str = "total") -> Floats:
        """Log-odds of the right answer among the choices, in nats, float64 [questions].

        With `total` they are the odds that the right answer is written, given that one of the choices is.
        """
        own, others = self._divided(self.scores(unit))
        most = others.max(axis=1)
        return own - most - np.log(np.exp(others - most[:, None]).sum(axis=1))

    def of(self, places: Sequence[int] | NDArray[np.int64]) -> "Answers":
        """The answers of some of the questions."""
        return Answers(self.totals[places], self.characters[places], self.tokens[places], self.gold[places])

    def _divided(self, scores: Floats) -> tuple[Floats, Floats]:
        place = np.arange(len(self))
        others = scores.copy()
        others[place, self.gold] = -np.inf
        return scores[place, self.gold], others


def known_places(base: Answers, least_margin: float = LEAST_MARGIN) -> NDArray[np.int64]:
    """Which questions the base knows: its right answer is ahead by a margin, in nats a character; int64 [known]."""
    return np.flatnonzero(base.margins() >= least_margin)


def accuracy_kept(base: Answers, edited: Answers, *, seed: int = 0) -> Measure:
    """The share of the base's accuracy above chance that is left; its interval resamples questions."""
    kept = statistics.kept_accuracy(base.right(), edited.right(), base.chance, seed=seed)
    return statistics.measure(kept).against(1)


def log_odds_drop(base: Answers, edited: Answers, unit: str = "total", *, seed: int = 0) -> Measure:
    """How far the right answer's log-odds fell on the mean, in nats; its interval resamples questions."""
    return statistics.mean(base.log_odds(unit) - edited.log_odds(unit), seed=seed).against(0)


def accuracy(answers: Answers) -> Measure:
    """The share of right answers, with Wilson's interval."""
    return statistics.wilson(int(answers.right().sum()), len(answers))


def examples_text(examples: Sequence[Question]) -> str:
    """Questions with their right answers, as they stand before another question."""
    return "".join(question.statement + "\n\n" for question in examples)


# On a live model.


def read_answers(model: Any, tokenizer: Any, questions: Sequence[Question], *, before: str = "") -> Answers:
    """Score every answer of every question.

    The text before the questions is read once, and each question once for all its answers.

    Args:
        model: A loaded transformers model.
        tokenizer: Its tokenizer.
        questions: The questions.
        before: A text that stands before each of them, such as examples or a definition.

    Returns:
        The answers' likelihoods.

    Raises:
        BadInput: There are no questions.
    """
    if not questions:
        raise BadInput("there are no questions to ask.")
    width = max(len(question.choices) for question in questions)
    totals = np.full((len(questions), width), -np.inf)
    characters, tokens = np.ones_like(totals), np.ones_like(totals)
    encoded = _encoded(model, tokenizer, questions, before)
    for index, question in enumerate(questions):
        for place, choice in enumerate(question.choices):
            characters[index, place] = max(1, len(choice.strip()))
            tokens[index, place] = len(encoded[index][1][place])
    shared = None
    if before:
        ids = tokenizer(before, add_special_tokens=True)["input_ids"]
        longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if longest is not None:
            # What a short context cannot hold is cut off at the beginning.
            ids = ids[-max(1, longest - max(len(prompt) + max(map(len, own)) for prompt, own in encoded)) :]
        shared = _run(model, [ids], None)[1]
    for places in _groups(encoded, model.config.get_text_config().vocab_size):
        for place, values in zip(places, _scored(model, [encoded[place] for place in places], shared), strict=True):
            totals[place, : len(values)] = values
    return Answers(totals, characters, tokens, np.array([question.gold for question in questions], dtype=np.int64))


Encoded = tuple[list[int], list[list[int]]]


def _encoded(model: Any, tokenizer: Any, questions: Sequence[Question], before: str) -> list[Encoded]:
    """Token ids of each prompt and of each answer after it.

    They are divided where the prompt and all of its answers begin to differ. A tokenizer may join a prompt's end with
    an answer's beginning; such tokens count as the answer's.
    """
    special = not before
    prompts = tokenizer([question.prompt for question in questions], add_special_tokens=special)["input_ids"]
    texts = [question.prompt + choice for question in questions for choice in question.choices]
    wholes = iter(tokenizer(texts, add_special_tokens=special)["input_ids"])
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    found = []
    for question, prompt in zip(questions, prompts, strict=True):
        own = [list(next(wholes)) for _ in question.choices]
        shared = min(_shared(prompt, whole) for whole in own)
        if not shared and before:
            raise BadInput("a question without a text of its own cannot stand after other texts.")
        start = list(prompt[:shared]) or [first_token(tokenizer)]
        answers = [whole[shared:] for whole in own]
        if longest is not None:
            start = start[-max(1, longest - max(map(len, answers))) :]
        found.append((start, answers))
    return found


def _shared(prompt: Sequence[int], whole: Sequence[int]) -> int:
    """How many tokens both begin with, at least one less than the whole has."""
    same = next((place for place, (a, b) in enumerate(zip(prompt, whole)) if a != b), min(len(prompt), len(whole)))
    return min(same, len(whole) - 1)


def _groups(encoded: Sequence[Encoded], vocabulary: int) -> Iterator[list[int]]:
    """Questions with prompts of similar length, as many as one batch of logits holds."""
    ordered = sorted(range(len(encoded)), key=lambda place: len(encoded[place][0]))
    while ordered:
        group: list[int] = []
        rows, longest, shortest = 0, 0, len(encoded[ordered[0]][0])
        for place in ordered:
            prompt, answers = encoded[place]
            rows += len(answers)
            longest = max(longest, len(prompt) - shortest + max(map(len, answers)))
            far = len(prompt) - shortest > SPREAD
            if group and (far or rows > ROWS_AT_ONCE or rows * longest * vocabulary > CELLS_IN_A_BATCH):
                break
            group.append(place)
        ordered = ordered[len(group) :]
        yield group


def _scored(model: Any, encoded: Sequence[Encoded], shared: Any) -> list[list[float]]:
    """The log-likelihood of each answer of each question.

    As many tokens of every prompt as the shortest has are read once for all answers. The rest of a longer prompt is
    read again with each, so that no padding stands before a token that counts.
    """
    common = min(len(prompt) for prompt, _ in encoded)
    logits, cache = _run(model, [prompt[:common] for prompt, _ in encoded], shared)
    first = torch.log_softmax(logits[:, -1].float(), dim=-1)
    tails = [(prompt[common:], answer) for prompt, answers in encoded for answer in answers]
    owner = torch.tensor([place for place, (_, answers) in enumerate(encoded) for _ in answers])
    width = max(len(rest) + len(answer) for rest, answer in tails)
    rows = torch.zeros(len(tails), width, dtype=torch.int64)
    counted = torch.zeros(len(tails), width, dtype=torch.bool)
    for row, (rest, answer) in enumerate(tails):
        rows[row, : len(rest) + len(answer)] = torch.tensor(rest + answer)
        counted[row, len(rest) : len(rest) + len(answer)] = True
    rows, owner = rows.to(first.device), owner.to(first.device)
    values = [first[owner, rows[:, 0]][:, None]]
    if width > 1:
        cache.batch_select_indices(owner)
        with torch.no_grad():
            rest_logits = model(input_ids=rows[:, :-1], past_key_values=cache, use_cache=True).logits
        values.append(_chosen(rest_logits, rows[:, 1:]))
    chosen = torch.where(counted.to(first.device), torch.cat(values, dim=1), 0.0)
    sums = chosen.double().sum(dim=1).tolist()
    found: list[list[float]] = [[] for _ in encoded]
    for place, value in zip(owner.tolist(), sums, strict=True):
        found[place].append(value)
    return found


def _chosen(logits: Tensor, following: Tensor) -> Tensor:
    """Log-probabilities of the tokens that follow, float32 [rows, length]."""
    logits = logits.float()
    return logits.gather(2, following[:, :, None])[:, :, 0] - logits.logsumexp(dim=-1)


def _run(model: Any, rows: Sequence[Sequence[int]], shared: Any) -> tuple[Tensor, Any]:
    """The logits after rows of one length, [rows, 1, vocabulary], and what attention keeps of them."""
    device = next(model.parameters()).device
    cache = None
    if shared is not None:
        cache = copy.deepcopy(shared)
        cache.batch_repeat_interleave(len(rows))
    ids = torch.tensor(rows, device=device)
    with torch.no_grad():
        output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits, output.past_key_values
