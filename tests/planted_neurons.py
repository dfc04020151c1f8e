"""A checkpoint on disk of which it is known which neurons hold a concept, shared by a test and an evaluation."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import normalize

from rotate_edit.channels.locate import ConceptGroup, SearchSettings, locate_concept, sites_of
from rotate_edit.channels.solver import SolverSettings
from rotate_edit.models.checkpoint import open_checkpoint
from rotate_edit.vocabulary.concept import TokenSet
from rotate_edit.vocabulary.projection import Vocabulary, VocabularyRules, read_projections

VOCABULARY, WIDTH, GROUPS, GROUP = 1000, 48, 25, 20


def write_planted(
    folder: Path, *, layers: int, neurons: int, planted: int, strength: float, seed: int
) -> set[tuple[int, int]]:
    """Write a Llama layout whose `down_proj` neurons are Gaussian, and plant the first group of tokens in some.

    Every layer has a mean and a covariance of its own, whose spectrum falls as a power. A planted neuron is a Gaussian
    one of length 1 plus or less `strength` times the group's direction. Tokens are Gaussian; those of a group, tokens
    0 to 19 and so on, share a direction. Returns the planted neurons' layers and rows.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    centres = normalize(draw(GROUPS, WIDTH), dim=1)
    table = draw(VOCABULARY, WIDTH) / WIDTH**0.5
    table[: GROUPS * GROUP] = 0.6 * table[: GROUPS * GROUP] + centres.repeat_interleave(GROUP, 0)
    tensors = {"model.embed_tokens.weight": table, "model.norm.weight": torch.ones(WIDTH)}
    rows = [draw(neurons, WIDTH) for _ in range(layers)]
    for layer in range(layers):
        scales = torch.arange(1, WIDTH + 1).float() ** -0.3
        rotation = torch.linalg.qr(draw(WIDTH, WIDTH)).Q
        rows[layer] = normalize(rows[layer] * scales @ rotation + 0.3 * draw(WIDTH) / WIDTH**0.5, dim=1)
    places = torch.randperm(layers * neurons, generator=generator)[:planted].tolist()
    chosen = {(place // neurons, place % neurons) for place in places}
    for layer, row in sorted(chosen):
        side = 1 if torch.rand(1, generator=generator) < 0.5 else -1
        rows[layer][row] += side * strength * centres[0]
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        for part in ("gate", "up"):
            tensors[f"{stem}.mlp.{part}_proj.weight"] = torch.ones(neurons, WIDTH)
        tensors[f"{stem}.mlp.down_proj.weight"] = rows[layer].T.contiguous()
        for name in ("q", "k", "v", "o"):
            tensors[f"{stem}.self_attn.{name}_proj.weight"] = torch.eye(WIDTH)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{stem}.{name}.weight"] = torch.ones(WIDTH)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": neurons,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return chosen


def locate_planted(folder: Path, *, candidates: int, seed: int, tilted_start: bool = True) -> ConceptGroup:
    """Locate the planted group as a recipe does."""
    checkpoint = open_checkpoint(folder)
    nothing = torch.zeros(VOCABULARY, dtype=torch.bool)
    rules = VocabularyRules(projection="unembedding", words_only=False, remove_frequency=False)
    vocabulary = Vocabulary(rules, tuple(f" t{index}" for index in range(VOCABULARY)), nothing, nothing)
    tokens = TokenSet("planted", torch.arange(GROUP), {}, (), ())
    settings = SearchSettings(
        SolverSettings(channels=1, seed=seed), candidates=candidates, tilted_start=tilted_start, fdr=1.0
    )
    (found,) = locate_concept(
        checkpoint,
        sites_of(checkpoint, ("out",)),
        read_projections(checkpoint, vocabulary),
        vocabulary,
        [ConceptGroup(tokens, 0, tokens.ids, {}, {})],
        settings,
    )
    return found
