"""Checkpoints that are larger than a machine, as files that hold nothing but their header."""

import json
from pathlib import Path

WIDTH, NEURONS, VOCABULARY = 2_000_000_000, 8, 96


def write_huge(folder: Path) -> Path:
    """A Llama layout of one layer whose vectors are so wide that two of its tables fill terabytes."""
    stem = "model.layers.0"
    shapes = {
        "model.embed_tokens.weight": [VOCABULARY, WIDTH],
        "lm_head.weight": [VOCABULARY, WIDTH],
        "model.norm.weight": [WIDTH],
        f"{stem}.input_layernorm.weight": [WIDTH],
        f"{stem}.post_attention_layernorm.weight": [WIDTH],
        f"{stem}.mlp.gate_proj.weight": [NEURONS, WIDTH],
        f"{stem}.mlp.up_proj.weight": [NEURONS, WIDTH],
        f"{stem}.mlp.down_proj.weight": [WIDTH, NEURONS],
    }
    folder.mkdir(parents=True)
    write_sparse(folder / "model.safetensors", shapes)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": NEURONS,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_sparse(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of zeros in bfloat16 that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
