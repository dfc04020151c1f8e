"""Where each model family keeps its MLP matrices, norms, embedding and head: one row of data a family.

A row holds names as they stand in the safetensors files. The same names serve a live `transformers` model, since
wherever the two differ the row lists both and the one that exists is taken.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from rotate_edit.errors import BadInput, quoted

NEURON_MATRICES = ("gate", "in", "out")


@dataclass(frozen=True)
class Neuron:
    """The address of one MLP neuron; `expert` is None in a dense layer. Printed as "L3.N12" or "L10.E3.N123"."""

    layer: int
    neuron: int
    expert: int | None = None

    def __str__(self) -> str:
        expert = "" if self.expert is None else f".E{self.expert}"
        return f"L{self.layer}{expert}.N{self.neuron}"


def parse_neuron(text: str) -> Neuron:
    """Read "L3.N12" or "L10.E3.N123" back. Raises BadInput when the text is not such an address."""
    found = re.fullmatch(r"L(\d{1,6})(?:\.E(\d{1,6}))?\.N(\d{1,9})", text.strip(), flags=re.ASCII)
    if found is None:
        raise BadInput(f"{quoted(text)} is not the address of a neuron; write it as L3.N12, or L10.E3.N123.")
    layer, expert, neuron = found.groups()
    return Neuron(int(layer), int(neuron), None if expert is None else int(expert))


@dataclass(frozen=True)
class Place:
    """Where one matrix lies.

    name: the tensor, below the body's prefix, with {layer} and {expert} to fill in; neurons: whether a neuron is a
    row or a column of the stored tensor; part, parts: the tensor holds `parts` equal blocks along the neuron axis
    and this matrix is number `part`; stacked: the first dimension of the tensor is the expert.
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

    family, model_type: the name people use and the one in `config.json`; when: further config entries that must
    hold for this row; text_config: where the language model's part of a multimodal config stands;
    bodies: prefixes under which everything but the head stands (the first that exists counts);
    dense: the matrices of a dense layer; experts: those of a mixture-of-experts layer, one mapping for each
    way they are stored; out_bias: what the MLP adds whatever its neurons do; attention_out: what the attention
    heads write; embedding, heads: the tables (heads are full names); head_bias: full name;
    embedding_projection, head_projection: matrices between a narrow table and the residual stream, each
    [to, from]; pre_mlp_norms (the first that exists counts), post_mlp_norm, final_norm; norm_kind: "rms" or
    "layer"; norm_offset: added to a stored gain (Gemma stores gain - 1); parallel: attention and MLP read the same
    residual stream (True, False or the config key that says so); tied_by_default: what a config means that says
    nothing; layers_key, experts_keys: config entries that count (the first that exists); residual_scale,
    embedding_scale, logit_scale, logit_divisor: config entries that multiply (or divide) what a block adds, the
    embedding and the logits; embedding_scaled_by_root: the embedding is multiplied by the square root of d_model
    (Gemma).
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


def _gated(stem: str, gate: str = "gate_proj", read: str = "up_proj", write: str = "down_proj") -> Places:
    return MappingProxyType(
        {
            "gate": Place(f"{stem}.{gate}.weight"),
            "in": Place(f"{stem}.{read}.weight"),
            "out": Place(f"{stem}.{write}.weight", "columns"),
        }
    )


def _ungated(read: str, write: str) -> Places:
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
    dense=_gated("layers.{layer}.mlp"),
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
    # GPT-2 keeps its matrices as [from, to], so neurons are columns of what reads and rows of what writes.
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
    dense=_ungated("layers.{layer}.fc1", "layers.{layer}.fc2"),
    out_bias="layers.{layer}.fc2.bias",
    attention_out=Place("layers.{layer}.self_attn.out_proj.weight", "columns"),
    embedding_projection="project_in.weight",
    head_projection="project_out.weight",
    pre_mlp_norms=("layers.{layer}.final_layer_norm.weight",),
    final_norm="final_layer_norm.weight",
    norm_kind="layer",
    tied_by_default=True,
)

ARCHITECTURES: tuple[Architecture, ...] = (
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
        dense=_ungated("layers.{layer}.mlp.dense_h_to_4h", "layers.{layer}.mlp.dense_4h_to_h"),
        out_bias="layers.{layer}.mlp.dense_4h_to_h.bias",
        attention_out=Place("layers.{layer}.attention.dense.weight", "columns"),
        embedding="embed_in.weight",
        heads=("embed_out.weight", "lm_head.weight"),
        final_norm="final_layer_norm.weight",
        norm_kind="layer",
        parallel="use_parallel_residual",
    ),
    # Only opt-350m norms after each addition; it has no final norm, and the MLP reads what the attention norm left.
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
        dense=_ungated("h.{layer}.mlp.fc_in", "h.{layer}.mlp.fc_out"),
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
        dense=_ungated("h.{layer}.mlp.dense_h_to_4h", "h.{layer}.mlp.dense_4h_to_h"),
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
            _gated("layers.{layer}.block_sparse_moe.experts.{expert}", gate="w1", read="w3", write="w2"),
            _STACKED_EXPERTS,
        ),
        experts_keys=("num_local_experts", "num_experts"),
    ),
    replace(
        _LLAMA,
        family="Qwen3-MoE",
        model_type="qwen3_moe",
        experts=(_gated("layers.{layer}.mlp.experts.{expert}"), _STACKED_EXPERTS),
        experts_keys=("num_experts", "num_local_experts"),
    ),
    replace(
        _LLAMA,
        family="OLMoE",
        model_type="olmoe",
        experts=(_gated("layers.{layer}.mlp.experts.{expert}"), _STACKED_EXPERTS),
        experts_keys=("num_experts", "num_local_experts"),
    ),
)


@dataclass(frozen=True)
class Switch:
    """From which layer on a published study projects with the unembedding, for models whose config says all this."""

    layer: int
    config: Mapping[str, object]

    def describes(self, config: Mapping[str, object]) -> bool:
        """Whether a model's config is that of the studied model."""
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
    """The row of the table that describes a model, found from its `config.json` as a dictionary.

    Raises BadInput, by name, for quantised checkpoints, for families that cannot be edited and for unknown ones.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise BadInput("config.json names no model_type; only checkpoints in the Hugging Face layout can be opened.")
    if model_type in REFUSED:
        raise BadInput(f"models of type {model_type} cannot be edited: {REFUSED[model_type]}.")
    # A multimodal model may say it of its language model alone, and compressed-tensors once had a key of its own.
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
    for row in ARCHITECTURES:
        if row.model_type == model_type and all(config.get(key, not value) == value for key, value in row.when.items()):
            return row
    known = ", ".join(sorted({row.model_type for row in ARCHITECTURES}))
    raise BadInput(
        f"models of type {quoted(model_type)} are not known; a row in rotate_edit/architectures.py that says where "
        f"they keep their matrices would be needed (known: {known})."
    )


def body_of(architecture: Architecture, names: Collection[str]) -> str:
    """The prefix under which this model keeps its body; `names` are its tensors or parameters. Raises BadInput."""
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
    """Where a matrix of this model lies, with the tensor's full name, or None when the model has no such matrix.

    names: the checkpoint's tensors or the live model's parameters. matrix: "gate", "in", "out", "attention_out",
    "out_bias", "embedding" or "unembedding"; "unembedding" is None when the head is tied and not stored itself.
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
