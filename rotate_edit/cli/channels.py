"""The commands that look at a model, its neurons and channels: scan, decompose, channels, inspect, words."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from rotate_edit.cli import options
from rotate_edit.console import plain, print_line, print_table
from rotate_edit.errors import BadInput, counted


@click.command()
@click.argument("model")
@options.revision
@options.output
@options.all_matrices
@options.layers
@click.option("--top", default=10, show_default=True, help="Tokens kept on either side.")
@options.device
@options.overwrite
def scan(
    model: str,
    revision: str | None,
    output: Path | None,
    matrices: tuple[str, ...],
    layers: tuple[int, ...],
    top: int,
    device: str,
    overwrite: bool,
) -> None:
    """Project every neuron of MODEL on the vocabulary: top tokens, kurtosis, norm, as one Parquet file."""
    from rotate_edit.channels.cost import scan_cost
    from rotate_edit.channels.scan import scan_checkpoint
    from rotate_edit.machine import check_cost, pick_device
    from rotate_edit.models.checkpoint import open_checkpoint
    from rotate_edit.vocabulary import projection

    checkpoint = open_checkpoint(model, revision)
    target = output or Path(f"{checkpoint.source.replace('/', '--')}-scan.parquet")
    check_cost(scan_cost(checkpoint, len(matrices or checkpoint.matrices), top), target)
    rules = projection.VocabularyRules(words_only=False, ignore_undertrained=False, remove_frequency=False)
    vocabulary = projection.read_vocabulary(checkpoint, rules)
    tables = projection.read_projections(checkpoint, vocabulary)
    with options.progress_bars() as report:
        rows = scan_checkpoint(
            checkpoint,
            target,
            matrices=matrices or checkpoint.matrices,
            projection_of=lambda layer, matrix: tables.of(layer, matrix)[0],
            texts=vocabulary.texts,
            layers=list(layers) or None,
            top=top,
            device=pick_device(device),
            overwrite=overwrite,
            progress=report,
        )
    print_line(f"{rows} neuron vectors in {target}")


@click.command()
@click.argument("model")
@options.revision
@options.output
@click.option("--all", "everything", is_flag=True, help="Every matrix of every layer (an atlas).")
@options.matrices
@options.layers
@click.option("--channels", default=10, show_default=True, help="At most so many of a neuron.")
@click.option(
    "--solver", default="circle", show_default=True, type=click.Choice(["circle", "adamw"]),
    help="circle is exact and fast; adamw is the paper's.",
)  # fmt: skip
@click.option("--all-tokens", is_flag=True, help="Count every token, not only beginnings of words.")
@click.option("--no-vectors", is_flag=True, help="Keep the table alone.")
@click.option("--block", default=512, show_default=True, help="Neurons of one shard.")
@click.option("--threads", default=1, show_default=True, help="CPU threads of one shard.")
@click.option("--workers", type=int, help="Shards at once on the CPU (default: what cores and memory allow).")
@options.device
@click.option(
    "--engine", default="local", show_default=True, type=click.Choice(["local", "ray"]),
    help="Threads and GPUs of this machine, or a Ray cluster.",
)  # fmt: skip
@click.option("--address", default="auto", show_default=True, help="Ray cluster (it must be a trusted network).")
@options.estimate
def decompose(
    model: str,
    revision: str | None,
    output: Path | None,
    everything: bool,
    matrices: tuple[str, ...],
    layers: tuple[int, ...],
    channels: int,
    solver: str,
    all_tokens: bool,
    no_vectors: bool,
    estimate: bool,
    **how: Any,
) -> None:
    """Split neurons of MODEL into vocabulary channels; a killed run goes on where it stopped."""
    from rotate_edit.channels import decompose as room
    from rotate_edit.channels.cost import decompose_cost
    from rotate_edit.channels.shards import Targets
    from rotate_edit.channels.solver import SolverSettings
    from rotate_edit.machine import check_cost, pick_device
    from rotate_edit.models.checkpoint import open_checkpoint
    from rotate_edit.vocabulary import projection

    checkpoint = open_checkpoint(model, revision)
    settings = SolverSettings(solver=solver, channels=channels, claim_threshold=room.claim_threshold(checkpoint))
    chosen = checkpoint.matrices if everything else (matrices or ("out",))
    target = output or Path(f"{checkpoint.source.replace('/', '--')}-channels")
    vectors = None if no_vectors else "bfloat16"
    device = pick_device(how["device"])
    cost = decompose_cost(
        checkpoint, settings, matrices=tuple(chosen), layers=tuple(layers) or None, words_only=not all_tokens,
        vectors=vectors, block=how["block"], threads=how["threads"], workers=how["workers"], device=device,
    )  # fmt: skip
    if estimate:
        options.print_estimate(f"decomposing {checkpoint.source}", cost, device, target)
        return
    # Before the vocabulary is read, whose tables may be what does not fit.
    check_cost(cost, target)
    vocabulary = projection.read_vocabulary(checkpoint, projection.VocabularyRules(words_only=not all_tokens))
    with options.progress_bars() as report:
        found = room.decompose(
            checkpoint,
            target,
            targets=Targets(tuple(chosen), tuple(layers) or None),
            vocabulary=vocabulary,
            settings=settings,
            vectors=vectors,
            progress=report,
            **how,
        )
    size = sum(file["bytes"] for file in found.files.values())
    print_line(
        f"{found.channels} channels in {target}, {size / 1e6:.1f} MB, {size / max(found.channels, 1):.0f} bytes each"
    )


@click.command()
@click.argument("folder")
@click.option("--token", help="Channels with this token among their strongest. In a model: words, separated by commas.")
@click.option("--substring", is_flag=True, help="The token only has to contain the text (of a channel set).")
@click.option("--neuron", help="Channels of one neuron, such as L3.N12.")
@click.option("--matrix", type=click.Choice(options.MATRIX_KINDS), help="Channels of this matrix.")
@options.layers
@click.option("--min-support", type=float, help="Channels with at least this support.")
@click.option("--min-kurtosis", type=float, help="Channels at least this sharp.")
@click.option("--limit", default=20, show_default=True, help="At most so many channels.")
@options.as_json
def channels(
    folder: str, as_json: bool, token: str | None, neuron: str | None, layers: tuple[int, ...], **conditions: Any
) -> None:
    """Print and search the channels of FOLDER: a channel set or a run folder, or a model, searched on the spot."""
    where = options.inside(Path(folder), "channels")
    if (where / "channels.json").is_file():
        from rotate_edit.channels.channel_set import search_channels

        found = search_channels(where, token=token, neuron=neuron, layers=layers, **conditions)
    else:
        found = _channels_of_model(folder, token, neuron, layers, **conditions)
    print_channels(found, as_json)


def _channels_of_model(
    model: str, token: str | None, neuron: str | None, layers: tuple[int, ...], **conditions: Any
) -> list[Any]:
    from rotate_edit.channel_job import look_up, open_model

    if (token is None) == (neuron is None):
        raise BadInput(
            f"{model} is no channel set; in a model channels are looked for by --token or by --neuron, one of them."
        )
    if conditions["substring"]:
        raise BadInput("--substring searches a channel set, and here a model is searched.")
    matrices = [conditions["matrix"]] if conditions["matrix"] else []
    words = [word.strip() for word in (token or "").split(",") if word.strip()]
    session = open_model(model)
    with options.progress_bars() as report:
        found = look_up(
            session, words=words, neuron=neuron, matrices=matrices, layers=layers, limit=conditions["limit"],
            report=report,
        )  # fmt: skip
    least, sharp = conditions["min_support"], conditions["min_kurtosis"]
    kept = [
        hit
        for hit in found
        if (least is None or hit.channel.support >= least) and (sharp is None or hit.channel.kurtosis >= sharp)
    ]
    if words:
        passed = [hit.channel.name for hit in kept if hit.passed]
        print_line(f"With more support than chance gives: {', '.join(passed) or 'none'}.", error=True)
    return [hit.channel for hit in kept]


def print_channels(found: Iterable[Any], as_json: bool) -> None:
    """Print channels as a table, or as one JSON object a line."""
    if as_json:
        for channel in found:
            entry = {key: value for key, value in vars(channel).items() if key != "vector"}
            click.echo(json.dumps({"name": channel.name, **entry}))
        return
    columns = ["channel", "sign", "support", "p", "kurtosis", "cosine", "strongest tokens"]
    rows = []
    for channel in found:
        tested = "–" if channel.p_value is None else f"{channel.p_value:.2g}"
        figures = [f"{channel.support:.1f}", tested, f"{channel.kurtosis:.1f}", f"{channel.cosine:.2f}"]
        sign = "+" if channel.sign > 0 else "-"
        rows.append([channel.name, sign, *figures, " ".join(plain(token.strip()) for token in channel.tokens)])
    print_table(counted(len(rows), "channel"), columns, rows)


@click.command()
@click.argument("model")
@options.revision
@options.as_json
def inspect(model: str, revision: str | None, as_json: bool) -> None:
    """Show what is recognised of MODEL and what an edit could reach."""
    from rotate_edit.models.checkpoint import open_checkpoint
    from rotate_edit.models.inspection import described, inspect_model

    found = inspect_model(open_checkpoint(model, revision))
    if as_json:
        click.echo(json.dumps(found, indent=1))
        return
    print_table(str(found["source"]), ["", ""], described(found))


@click.command()
@click.argument("model")
@click.argument("words", nargs=-1, required=True)
@options.revision
@click.option("--plurals", is_flag=True, help="Also look up the plural of every word.")
@options.as_json
def words(model: str, words: tuple[str, ...], revision: str | None, plurals: bool, as_json: bool) -> None:
    """Show how MODEL's tokenizer writes WORDS, and how a concept of these words is followed."""
    from rotate_edit.models.checkpoint import load_tokenizer, open_checkpoint
    from rotate_edit.vocabulary.concept import described_words, find_tokens, token_texts

    checkpoint = open_checkpoint(model, revision)
    tokenizer = load_tokenizer(checkpoint)
    texts = token_texts(tokenizer)[: checkpoint.vocabulary_size]
    found = find_tokens("words", list(words), tokenizer, texts, plurals=plurals, required=False)
    if as_json:
        for note in found.notes:
            click.echo(json.dumps(vars(note)))
        return
    counts = counted(sum(note.followed == "token" for note in found.notes), "word")
    title = f"{counts} of {len(found.notes)} {'is' if counts.startswith('1 ') else 'are'} one token"
    print_table(title, ["word", "followed as", "tokens"], described_words(found, texts))


COMMANDS = (scan, decompose, channels, inspect, words)
