"""Where each model family keeps its MLP matrices, norms, embedding and head.

Each family is one row of data. A row holds names as they stand in the safetensors files. The same names serve a loaded
`transformers` model. Where the two differ, the row lists both names, and the one that exists is taken.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from rotate_edit.errors import BadInput, quoted

NEURON_MATRICES = ("gate", "in", "out")


@dataclass(frozen=True)
class Neuron:
    """The address of one MLP neuron.

    It is printed as "L3.N12" or "L10.E3.N123".

    Attributes:
        layer: Index of the transformer block, from 0.
        neuron: Index of the neuron in its layer or expert, from 0.
        expert: Index of the expert, from 0; None in a dense layer.
    """

    layer: int
    neuron: int
    expert: int | None = None

    def __str__(self) -> str:
        """Return the address as text, for instance "L3.N12"."""
        expert = "" if self.expert is None else f".E{self.expert}"
        return f"L{self.layer}{expert}.N{self.neuron}"


def parse_neuron(text: str) -> Neuron:
    """Read a neuron's address from text.

    Args:
        text: An address such as "L3.N12" or "L10.E3.N123". Spaces around it are ignored.

    Returns:
        The address.

    Raises:
        BadInput: If the text is not such an address.
    """
    found = re.fullmatch(r"L(\d{1,6})(?:\.E(\d{1,6}))?\.N(\d{1,9})", text.strip(), flags=re.ASCII)
    if found is None:
        raise BadInput(f"{quoted(text)} is not the address of a neuron; write it as L3.N12, or L10.E3.N123.")
    layer, expert, neuron = found.groups()
    return Neuron(int(layer), int(neuron), None if expert is None else int(expert))


@dataclass(frozen=True)
class Place:
    """Where one matrix lies in the files or in a loaded model.

    Attributes:
        name: Name of the tensor, below the body's prefix, with {layer} and {expert} to fill in.
        neurons: "rows" or "columns": which of them is a neuron in the stored tensor.
        part: Number of the block that holds this matrix, from 0.
        parts: Number of equal blocks along the neuron axis that the tensor holds.
        stacked: Whether the first dimension of the tensor is the expert.
    """

    name: str
    neurons: str = "rows"
    part: int = 0
    parts: int = 1
    stacked: bool = False


Places = Mapping[str, Place]


@dataclass(frozen=True)
class Architecture:
    """One family of models.

    Attributes:
        family: The name people use.
        model_type: The name in `config.json`.
        dense: The matrices of a dense layer.
        bodies: Prefixes under which everything but the head stands. The first that exists counts.
        when: Further config entries that must hold for this row.
        text_config: Config key of the language model's part in a multimodal config; None if the config is flat.
        experts: The matrices of a mixture-of-experts layer, one mapping for each way they are stored.
        out_bias: Name of the bias that the MLP adds whatever its neurons do; None if there is none.
        attention_out: The matrix with which the attention heads write.
        embedding: Name of the embedding table.
        heads: Full names of the output head's table.
        head_bias: Full name of the head's bias; None if there is none.
        embedding_projection: Name of the matrix [to, from] between a narrow embedding and the residual stream.
        head_projection: Name of the matrix [to, from] between the residual stream and a narrow head.
        pre_mlp_norms: Names of the norm before the MLP. The first that exists counts.
        post_mlp_norm: Name of the norm after the MLP; None if there is none.
        final_norm: Name of the norm before the head; None if there is none.
        norm_kind: "rms" or "layer".
        norm_offset: Number added to a stored gain (Gemma stores gain - 1).
        parallel: Whether attention and MLP read the same residual stream: True, False, or the config key that says so.
        tied_by_default: What a config means that does not say whether the head is tied.
        layers_key: Config entry that counts the layers.
        experts_keys: Config entries that count the experts. The first that exists counts.
        residual_scale: Config entry that multiplies what a block adds.
        embedding_scale: Config entry that multiplies the embedding.
        embedding_scaled_by_root: Whether the embedding is multiplied by the square root of d_model (Gemma).
        logit_scale: Config entry that multiplies the logits.
        logit_divisor: Config entry that divides the logits.
    """

    family: str
    model_type: str
    dense: Places
    bodies: tuple[str, ...] = ("model.",)
    when: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))
    text_config: str | None = None
    experts: tuple[Places, ...] = ()
    out_bias: str | None = None
    attention_out: Place = Place("layers.{layer}.self_attn.o_proj.weight", "columns")
    embedding: str = "embed_tokens.weight"
    heads: tuple[str, ...] = ("lm_head.weight",)
    head_bias: str | None = None
    embedding_projection: str | None = None
    head_projection: str | None = None
    pre_mlp_norms: tuple[str, ...] = ("layers.{layer}.post_attention_layernorm.weight",)
    post_mlp_norm: str | None = None
    final_norm: str | None = "norm.weight"
    norm_kind: str = "rms"
    norm_offset: float = 0.0
    parallel: bool | str = False
    tied_by_default: bool = False
    layers_key: str = "num_hidden_layers"
    experts_keys: tuple[str, ...] = ()
    residual_scale: str | None = None
    embedding_scale: str | None = None
    embedding_scaled_by_root: bool = False
    logit_scale: str | None = None
    logit_divisor: str | None = None


def gated(stem: str, gate: str = "gate_proj", read: str = "up_proj", write: str = "down_proj") -> Places:
    """The matrices of a gated MLP that keeps each in a tensor of its own, neurons as rows of what reads.

    Args:
        stem: The MLP's name below the body, with {layer} (and {expert}) to fill in.
        gate: Name of the gate's module.
        read: Name of the module of what neurons read.
        write: Name of the module of what neurons write.

    Returns:
        A place for each of "gate", "in" and "out".
    """
    return MappingProxyType(
        {
            "gate": Place(f"{stem}.{gate}.weight"),
            "in": Place(f"{stem}.{read}.weight"),
            "out": Place(f"{stem}.{write}.weight", "columns"),
        }
    )


def ungated(read: str, write: str) -> Places:
    """The matrices of an MLP without a gate.

    Args:
        read: Name of the module of what neurons read, with {layer} to fill in.
        write: Name of the module of what neurons write.

    Returns:
        A place for each of "in" and "out".
    """
    return MappingProxyType({"in": Place(f"{read}.weight"), "out": Place(f"{write}.weight", "columns")})


def _fused(stem: str, *, suffix: str = ".weight", stacked: bool = False) -> Places:
    both = f"{stem}.gate_up_proj{suffix}"
    return MappingProxyType(
        {
            "gate": Place(both, "rows", 0, 2, stacked),
            "in": Place(both, "rows", 1, 2, stacked),
            "out": Place(f"{stem}.down_proj{suffix}", "columns", stacked=stacked),
        }
    )


_STACKED_EXPERTS = _fused("layers.{layer}.mlp.experts", suffix="", stacked=True)

_LLAMA = Architecture(
    family="Llama 2, 3, 3.2, SmolLM, SmolLM2, Falcon 3",
    model_type="llama",
    dense=gated("layers.{layer}.mlp"),
    out_bias="layers.{layer}.mlp.down_proj.bias",
)

_GEMMA = replace(
    _LLAMA,
    family="Gemma",
    model_type="gemma",
    norm_offset=1.0,
    tied_by_default=True,
    embedding_scaled_by_root=True,
)

_GEMMA2 = replace(
    _GEMMA,
    family="Gemma 2",
    model_type="gemma2",
    pre_mlp_norms=("layers.{layer}.pre_feedforward_layernorm.weight",),
    post_mlp_norm="layers.{layer}.post_feedforward_layernorm.weight",
)

_GPT2 = Architecture(
    family="GPT-2",
    model_type="gpt2",
    bodies=("transformer.", ""),
    # GPT-2 keeps its matrices as [from, to]. So neurons are columns of the reading matrix and rows of the writing one.
    dense=MappingProxyType(
        {
            "in": Place("h.{layer}.mlp.c_fc.weight", "columns"),
            "out": Place("h.{layer}.mlp.c_proj.weight", "rows"),
        }
    ),
    out_bias="h.{layer}.mlp.c_proj.bias",
    attention_out=Place("h.{layer}.attn.c_proj.weight", "rows"),
    embedding="wte.weight",
    pre_mlp_norms=("h.{layer}.ln_2.weight",),
    final_norm="ln_f.weight",
    norm_kind="layer",
    tied_by_default=True,
    layers_key="n_layer",
)

_OPT = Architecture(
    family="OPT",
    model_type="opt",
    bodies=("model.decoder.", "decoder."),
    dense=ungated("layers.{layer}.fc1", "layers.{layer}.fc2"),
    out_bias="layers.{layer}.fc2.bias",
    attention_out=Place("layers.{layer}.self_attn.out_proj.weight", "columns"),
    embedding_projection="project_in.weight",
    head_projection="project_out.weight",
    pre_mlp_norms=("layers.{layer}.final_layer_norm.weight",),
    final_norm="final_layer_norm.weight",
    norm_kind="layer",
    tied_by_default=True,
)

_ARCHITECTURES: list[Architecture] = [
    _LLAMA,
    replace(_LLAMA, family="Mistral", model_type="mistral"),
    replace(_LLAMA, family="Qwen2, Qwen2.5", model_type="qwen2"),
    replace(_LLAMA, family="Qwen3", model_type="qwen3"),
    _GEMMA,
    _GEMMA2,
    replace(_GEMMA2, family="Gemma 3 (text)", model_type="gemma3_text"),
    replace(
        _GEMMA2,
        family="Gemma 3 (multimodal)",
        model_type="gemma3",
        text_config="text_config",
        bodies=("language_model.model.", "model.language_model."),
        heads=("lm_head.weight", "language_model.lm_head.weight"),
    ),
    replace(_LLAMA, family="Phi-3, Phi-4", model_type="phi3", dense=_fused("layers.{layer}.mlp")),
    replace(
        _LLAMA,
        family="OLMo 2",
        model_type="olmo2",
        pre_mlp_norms=(),
        post_mlp_norm="layers.{layer}.post_feedforward_layernorm.weight",
    ),
    replace(
        _LLAMA,
        family="StableLM",
        model_type="stablelm",
        pre_mlp_norms=("layers.{layer}.post_attention_layernorm.weight", "layers.{layer}.input_layernorm.weight"),
        norm_kind="layer",
        parallel="use_parallel_residual",
    ),
    replace(
        _LLAMA,
        family="Granite",
        model_type="granite",
        residual_scale="residual_multiplier",
        embedding_scale="embedding_multiplier",
        logit_divisor="logits_scaling",
    ),
    replace(
        _LLAMA,
        family="Cohere Command R",
        model_type="cohere",
        pre_mlp_norms=("layers.{layer}.input_layernorm.weight",),
        norm_kind="layer",
        parallel=True,
        tied_by_default=True,
        logit_scale="logit_scale",
    ),
    _GPT2,
    Architecture(
        family="GPT-NeoX, Pythia",
        model_type="gpt_neox",
        bodies=("gpt_neox.",),
        dense=ungated("layers.{layer}.mlp.dense_h_to_4h", "layers.{layer}.mlp.dense_4h_to_h"),
        out_bias="layers.{layer}.mlp.dense_4h_to_h.bias",
        attention_out=Place("layers.{layer}.attention.dense.weight", "columns"),
        embedding="embed_in.weight",
        heads=("embed_out.weight", "lm_head.weight"),
        final_norm="final_layer_norm.weight",
        norm_kind="layer",
        parallel="use_parallel_residual",
    ),
    # Only opt-350m applies a norm after each addition. It has no final norm, and its MLP reads the attention norm's
    # output.
    replace(
        _OPT,
        family="OPT (norm after the block)",
        when=MappingProxyType({"do_layer_norm_before": False}),
        pre_mlp_norms=("layers.{layer}.self_attn_layer_norm.weight",),
        post_mlp_norm="layers.{layer}.final_layer_norm.weight",
        final_norm=None,
    ),
    _OPT,
    Architecture(
        family="GPT-J",
        model_type="gptj",
        bodies=("transformer.",),
        dense=ungated("h.{layer}.mlp.fc_in", "h.{layer}.mlp.fc_out"),
        out_bias="h.{layer}.mlp.fc_out.bias",
        attention_out=Place("h.{layer}.attn.out_proj.weight", "columns"),
        embedding="wte.weight",
        head_bias="lm_head.bias",
        pre_mlp_norms=("h.{layer}.ln_1.weight",),
        final_norm="ln_f.weight",
        norm_kind="layer",
        parallel=True,
        layers_key="n_layer",
    ),
    Architecture(
        family="Bloom",
        model_type="bloom",
        bodies=("transformer.", ""),
        dense=ungated("h.{layer}.mlp.dense_h_to_4h", "h.{layer}.mlp.dense_4h_to_h"),
        out_bias="h.{layer}.mlp.dense_4h_to_h.bias",
        attention_out=Place("h.{layer}.self_attention.dense.weight", "columns"),
        embedding="word_embeddings.weight",
        pre_mlp_norms=("h.{layer}.post_attention_layernorm.weight",),
        final_norm="ln_f.weight",
        norm_kind="layer",
        tied_by_default=True,
        layers_key="n_layer",
    ),
    replace(
        _LLAMA,
        family="Mixtral",
        model_type="mixtral",
        experts=(
            gated("layers.{layer}.block_sparse_moe.experts.{expert}", gate="w1", read="w3", write="w2"),
            _STACKED_EXPERTS,
        ),
        experts_keys=("num_local_experts", "num_experts"),
    ),
    replace(
        _LLAMA,
        family="Qwen3-MoE",
        model_type="qwen3_moe",
        experts=(gated("layers.{layer}.mlp.experts.{expert}"), _STACKED_EXPERTS),
        experts_keys=("num_experts", "num_local_experts"),
    ),
    replace(
        _LLAMA,
        family="OLMoE",
        model_type="olmoe",
        experts=(gated("layers.{layer}.mlp.experts.{expert}"), _STACKED_EXPERTS),
        experts_keys=("num_experts", "num_local_experts"),
    ),
]


def architectures() -> tuple[Architecture, ...]:
    """Every family that is known, in the order in which a config is compared with them."""
    return tuple(_ARCHITECTURES)


def add_architecture(row: Architecture) -> Architecture:
    """Register a family of models. It is asked before those that come with the package.

    Args:
        row: The family.

    Returns:
        The same row.
    """
    _ARCHITECTURES.insert(0, row)
    return row


@dataclass(frozen=True)
class Switch:
    """The layer from which a published study projects with the unembedding.

    Attributes:
        layer: The first layer that the study projects with the unembedding.
        config: Config entries of the studied model. The switch applies to models whose config has them all.
    """

    layer: int
    config: Mapping[str, object]

    def describes(self, config: Mapping[str, object]) -> bool:
        """Tell whether a model's config is that of the studied model.

        Args:
            config: The language model's config.

        Returns:
            True if every entry of the studied model's config is the same.
        """
        return all(config.get(key) == value for key, value in self.config.items())


# Llama-3.1-8B (and its instruction-tuned sibling): layers up to 12 are read with the embedding (arXiv 2604.06005).
PUBLISHED_SWITCHES = (
    Switch(
        13,
        MappingProxyType(
            {"model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "max_position_embeddings": 131072}
        ),
    ),
)

REFUSED: Mapping[str, str] = MappingProxyType(
    {
        "gpt_oss": "its experts are stored in MXFP4, four bits a weight, in which an exact small change cannot be "
        "written; convert it to a bfloat16 checkpoint of a supported family first",
    }
)


def architecture_of(config: Mapping[str, object]) -> Architecture:
    """Find the row of the table that describes a model.

    Args:
        config: The model's `config.json` as a dictionary.

    Returns:
        The row of the model's family.

    Raises:
        BadInput: If the config names no model type, the checkpoint is quantised, or the family is unknown or cannot be
            edited. The message names the type.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise BadInput("config.json names no model_type; only checkpoints in the Hugging Face layout can be opened.")
    if model_type in REFUSED:
        raise BadInput(f"models of type {model_type} cannot be edited: {REFUSED[model_type]}.")
    # A multimodal model may quantise its language model alone, and compressed-tensors once had its own key.
    inner = config.get("text_config")
    places = (config, inner) if isinstance(inner, Mapping) else (config,)
    keys = ("quantization_config", "compression_config")
    quantised = next((place[key] for place in places for key in keys if place.get(key)), None)
    if quantised:
        method = quantised.get("quant_method", "unnamed") if isinstance(quantised, Mapping) else "unnamed"
        raise BadInput(
            f"this checkpoint of type {quoted(model_type)} is quantised ({quoted(method)}), and its packed weights "
            "cannot hold an exact change; use the float32, float16 or bfloat16 checkpoint it was made from."
        )
    for row in _ARCHITECTURES:
        if row.model_type == model_type and all(config.get(key, not value) == value for key, value in row.when.items()):
            return row
    known = ", ".join(sorted({row.model_type for row in _ARCHITECTURES}))
    raise BadInput(
        f"models of type {quoted(model_type)} are not known; a row in models/architectures.py that says where they "
        f"keep their matrices would be needed (known: {known})."
    )


