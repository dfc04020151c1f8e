"""Tiny GGUF files, written from tiny transformers models in the way of llama.cpp's converter."""

from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFWriter
from transformers.convert_slow_tokenizer import bytes_to_unicode

MERGES = ["t h", "th e", "Ġ the", "c a", "ca t", "Ġ cat"]
TEMPLATE = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "pad_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": "LlamaConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma2": "Gemma2Config",
    "gemma3": "Gemma3TextConfig",
    "phi3": "Phi3Config",
}
SMALLER_NORMS = ("gemma2", "gemma3")


def vocabulary() -> list[str]:
    """A byte-level vocabulary: three special tokens, the bytes, the merges, and a few names to fill a block of 32."""
    words = [merge.replace(" ", "") for merge in MERGES]
    tokens = ["<unk>", "<s>", "</s>", *bytes_to_unicode().values(), *words]
    return [*tokens, *(f"<extra-{number}>" for number in range(-len(tokens) % 32))]


def tiny_model(kind: str, *, tied: bool = True, **settings: Any) -> Any:
    """A random model of an architecture of llama.cpp, in float32, with settings of its config."""
    sizes = SIZES | {"vocab_size": len(vocabulary()), "tie_word_embeddings": tied} | settings
    if kind in SMALLER_NORMS:
        sizes |= {"query_pre_attn_scalar": SIZES["head_dim"], "sliding_window": 16}
    config = getattr(transformers, CONFIGS[kind])(**sizes)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def packed(values: numpy.ndarray, kind: GGMLQuantizationType) -> numpy.ndarray:
    """Values as a file of that type stores them."""
    return gguf.quants.quantize(values, kind)


def unpacked(values: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
    """What is left of values when they were stored in that type."""
    again = gguf.quants.dequantize(packed(values.numpy(), kind), kind)
    return torch.from_numpy(numpy.array(again)).reshape(values.shape)


def rotated(values: torch.Tensor, heads: int) -> torch.Tensor:
    """The rows of a Llama query or key matrix in llama.cpp's order: pairs side by side, not half a head apart."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, -1)
    return halves.transpose(1, 2).reshape(values.shape).contiguous()


def converted(model: Any, kind: str) -> dict[str, torch.Tensor]:
    """A model's tensors under llama.cpp's names and as it stores them, in float32."""
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(key, model.config.num_hidden_layers)
    found = {}
    for name, values in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if stem == "lm_head" and model.config.tie_word_embeddings:
            continue
        if kind == "llama" and stem.endswith(("q_proj", "k_proj")):
            config = model.config
            values = rotated(values, config.num_attention_heads if "q_proj" in stem else config.num_key_value_heads)
        if kind in SMALLER_NORMS and "norm" in stem:
            values = values + 1
        found[f"{names.get_name(stem)}.{suffix}"] = values.detach().float()
    return found


def write_gguf(
    path: Path,
    model: Any,
    kind: str,
    *,
    matrices: GGMLQuantizationType = GGMLQuantizationType.F32,
    tensors: dict[str, torch.Tensor] | None = None,
    keys: dict[str, Any] | None = None,
    tokenizer: bool = True,
    split: str = "gpt-2",
) -> Path:
    """Write a model as a GGUF file; `tensors` and `keys` replace what it would hold, and None leaves a key out."""
    config = model.config
    content = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.key_length": config.head_dim,
        "rope.freq_base": 10000.0,
    }
    if kind in SMALLER_NORMS:
        content["attention.sliding_window"] = config.sliding_window
    writer = GGUFWriter(path, kind)
    for key, value in ({f"{kind}.{key}": value for key, value in content.items()} | (keys or {})).items():
        if isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
    if tokenizer:
        tokens = vocabulary()
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split)
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in ("<unk>", "<s>", "</s>") else 1 for token in tokens])
        writer.add_token_merges(MERGES)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(2)
        writer.add_add_bos_token(False)
        writer.add_chat_template(TEMPLATE)
    for name, values in (converted(model, kind) if tensors is None else tensors).items():
        stored = GGMLQuantizationType.F32 if values.ndim == 1 else matrices
        writer.add_tensor(name, packed(values.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
