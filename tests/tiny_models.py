"""Tiny random checkpoints of every family, saved by transformers in several shards, and random edits of them."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from rotate_edit.edits.edit import Edit, MatrixChange
from rotate_edit.models.checkpoint import Checkpoint, identity

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": 8}
OLD_SIZES = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Family:
    """One family: its config class, sizes, and the live module that writes the neurons' activations (None: fused)."""

    config: str
    sizes: dict
    writer: str | None = "model.layers.{}.mlp.down_proj"
    extra: dict = field(default_factory=dict)

    def build(self, *, tied: bool) -> transformers.PreTrainedModel:
        """A random model in float32; every parameter is random, norms and biases too."""
        config = getattr(transformers, self.config)(**self.sizes, **self.extra, tie_word_embeddings=tied)
        torch.manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(torch.randn_like(parameter) * (0.05 if "norm" in name or "ln_" in name else 0.15))
        return model.eval()


OPT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}

FAMILIES = {
    "llama": Family("LlamaConfig", SIZES),
    "llama-biases": Family("LlamaConfig", SIZES, extra={"mlp_bias": True}),
    "mistral": Family("MistralConfig", SIZES),
    "qwen2": Family("Qwen2Config", SIZES),
    "qwen3": Family("Qwen3Config", SIZES | HEAD),
    "gemma": Family("GemmaConfig", SIZES | HEAD),
    "gemma2": Family("Gemma2Config", SIZES | HEAD),
    "gemma3-text": Family("Gemma3TextConfig", SIZES | HEAD),
    "gemma3": Family(
        "Gemma3Config",
        {"text_config": SIZES | HEAD, "vision_config": VISION, "mm_tokens_per_image": 4},
        "model.language_model.layers.{}.mlp.down_proj",
    ),
    "phi3": Family("Phi3Config", SIZES),
    "olmo2": Family("Olmo2Config", SIZES),
    "stablelm": Family("StableLmConfig", SIZES),
    "stablelm-parallel": Family("StableLmConfig", SIZES, extra={"use_parallel_residual": True}),
    "granite": Family(
        "GraniteConfig",
        SIZES,
        extra={"residual_multiplier": 0.5, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    ),
    "cohere": Family("CohereConfig", SIZES),
    "gpt2": Family("GPT2Config", OLD_SIZES, "transformer.h.{}.mlp.c_proj"),
    "gpt_neox": Family(
        "GPTNeoXConfig",
        {key: value for key, value in SIZES.items() if key != "num_key_value_heads"},
        "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    ),
    "opt": Family("OPTConfig", OPT, "model.decoder.layers.{}.fc2"),
    "opt-350m": Family(
        "OPTConfig",
        OPT,
        "model.decoder.layers.{}.fc2",
        {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "gptj": Family("GPTJConfig", OLD_SIZES | {"rotary_dim": 4, "n_inner": 48}, "transformer.h.{}.mlp.fc_out"),
    "bloom": Family(
        "BloomConfig",
        {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "transformer.h.{}.mlp.dense_4h_to_h",
    ),
    "mixtral": Family("MixtralConfig", SIZES, None, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": Family("Qwen3MoeConfig", SIZES | HEAD, None, MOE | {"moe_intermediate_size": 24}),
    "qwen3_moe-dense-layer": Family(
        "Qwen3MoeConfig", SIZES | HEAD, None, MOE | {"moe_intermediate_size": 24, "mlp_only_layers": [0]}
    ),
    "olmoe": Family("OlmoeConfig", SIZES, None, MOE),
}


def save_tiny(family: str, folder: Path, *, tied: bool, dtype: torch.dtype, shard: str = "30KB") -> Path:
    """Save a random checkpoint of the family in several shards; return its folder."""
    model = FAMILIES[family].build(tied=tied).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def random_edit(checkpoint: Checkpoint, *, tables: bool = True, biases: bool = True, strength: float = 1.7) -> Edit:
    """Rank-one and rank-two changes of every kind of matrix the checkpoint has, two of them overlapping."""
    torch.manual_seed(11)
    width = checkpoint.hidden_size
    direction = torch.randn(1, width) / width**0.5

    def change(matrix: str, layer: int | None, expert: int | None, rows: list[int], own: bool) -> MatrixChange:
        right = torch.cat([direction, torch.randn(1, width) / width**0.5]) if own else direction
        left = torch.randn(len(rows), len(right))
        return MatrixChange(matrix, layer, expert, torch.tensor(rows), left, right, strength, "test")

    changes = []
    for layer in range(checkpoint.layers):
        experts = checkpoint.experts_in(layer)
        for expert in (None,) if experts is None else (0, experts - 1):
            for matrix in checkpoint.matrices:
                changes.append(change(matrix, layer, expert, [1, 4, 9, 20], own=False))
    expert = None if checkpoint.experts_in(1) is None else 0
    changes.append(change("out", 1, expert, [0, 4, 21], own=True))
    if tables:
        changes.append(change("embedding", None, None, [3, 17], own=False))
        changes.append(change("unembedding", None, None, [3, 40, 95], own=True))
    if biases and checkpoint.has("out_bias", 1):
        changes.append(change("out_bias", 1, None, [0], own=False))
    return Edit("test", tuple(changes), base=identity(checkpoint))
