"""The commands that read and write model files: parse, validate, one call each, print."""

from pathlib import Path

import click

from rotate_edit.console import print_line, print_table, print_warnings, progress_bars
from rotate_edit.errors import BadInput, Failure, counted

FOLDER = click.Path(path_type=Path)
OUTPUT = click.option("--output", type=FOLDER, help="Where to write; it must not exist yet.")
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace an output that exists.")


@click.command()
@click.argument("edit_folder", type=FOLDER)
@click.argument("model")
@OUTPUT
@click.option("--revision", help="Hub revision.")
@click.option("--adapter", is_flag=True, help="Write a LoRA adapter instead of a checkpoint.")
@click.option("--uniform-rank", is_flag=True, help="Pad all ranks of the adapter to one, for serving engines.")
@click.option("--link", is_flag=True, help="Hard-link untouched shards: an in-place write to one changes the other.")
@click.option("--no-undo", is_flag=True, help="Leave out what an exact undo needs.")
@click.option("--force-base", is_flag=True, help="Apply to a base with other hashes.")
@OVERWRITE
def apply(
    edit_folder: Path,
    model: str,
    output: Path | None,
    revision: str | None,
    adapter: bool,
    uniform_rank: bool,
    link: bool,
    no_undo: bool,
    force_base: bool,
    overwrite: bool,
) -> None:
    """Write MODEL with the edit in EDIT_FOLDER in it, as a new checkpoint folder."""
    from rotate_edit.edits.edit_file import load_edit
    from rotate_edit.edits.writing.adapter import write_adapter
    from rotate_edit.edits.writing.patch import write_checkpoint
    from rotate_edit.files import check_output_outside
    from rotate_edit.models.checkpoint import open_checkpoint

    folder = _inside(edit_folder, "edit")
    base = open_checkpoint(model, revision)
    loaded = load_edit(folder)
    target = output or Path(f"{base.source.replace('/', '--')}-edited")
    if (adapter and link) or (uniform_rank and not adapter):
        raise BadInput("--uniform-rank is for an --adapter, and --link is for a checkpoint.")
    check_output_outside(target, folder, "the edit's folder", inside=True)
    if adapter:
        adapted = write_adapter(
            base, loaded, target, uniform_rank=uniform_rank, force_base=force_base, overwrite=overwrite
        )
        print_warnings(adapted.warnings)
        ranks = sorted(set(adapted.ranks.values()))
        rank = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        print_line(f"Adapter of rank {rank} for {counted(len(adapted.ranks), 'module')}.")
    else:
        with progress_bars() as report:
            patch = write_checkpoint(
                base, loaded, target, edit_folder=folder, undo=not no_undo, link=link, force_base=force_base,
                overwrite=overwrite, progress=report,
            )  # fmt: skip
        print_warnings(patch.warnings)
        for sentence in patch.sentences():
            print_line(sentence)
    print_line(f"Written to {target}")


@click.command()
@click.argument("edit_folder", type=FOLDER)
@click.option("--base", help="The base model, for norms relative to the whole matrix.")
@click.option("--neurons", default=20, show_default=True, help="How many neuron vectors to list.")
def diff(edit_folder: Path, base: str | None, neurons: int) -> None:
    """Show what an edit changes, matrix by matrix and neuron by neuron."""
    from rotate_edit.edits.diff import diff as compare_edit
    from rotate_edit.edits.edit_file import load_edit
    from rotate_edit.models.checkpoint import open_checkpoint

    loaded = load_edit(_inside(edit_folder, "edit"))
    rows = compare_edit(loaded, open_checkpoint(base) if base else None)
    columns = [
        "matrix",
        "vectors",
        "rank",
        "largest change",
        "norm of the change",
        *(["of the matrix"] if base else []),
    ]
    cells = []
    for row in rows:
        share = "" if row.relative is None else f"{row.relative:.2%}"
        figures = [str(row.rows), str(row.rank), f"{row.largest:.4g}", f"{row.norm:.4g}"]
        cells.append([row.address, *figures, *([share] if base else [])])
    print_table(f"{loaded.method}: {counted(len(rows), 'matrix', 'matrices')}", columns, cells)
    columns = ["neuron", "concept", "score", "cosine", "norm before", "norm after"]
    cells = []
    for vector in sorted(loaded.vectors, key=lambda vector: vector.cosine)[:neurons]:
        figures = [
            f"{vector.score:.2f}",
            f"{vector.cosine:.3f}",
            f"{vector.norm_before:.3f}",
            f"{vector.norm_after:.3f}",
        ]
        cells.append([f"{vector.address}.{vector.matrix}", vector.concept, *figures])
    if cells:
        print_table(f"{counted(len(loaded.vectors), 'neuron vector')}, the most changed first", columns, cells)