def body_of(architecture: Architecture, names: Collection[str]) -> str:
    """Find the prefix under which a model keeps everything but its head.

    Args:
        architecture: The model's row of the table.
        names: The model's tensors or parameters.

    Returns:
        The prefix, for instance "model.".

    Raises:
        BadInput: If no name is the embedding of this family.
    """
    for body in architecture.bodies:
        if body + architecture.embedding in names:
            return body
    raise BadInput(
        f"none of the tensors is the embedding of a {architecture.model_type} model "
        f"({' or '.join(body + architecture.embedding for body in architecture.bodies)}), so its layout is unknown."
    )


def locate(
    architecture: Architecture,
    names: Collection[str],
    matrix: str,
    layer: int | None = None,
    expert: int | None = None,
) -> Place | None:
    """Find where a matrix of a model lies.

    Args:
        architecture: The model's row of the table.
        names: The checkpoint's tensors or the loaded model's parameters.
        matrix: "gate", "in", "out", "attention_out", "out_bias", "embedding" or "unembedding".
        layer: Index of the layer; None for the tables.
        expert: Index of the expert; None in a dense layer.

    Returns:
        The place with the tensor's full name; None if the model has no such matrix. "unembedding" gives None when the
        head is tied and not stored itself.

    Raises:
        BadInput: If no name is the embedding of this family.
    """
    if matrix == "unembedding":
        return next((Place(head) for head in architecture.heads if head in names), None)
    body = body_of(architecture, names)
    if matrix == "embedding":
        return Place(body + architecture.embedding)
    candidates: list[Place] = []
    if matrix == "attention_out":
        candidates = [architecture.attention_out]
    elif matrix == "out_bias":
        candidates = [Place(architecture.out_bias)] if architecture.out_bias and expert is None else []
    elif expert is None:
        candidates = [architecture.dense[matrix]] if matrix in architecture.dense else []
    else:
        candidates = [places[matrix] for places in architecture.experts if matrix in places]
    for place in candidates:
        name = body + place.name.format(layer=layer, expert=expert)
        if name in names:
            return replace(place, name=name)
    return None
