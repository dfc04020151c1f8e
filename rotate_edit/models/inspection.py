"""Describe as plain data what was recognised in a checkpoint and what an edit can change."""

from typing import Any

from rotate_edit.models.architectures import NEURON_MATRICES
from rotate_edit.models.checkpoint import Checkpoint

REACH_WORDS = {
    "embedding": "rows of the embedding",
    "unembedding": "rows of the unembedding",
    "out_bias": "biases of the MLP's output",
}


def inspect_model(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe a checkpoint: family, sizes, tables, norms, scales and reach. No weight is read.

    Args:
        checkpoint: The opened checkpoint.

    Returns:
        JSON values by name. `bytes` is a size in bytes. `reach` says how many vectors of each matrix an edit can
        change.

    Raises:
        BadInput: If the folder's record is not a record of edits.
    """
    architecture, config = checkpoint.architecture, checkpoint.text_config
    parallel = architecture.parallel
    scales = {
        name: config.get(key)
        for name, key in (
            ("residual", architecture.residual_scale),
            ("embedding", architecture.embedding_scale),
            ("logits", architecture.logit_scale),
            ("logits divided by", architecture.logit_divisor),
        )
        if key is not None
    }
    if architecture.embedding_scaled_by_root:
        scales["embedding"] = checkpoint.hidden_size**0.5
    return {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "family": architecture.family,
        "model_type": architecture.model_type,
        "layers": checkpoint.layers,
        "d_model": checkpoint.hidden_size,
        "neurons": checkpoint.neurons,
        "experts": checkpoint.experts,
        "vocabulary": checkpoint.vocabulary_size,
        "matrices": list(checkpoint.matrices),
        "gated": "gate" in checkpoint.matrices,
        "tied": checkpoint.tied,
        "parallel": bool(config.get(parallel, False)) if isinstance(parallel, str) else parallel,
        "norm": architecture.norm_kind,
        "norm after the MLP": architecture.post_mlp_norm is not None,
        "MLP bias": checkpoint.has("out_bias", 0),
        "head bias": architecture.head_bias in checkpoint.stored,
        "scales": scales,
        "unembedding from layer": checkpoint.published_switch,
        "dtypes": sorted({stored.dtype for stored in checkpoint.stored.values()}),
        "parameters": sum(stored.elements for stored in checkpoint.stored.values()),
        "bytes": checkpoint.size,
        "shards": len(checkpoint.headers),
        "edits": [entry["edit"] for entry in checkpoint.edits],
        "reach": reach(checkpoint),
    }


def reach(checkpoint: Checkpoint) -> dict[str, int]:
    """Count the vectors of each matrix that an edit can change.

    Args:
        checkpoint: The opened checkpoint.

    Returns:
        The number of vectors by matrix; matrices without any are left out.
    """
    counts = dict.fromkeys(NEURON_MATRICES, 0)
    for layer in range(checkpoint.layers):
        for matrix in checkpoint.matrices:
            counts[matrix] += checkpoint.neurons_in(layer) * (checkpoint.experts_in(layer) or 1)
    tables = {}
    if checkpoint.stored[checkpoint.place("embedding").name].shape[1] == checkpoint.hidden_size:
        tables = dict.fromkeys(("embedding", "unembedding"), checkpoint.vocabulary_size)
    biases = sum(checkpoint.has("out_bias", layer) for layer in range(checkpoint.layers))
    return {name: count for name, count in (counts | tables | {"out_bias": biases}).items() if count}


def described(found: dict[str, Any]) -> list[list[str]]:
    """Format the result of `inspect_model` for a person.

    Args:
        found: What `inspect_model` returned.

    Returns:
        Rows of a name and a text.
    """
    rows = [["family", f"{found['family']} (model_type {found['model_type']})"]]
    if found["revision"]:
        rows.append(["revision", found["revision"]])
    sizes = f"{found['parameters']:,} parameters in {', '.join(found['dtypes'])}"
    shards = f"{found['shards']} shard" + ("s" if found["shards"] != 1 else "")
    rows.append(["size", f"{sizes}, {found['bytes'] / 1e6:,.1f} MB in {shards}"])
    rows.append(["layers", f"{found['layers']} of width {found['d_model']}"])
    experts = f" in each of {found['experts']} experts" if found["experts"] else ""
    rows.append(["neurons a layer", f"{found['neurons']}{experts}; matrices {', '.join(found['matrices'])}"])
    rows.append(["vocabulary", f"{found['vocabulary']} tokens; embedding and head {_tables(found)}"])
    rows.append(["projected on", _projected(found)])
    norms = f"{found['norm']} norm" + (", another one after the MLP" if found["norm after the MLP"] else "")
    rows.append(["block", f"{norms}; attention and MLP {'side by side' if found['parallel'] else 'in turn'}"])
    biases = [name for name in ("MLP bias", "head bias") if found[name]]
    rows.append(["biases", ", ".join(biases) or "none in the MLP or the head"])
    scales = [f"{name} {value:g}" for name, value in found["scales"].items() if value is not None]
    if scales:
        rows.append(["scales", ", ".join(scales)])
    edits = [edit[:12] for edit in found["edits"]]
    rows.append(["edits in it", f"{len(edits)} by this package, oldest first: {', '.join(edits)}" if edits else "none"])
    # A tied head is the embedding, so its rows are counted once.
    counts = {name: count for name, count in found["reach"].items() if not (found["tied"] and name == "unembedding")}
    reach = [f"{count:,} {REACH_WORDS.get(name, f'{name} vectors')}" for name, count in counts.items()]
    rows.append(["an edit can reach", ", ".join(reach)])
    return rows


def _tables(found: dict[str, Any]) -> str:
    return "are one table (tied)" if found["tied"] else "are two tables (untied)"


def _projected(found: dict[str, Any]) -> str:
    switch = found["unembedding from layer"]
    if found["tied"]:
        return "the one table, in every layer"
    if switch is None:
        return "embedding or unembedding by layer, found from the weights when a job needs it"
    return f"the unembedding from layer {switch} on, the embedding before it (published)"
