"""What was recognised in a checkpoint and what an edit could reach, as plain data."""

from rotate_edit.architectures import NEURON_MATRICES
from rotate_edit.checkpoint import Checkpoint


def inspect_model(checkpoint: Checkpoint) -> dict:
    """Family, sizes, tables, norms, scales and reach of a checkpoint as JSON values; no weight is read.

    reach: how many vectors of each matrix an edit can change.
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
    """How many vectors of each matrix an edit can change."""
    counts = dict.fromkeys(NEURON_MATRICES, 0)
    for layer in range(checkpoint.layers):
        for matrix in checkpoint.matrices:
            counts[matrix] += checkpoint.neurons_in(layer) * (checkpoint.experts_in(layer) or 1)
    tables = {}
    if checkpoint.stored[checkpoint.place("embedding").name].shape[1] == checkpoint.hidden_size:
        tables = dict.fromkeys(("embedding", "unembedding"), checkpoint.vocabulary_size)
    biases = sum(checkpoint.has("out_bias", layer) for layer in range(checkpoint.layers))
    return {name: count for name, count in (counts | tables | {"out_bias": biases}).items() if count}
