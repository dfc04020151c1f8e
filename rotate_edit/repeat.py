"""Do a run again from its reproduce.json and say how the result differs."""

from pathlib import Path

from rotate_edit import pipeline
from rotate_edit.console import Report, silent
from rotate_edit.files import read_json
from rotate_edit.models.checkpoint import open_checkpoint
from rotate_edit.reporting.reproduce import REPRODUCE, Difference, check_same_base, differences, read_reproduction


def repeat(
    path: Path,
    output: Path,
    *,
    model: str | None = None,
    allow_code: bool = False,
    overwrite: bool = False,
    report: Report = silent,
) -> tuple[list[Difference], int]:
    """Run the recipe of a reproduce.json into a new run folder and compare; returns differences and how much agreed.

    model: where the base lies here, when not where the recipe says; allow_code: as in `pipeline.run`. Raises BadInput
    for a file that cannot be read and for another base, Failure when the run fails.
    """
    recipe, before = read_reproduction(path, model)
    check_same_base(before, open_checkpoint(recipe.model, recipe.revision))
    pipeline.run(recipe, output, overwrite=overwrite, allow_code=allow_code, report=report)
    now = read_json(output, REPRODUCE)
    found = differences(before, now)
    compared = sum(len({*before[part], *now[part]}) for part in ("items", "hashes", "numbers", "versions", "hardware"))
    return found, compared - len(found)
