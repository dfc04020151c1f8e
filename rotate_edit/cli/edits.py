"""The commands that read and write edits and checkpoints: apply, diff, verify, revert, demo-model, import-gguf."""

from pathlib import Path

import click

from rotate_edit.cli import options
from rotate_edit.cli.options import FOLDER
from rotate_edit.console import print_line, print_table, print_warnings
from rotate_edit.errors import BadInput, Failure, counted


@click.command()
@click.argument("edit_folder", type=FOLDER)
@click.argument("model")
@options.output
@options.revision
@click.option("--adapter", is_flag=True, help="Write a LoRA adapter instead of a checkpoint.")
@click.option("--uniform-rank", is_flag=True, help="Pad all ranks of the adapter to one, for serving engines.")
@click.option("--link", is_flag=True, help="Hard-link untouched shards: an in-place write to one changes the other.")
@options.no_undo
@click.option("--force-base", is_flag=True, help="Apply to a base with other hashes.")
@options.overwrite
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

    folder = options.inside(edit_folder, "edit")
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
        with options.progress_bars() as report:
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

    loaded = load_edit(options.inside(edit_folder, "edit"))
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


@click.command()
@click.argument("folder", type=FOLDER)
@click.option("--edit", "edit_folder", type=FOLDER, help="The edit (default: edit/ of the run folder).")
@click.option("--base", help="Compare with this base byte for byte; else with the hashes of the edit.")
def verify(folder: Path, edit_folder: Path | None, base: str | None) -> None:
    """Check that a patched checkpoint (or a run folder's model/) is its base with the edit in it and nothing else."""
    from rotate_edit.edits.edit_file import load_edit
    from rotate_edit.edits.writing.patch import verify as verify_patch
    from rotate_edit.models.checkpoint import open_checkpoint

    where = edit_folder or options.edit_of(folder)
    checked = verify_patch(
        open_checkpoint(options.inside(folder, "model")),
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
@options.output
@click.option("--edit", "edit_folder", type=FOLDER, help="The edit with its undo file (default: edit/ of the run).")
@options.overwrite
def revert(folder: Path, output: Path | None, edit_folder: Path | None, overwrite: bool) -> None:
    """Take the last edit back out of a patched checkpoint, bit for bit, as a new folder."""
    from rotate_edit.edits.writing.patch import revert as revert_patch
    from rotate_edit.models.checkpoint import open_checkpoint

    target = output or Path(f"{folder.resolve().name}-reverted")
    where = edit_folder or options.edit_of(folder)
    with options.progress_bars() as report:
        tensors = revert_patch(
            open_checkpoint(options.inside(folder, "model")), where, target, overwrite=overwrite, progress=report
        )
    print_line(f"{counted(len(tensors), 'tensor')} restored; written to {target}")


@click.command("demo-model")
@click.argument("folder", type=FOLDER)
@options.overwrite
def demo_model(folder: Path, overwrite: bool) -> None:
    """Write the bundled demo checkpoint to FOLDER."""
    import shutil

    from rotate_edit.files import whole_folder
    from rotate_edit.models.demo import demo_model_folder

    with whole_folder(folder, overwrite=overwrite) as temporary:
        shutil.copytree(demo_model_folder(), temporary, dirs_exist_ok=True)
    print_line(f"Written to {folder}")


@click.command("import-gguf")
@click.argument("file", type=FOLDER)
@click.argument("folder", type=FOLDER)
@click.option(
    "--dtype", default="bfloat16", show_default=True, type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Of the written weights.",
)  # fmt: skip
@options.overwrite
def import_gguf(file: Path, folder: Path, dtype: str, overwrite: bool) -> None:
    """Write the GGUF file FILE out as the checkpoint FOLDER: config, tokenizer, chat template, unpacked weights."""
    from rotate_edit.models.gguf import import_gguf as import_file

    with options.progress_bars() as report:
        imported = import_file(file, folder, dtype=dtype, overwrite=overwrite, progress=report)
    print_warnings(imported.warnings)
    print_line(f"{counted(imported.tensors, 'tensor')}, {imported.bytes / 1e9:.2f} GB, written to {folder}")


COMMANDS = (apply, diff, verify, revert, demo_model, import_gguf)