def _inside(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_dir() else folder


def _edit_of(folder: Path) -> Path:
    if not (folder / "edit").is_dir():
        raise BadInput(f'"{folder}" is not a run folder with its edit in edit/; name the edit\'s folder with --edit.')
    return folder / "edit"


@click.command()
@click.argument("folder", type=FOLDER)
@click.option("--edit", "edit_folder", type=FOLDER, help="The edit (default: edit/ of the run folder).")
@click.option("--base", help="Compare with this base byte for byte; else with the hashes of the edit.")
def verify(folder: Path, edit_folder: Path | None, base: str | None) -> None:
    """Check that a patched checkpoint (or a run folder's model/) is its base with the edit in it and nothing else."""
    from rotate_edit.edits.edit_file import load_edit
    from rotate_edit.edits.writing.patch import verify as verify_patch
    from rotate_edit.models.checkpoint import open_checkpoint

    where = edit_folder or _edit_of(folder)
    checked = verify_patch(
        open_checkpoint(_inside(folder, "model")),
        load_edit(where),
        open_checkpoint(base) if base else None,
        edit_folder=where,
    )
    for problem in checked.problems:
        print_line(problem)
    if checked.problems:
        raise Failure(f"{folder} is not what its edit says: {counted(len(checked.problems), 'difference')}.")
    unknown = f"; {len(checked.not_compared):,} could not be compared without --base" if checked.not_compared else ""
    found = "1 tensor is as it" if checked.compared == 1 else f"{checked.compared:,} tensors are as they"
    print_line(f"{found} should be{unknown}.")


@click.command()
@click.argument("folder", type=FOLDER)
@OUTPUT
@click.option("--edit", "edit_folder", type=FOLDER, help="The edit with its undo file (default: edit/ of the run).")
@OVERWRITE
def revert(folder: Path, output: Path | None, edit_folder: Path | None, overwrite: bool) -> None:
    """Take the last edit back out of a patched checkpoint, bit for bit, as a new folder."""
    from rotate_edit.edits.writing.patch import revert as revert_patch
    from rotate_edit.models.checkpoint import open_checkpoint

    target = output or Path(f"{folder.resolve().name}-reverted")
    where = edit_folder or _edit_of(folder)
    with progress_bars() as report:
        tensors = revert_patch(
            open_checkpoint(_inside(folder, "model")), where, target, overwrite=overwrite, progress=report
        )
    print_line(f"{counted(len(tensors), 'tensor')} restored; written to {target}")


@click.command("demo-model")
@click.argument("folder", type=FOLDER)
@OVERWRITE
def demo_model(folder: Path, overwrite: bool) -> None:
    """Write the bundled demo checkpoint to FOLDER."""
    import shutil

    from rotate_edit.files import whole_folder
    from rotate_edit.models.demo import demo_model_folder

    with whole_folder(folder, overwrite=overwrite) as temporary:
        shutil.copytree(demo_model_folder(), temporary, dirs_exist_ok=True)
    print_line(f"Written to {folder}")


@click.command()
@click.argument("folder", type=FOLDER)
@click.argument("repository", metavar="REPO_ID")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--adapter", is_flag=True, help="Publish the LoRA adapter instead of the checkpoint.")
@click.option("--undo", is_flag=True, help="Publish the undo file too: it holds what was removed.")
@click.option("--base-model", help="Hub id of the base, when the run took it from a folder.")
@click.option("--overwrite", is_flag=True, help="Commit to a repository that holds files already.")
def push(
    folder: Path,
    repository: str,
    private: bool,
    adapter: bool,
    undo: bool,
    base_model: str | None,
    overwrite: bool,
) -> None:
    """Publish the model (or adapter) of run FOLDER on the Hub, with its card, its edit and how to repeat it."""
    from rotate_edit.reporting.push import push as push_run

    pushed = push_run(
        folder, repository, private=private, adapter=adapter, undo=undo, base_model=base_model, overwrite=overwrite
    )
    for name in pushed.files:
        print_line(name)
    print_line(f"{counted(len(pushed.files), 'file')} published as {pushed.repository}, commit {pushed.commit[:12]}")


@click.command()
@click.argument("description", metavar="REPRODUCE_JSON", type=FOLDER)
@OUTPUT
@click.option("--model", help="Where the base lies here, when not where the recipe says.")
@click.option("--allow-code", is_flag=True, help="Dangerous: run code that task definitions bring along.")
@OVERWRITE
def reproduce(description: Path, output: Path | None, model: str | None, allow_code: bool, overwrite: bool) -> None:
    """Run a reproduce.json again and compare hashes and numbers; exit 1 when a difference is serious."""
    from rotate_edit.repeat import repeat

    with progress_bars() as report:
        found, agreed = repeat(
            description,
            output or Path("runs/reproduced"),
            model=model,
            allow_code=allow_code,
            overwrite=overwrite,
            report=report,
        )
    if found:
        rows = [[one.severity, one.what, one.before, one.now] for one in found]
        print_table(counted(len(found), "difference"), ["severity", "in", "then", "now"], rows)
    serious = sum(one.severity == "serious" for one in found)
    if serious:
        raise Failure(f"{counted(serious, 'serious difference')}: this is not the same result.")
    print_line(f"Reproduced: {counted(agreed, 'hash, number or setting', 'hashes, numbers and settings')} agree.")


COMMANDS = (apply, diff, verify, revert, push, reproduce, demo_model)
