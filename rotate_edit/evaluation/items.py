"""Which items are asked and what they stand for, and which texts are about a concept."""

from collections.abc import Sequence
from itertools import zip_longest

from rotate_edit.evaluation.compare import ROLES, Part, Plan
from rotate_edit.evaluation.harness import Scores
from rotate_edit.evaluation.tasks import Items, Row, Task

TYPES = {"A": "words (type A)", "B": "facts (type B)"}


def divide(tasks: Sequence[Task], plan: Plan) -> tuple[tuple[Task, ...], tuple[Part, ...]]:
    """Choose the items and divide them into parts: the edited concepts, their neighbours, everything else.

    Items without a concept are general. A part may have more than `plan.items`. It then takes them from its concepts in
    turn, always the same ones.

    Args:
        tasks: The tasks with all their items.
        plan: The concepts, the neighbours and the number of items.

    Returns:
        The tasks with the chosen items, and the parts over those.
    """
    chosen, parts = [], []
    for task in tasks:
        groups: dict[tuple[str, str, str], list[int]] = {}
        for place, row in enumerate(task.rows):
            role, concept = _role(row, plan)
            groups.setdefault((role, concept, str(row.get("type", ""))), []).append(place)
        rows: list[Row] = []
        for (role, concept, kind), places in sorted(groups.items(), key=lambda group: ROLES.index(group[0][0])):
            taken = _in_turn(places, [str(task.rows[place].get("concept", "")) for place in places])[: plan.items]
            numbers = tuple(range(len(rows), len(rows) + len(taken)))
            rows += [task.rows[place] for place in taken]
            about_something = any(task.rows[place].get("concept") for place in taken)
            title = _title(task, role, concept, kind, about_something)
            parts.append(Part(task.name, role, title, kind, numbers, concept))
        chosen.append(task.with_rows(rows))
    return tuple(chosen), tuple(parts)


def _role(row: Row, plan: Plan) -> tuple[str, str]:
    concept = str(row.get("concept", ""))
    edited = {name.casefold() for name in plan.concepts}
    if concept.casefold() in edited:
        return ("neighbour", "") if row.get("role") == "neighbour" else ("concept", concept)
    close = {name.casefold() for name in plan.neighbours}
    return ("neighbour", "") if concept.casefold() in close else ("general", "")


def _in_turn(places: Sequence[int], concepts: Sequence[str]) -> list[int]:
    lists: dict[str, list[int]] = {}
    for place, concept in zip(places, concepts, strict=True):
        lists.setdefault(concept, []).append(place)
    return [place for turn in zip_longest(*lists.values()) for place in turn if place is not None]


def _title(task: Task, role: str, concept: str, kind: str, about_something: bool) -> str:
    if not about_something:
        return task.name
    whose = {"concept": concept, "neighbour": "neighbours", "general": "everything else"}[role]
    if kind:
        return f"{whose}: {TYPES.get(kind, f'{kind} ({task.name})')}"
    return f"{whose}: {'cloze' if task.kind == 'probability' else task.name}"


def whole_task(scores: Scores) -> Part:
    """Make one general part of all items of a task.

    Args:
        scores: The task's scores.

    Returns:
        A part without a concept or a type, over every item.
    """
    return Part(scores.task, "general", scores.task, "", tuple(range(len(scores.values))))


def texts_about(items: Items, concepts: Sequence[str], split: str = "test") -> tuple[list[str], list[str]]:
    """Find texts that are about one of the concepts, and texts that hold none of their words.

    The latter come from all other concepts in turn.

    Args:
        items: The items with their texts.
        concepts: Names of the concepts.
        split: Name of the split.

    Returns:
        The texts about the concepts and the texts without them. Both are empty when the items have no such split.
    """
    rows = items.texts.get(split, ())
    edited = {name.casefold() for name in concepts}

    def named(row: Row) -> set[str]:
        return {str(name).casefold() for name in (row.get("concept"), *row.get("contains", ())) if name}

    own = [row["text"] for row in rows if str(row.get("concept") or "").casefold() in edited]
    free = [row for row in rows if not named(row) & edited]
    order = _in_turn(range(len(free)), [str(row.get("concept")) for row in free])
    return own, [free[place]["text"] for place in order]
