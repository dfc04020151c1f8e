"""Write a GGUF file out as an ordinary checkpoint folder: config, tokenizer and unpacked weights.

Names of config entries, tensors and tokenizer parts come from transformers' own GGUF reading and from the `gguf`
package. Nothing is taken on trust: every tensor must have the name and shape that the config asks for, and what
transformers would leave out without a word is refused.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rotate_edit.console import Report, print_line, print_warnings, progress_bars, silent
from rotate_edit.errors import BadInput, Failure, quoted
from rotate_edit.files import cache_folder, check_free_space, check_output_outside, whole_folder, write_atomically
from rotate_edit.models.companions import INDEX, WEIGHTS
from rotate_edit.models.gguf_file import GgufHeader, PackedTensor, read_gguf_header

if TYPE_CHECKING:
    import numpy
    import torch
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

# The model type that transformers gives each architecture of llama.cpp.
MODEL_TYPES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3": "gemma3_text",
    "phi3": "phi3",
}
DTYPES = ("bfloat16", "float16", "float32")
SHARD_BYTES = 500_000_000
LARGEST_NUMBER = 1 << 24
# The two tables are only renamed. All other tensors are small enough to be unpacked at once.
TABLES = ("token_embd.weight", "output.weight")
NUMBERS_AT_ONCE = 1 << 24
# Without these the config class would fill in those of some other model.
NEEDED = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
# Layers of the two 27B models, which divide attention by another root than that of the head's width.
GEMMA_27B = {"gemma2": 46, "gemma3": 62}
# By what Llama 3.1 and 3.2 divide slow frequencies, and between which shares of which context.
POSITIONS = "rope_freqs.weight"
LLAMA3_FACTORS = (8.0, 32.0)
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# How llama.cpp calls rules that split text as GPT-2 does, and those that split off every digit first.
LIKE_GPT2 = ("gpt-2", "mpt", "olmo", "jais", "phi-2")
DIGITS_FIRST = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# Part of the key in the cache: raise it when the same file is written otherwise.
EDITION = 1


@dataclass(frozen=True)
class Imported:
    """What was written.

    Attributes:
        tensors: Number of tensors.
        bytes: Size of the weights in bytes.
        warnings: What may differ from the model as it was trained, one sentence each.
    """

    tensors: int
    bytes: int
    warnings: tuple[str, ...]


def import_gguf(
    file: str | Path,
    folder: str | Path,
    *,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Report = silent,
) -> Imported:
    """Write a GGUF file out as a checkpoint folder that transformers and this package open.

    The weights are unpacked tensor by tensor and written shard by shard, so that one shard is in memory at a time.

    Args:
        file: The GGUF file.
        folder: The new folder.
        dtype: Dtype of the written weights: "bfloat16", "float16" or "float32".
        overwrite: Replace a folder that exists.
        shard_bytes: Largest size of a weights file, unless one tensor is larger.
        progress: Told how many tensors are done.

    Returns:
        What was written.

    Raises:
        BadInput: If the file is damaged, of an architecture or type that cannot be read, or says something that the
            written folder could not keep; also if the folder exists or the disk has no room.
        Failure: If the disk fails.
    """
    file, folder = Path(file), Path(folder)
    if dtype not in DTYPES:
        raise BadInput(f"the dtype {quoted(dtype)} is none of {', '.join(DTYPES)}.")
    check_output_outside(folder, file, "the GGUF file")
    header = read_gguf_header(file)
    with _foreign(file.name):
        config = _config(file, header)
        names = _names(file.name, header, config)
        tokenizer, warnings = _tokenizer(file, header)
    element = 4 if dtype == "float32" else 2
    size = sum(math.prod(header.tensors[name].shape) for name in names) * element
    check_free_space(folder, size)
    with whole_folder(folder, overwrite=overwrite) as temporary:
        _write_weights(file, header, config, names, dtype, shard_bytes, temporary, progress)
        _write_config(header, config, dtype, temporary)
        tokenizer.save_pretrained(temporary)
    return Imported(len(names), size, warnings)


def imported_folder(file: Path) -> Path:
    """Find the checkpoint folder of a GGUF file in the cache, and write it there the first time.

    It is kept under the file's size, its time and the SHA-256 of its header.

    Args:
        file: The GGUF file.

    Returns:
        The folder.

    Raises:
        BadInput: As `import_gguf`.
        Failure: If the disk fails.
    """
    header, state = read_gguf_header(file), file.stat()
    parts = json.dumps([EDITION, header.digest, state.st_size, state.st_mtime_ns])
    stem = re.sub("[^A-Za-z0-9._-]", "-", file.stem)[:60]
    folder = cache_folder() / "gguf" / f"{stem}-{hashlib.sha256(parts.encode()).hexdigest()[:16]}"
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = open(folder.with_suffix(".lock"), "wb")  # noqa: SIM115
    except OSError as error:
        raise BadInput(f"the cache folder {folder.parent} cannot be written ({error.strerror}).") from error
    with lock:
        _wait_for(lock)
        if not (folder / "config.json").is_file():
            print_line(f"Writing {file.name} out as a checkpoint, once, in {folder}", error=True)
            with progress_bars() as report:
                imported = import_gguf(file, folder, progress=report)
            print_warnings(imported.warnings)
    return folder


def _wait_for(lock: Any) -> None:
    """Wait until no other run writes the same folder, where the file system has locks."""
    import contextlib
    import fcntl

    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX)


@contextmanager
def _foreign(file: str) -> Iterator[None]:
    """Turn whatever transformers raises for what an untrusted header says into one sentence."""
    try:
        yield
    except (BadInput, Failure):
        raise
    except ImportError as error:
        raise BadInput(f"reading {file} needs a newer transformers; it was tested with version 5.23.") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput(f"{file} says something that transformers cannot use ({quoted(reason)}).") from error


def _config(path: Path, header: GgufHeader) -> "PretrainedConfig":
    """The transformers config that the header describes."""
    from transformers import AutoConfig
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    file, kind = path.name, header.architecture
    if kind not in MODEL_TYPES:
        raise BadInput(
            f"{file} is of the architecture {quoted(kind)}, which cannot be imported; {', '.join(MODEL_TYPES)} can."
        )
    keys = {key.removeprefix(f"{kind}."): value for key, value in header.keys.items() if key.startswith(f"{kind}.")}
    missing = [key for key in NEEDED if key not in keys]
    if missing:
        raise BadInput(f"{file} does not say {kind}.{missing[0]}, without which its config cannot be written.")
    mapping: Any = GGUF_CONFIG_MAPPING
    wanted = {key: name for key, name in mapping[kind].items() if name is not None}
    for key in keys.keys() & (wanted.keys() | {"attention.key_length", "rope.dimension_count"}):
        value = keys[key]
        sound = (
            type(value) in (int, float)
            and math.isfinite(value)
            and 0 < value <= LARGEST_NUMBER * (1 if type(value) is int else 1000)
        )
        if not sound:
            raise BadInput(f"{file} has {kind}.{key} = {quoted(value)}, which is not a possible number.")
    if keys["block_count"] > len(header.tensors):
        raise BadInput(f"{file} says that it has {keys['block_count']:,} layers, but it has fewer tensors.")
    if keys.get("rope.scaling.type", "none") != "none":
        raise BadInput(
            f"{file} scales positions ({kind}.rope.scaling.type = {quoted(keys['rope.scaling.type'])}), which the "
            "imported folder would not do; take the model from the Hub's safetensors files instead."
        )
    table = header.tensors.get(TABLES[0])
    if table is None:
        raise BadInput(f"{file} has no tensor {TABLES[0]}, so it is not a language model.")
    values = {name: keys[key] for key, name in wanted.items() if key in keys}
    if "attention.key_length" in keys:
        values["head_dim"] = keys["attention.key_length"]
    if kind in GEMMA_27B:
        width = values["hidden_size"] // values["num_attention_heads"]
        large = values["num_hidden_layers"] == GEMMA_27B[kind]
        values["query_pre_attn_scalar"] = width if large else values.get("head_dim", width)
    values |= _special_tokens(file, header, table.shape[0])
    values |= {"vocab_size": table.shape[0], "tie_word_embeddings": TABLES[1] not in header.tensors}
    if kind == "llama" and POSITIONS in header.tensors:
        theta = values.pop("rope_theta", 10000.0)
        width = values.get("head_dim", values["hidden_size"] // values["num_attention_heads"])
        values["rope_parameters"] = _llama3_positions(path, header.tensors[POSITIONS], theta, width)
    config = AutoConfig.for_model(MODEL_TYPES[kind], **values)
    turned = keys.get("rope.dimension_count")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if turned is not None and turned != width:
        raise BadInput(f"{file} turns {turned} of a head's {width} dimensions by position, which cannot be imported.")
    return config


def _llama3_positions(path: Path, tensor: PackedTensor, theta: float, width: int) -> dict[str, Any]:
    """The scaling of positions of Llama 3.1 and 3.2, which the file holds as a divisor for every frequency.

    Frequency i turns by theta^(-2 i / width) a position. One that turns less than once in 8,192 positions is divided by
    the factor, one that turns more than four times is kept, and between them the inverse divisor grows evenly (the
    rule that transformers calls "llama3").

    Raises:
        BadInput: If the divisors are others.
    """
    import torch

    from rotate_edit.models.safetensors_file import read_bytes

    if tensor.kind == "F32" and tensor.shape == (width // 2,):
        found = read_bytes(path, tensor.start, tensor.end).view(torch.float32).double()
        frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
        turns = LLAMA3["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        for factor in LLAMA3_FACTORS:
            if torch.allclose(found, 1 / ((1 - kept) / factor + kept), rtol=1e-4, atol=0):
                return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA3}
    raise BadInput(
        f"{path.name} scales positions by a {POSITIONS} that is not Llama 3's, which cannot be imported; take the "
        "model from the Hub's safetensors files instead."
    )


def _special_tokens(file: str, header: GgufHeader, rows: int) -> dict[str, int]:
    """The ids of the special tokens, as the config names them."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    mapping: Any = GGUF_CONFIG_MAPPING
    found = {}
    for key, name in mapping["tokenizer"].items():
        index = header.keys.get(f"tokenizer.{key}")
        if index is not None:
            _check_token(file, key, index, rows)
            found[name] = index
    return found


def _check_token(file: str, key: str, index: Any, rows: int) -> None:
    if type(index) is not int or not 0 <= index < rows:
        raise BadInput(f"{file} has tokenizer.{key} = {quoted(index)}, but its tokens are 0 to {rows - 1}.")


def _names(file: str, header: GgufHeader, config: "PretrainedConfig") -> dict[str, str]:
    """The name in the checkpoint of every tensor of the file, whose shapes are checked."""
    import torch
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    kind = next(key for key, name in MODEL_ARCH_NAMES.items() if name == header.architecture)
    packed = get_tensor_name_map(kind, config.num_hidden_layers)
    names = {}
    for name, parameter in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        found = f"{packed.get_name(stem) or name}.{suffix}"
        if found not in header.tensors:
            raise BadInput(f"{file} lacks the tensor {found}, which a {header.architecture} model has.")
        shape = tuple(parameter.shape)
        if header.tensors[found].shape != shape:
            raise BadInput(
                f"{file} has {found} of shape {list(header.tensors[found].shape)}, but its config asks for "
                f"{list(shape)}."
            )
        names[found] = name
    unknown = sorted(header.tensors.keys() - names.keys() - ({POSITIONS} if header.architecture == "llama" else set()))
    if unknown:
        raise BadInput(
            f"{file} has the tensor {unknown[0]}, for which transformers' {config.model_type} model has no place; the "
            "imported model would be another one."
        )
    return {name: names[name] for name in header.tensors if name in names}


def _write_weights(
    file: Path,
    header: GgufHeader,
    config: "PretrainedConfig",
    names: dict[str, str],
    dtype: str,
    shard_bytes: int,
    folder: Path,
    progress: Report,
) -> None:
    import numpy
    import torch
    from safetensors.torch import save_file
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config.to_dict())
    target = getattr(torch, dtype)
    data = numpy.memmap(file, dtype=numpy.uint8, mode="r")
    shards = _shards([header.tensors[name] for name in names], target.itemsize, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        shard_file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for tensor in shard:
            progress("unpacking weights", len(weight_map), len(names))
            values = _unpacked(data, tensor, processor, target)
            if not bool(torch.isfinite(values).all()):
                raise BadInput(f"{tensor.name} of {file.name} holds a number that is not finite in {dtype}.")
            tensors[names[tensor.name]] = values
            weight_map[names[tensor.name]] = shard_file
        save_file(tensors, folder / shard_file, metadata={"format": "pt"})
    progress("unpacking weights", len(names), len(names))
    if len(shards) > 1:
        size = sum(math.prod(header.tensors[name].shape) for name in names) * target.itemsize
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_atomically(folder / INDEX, json.dumps(index, indent=1))


def _shards(tensors: list[PackedTensor], itemsize: int, shard_bytes: int) -> list[list[PackedTensor]]:
    """The tensors in their order, in groups of at most `shard_bytes` unless one tensor is more."""
    shards: list[list[PackedTensor]] = []
    size = shard_bytes
    for tensor in tensors:
        wanted = math.prod(tensor.shape) * itemsize
        if size + wanted > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += wanted
    return shards


def _unpacked(data: "numpy.ndarray", tensor: PackedTensor, processor: Any, dtype: "torch.dtype") -> "torch.Tensor":
    """A tensor's values as transformers keeps them: heads in its order, norms without llama.cpp's 1."""
    import torch
    from gguf import GGMLQuantizationType, dequantize
    from numpy import array

    kind = GGMLQuantizationType[tensor.kind]
    packed = data[tensor.start : tensor.end].reshape(math.prod(tensor.shape[:-1]), -1)
    if tensor.name not in TABLES:
        plain = dequantize(packed, kind).reshape(tensor.shape)
        return torch.from_numpy(array(processor.process(plain, tensor.name).weights)).to(dtype)
    values = torch.empty(tensor.shape, dtype=dtype)
    rows = max(1, NUMBERS_AT_ONCE // tensor.shape[-1])
    for start in range(0, len(packed), rows):
        values[start : start + rows] = torch.from_numpy(array(dequantize(packed[start : start + rows], kind)))
    return values


def _write_config(header: GgufHeader, config: "PretrainedConfig", dtype: str, folder: Path) -> None:
    """Write config.json and generation_config.json. A chat ends at the end of a turn as well."""
    from transformers import GenerationConfig

    config.dtype = dtype
    config.save_pretrained(folder)
    ends = [config.eos_token_id, header.keys.get("tokenizer.ggml.eot_token_id")]
    known = [index for index in dict.fromkeys(ends) if type(index) is int and 0 <= index < config.vocab_size]
    generation = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=known[0] if len(known) == 1 else known or None,
        pad_token_id=config.pad_token_id,
    )
    generation.save_pretrained(folder)


def _tokenizer(file: Path, header: GgufHeader) -> tuple["PreTrainedTokenizerBase", tuple[str, ...]]:
    """The tokenizer that the header describes, and what may be wrong with it."""
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_PRE_TOKENIZER_SPLITS,
        convert_gguf_tokenizer,
        get_gguf_tokenizer,
    )

    count = header.keys.get("tokenizer.ggml.tokens")
    if not isinstance(count, tuple) or not isinstance(header.keys.get("tokenizer.ggml.model"), str):
        raise BadInput(f"{file.name} holds no tokenizer, so texts could not be read with it.")
    rows = header.tensors[TABLES[0]].shape[0]
    if not 0 < count[0] <= rows:
        raise BadInput(f"{file.name} has {count[0]:,} tokens, but its embedding has {rows:,} rows.")
    for key in ("bos", "eos", "unknown", "padding"):
        index = header.keys.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None:
            _check_token(file.name, f"ggml.{key}_token_id", index, count[0])
    architecture, parts, settings = get_gguf_tokenizer(str(file))
    backend, _ = convert_gguf_tokenizer(architecture, parts)
    warnings = []
    split = header.keys.get("tokenizer.ggml.pre", "default")
    if header.keys["tokenizer.ggml.model"] == "gpt2":
        if split in DIGITS_FIRST:
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
        elif split not in LIKE_GPT2 and split not in GGUF_PRE_TOKENIZER_SPLITS:
            warnings.append(
                f"{file.name} splits text by rules that it calls {quoted(split)} and that are not known here; those of "
                "GPT-2 stand in for them, so that numbers and blanks may become other tokens than in training."
            )
    templates = _chat_templates(header)
    if templates:
        settings["chat_template"] = templates if set(templates) != {"default"} else templates["default"]
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings), tuple(warnings)


def _chat_templates(header: GgufHeader) -> dict[str, str]:
    """The chat templates by name; the one without a name is "default"."""
    templates = {}
    for key, value in header.keys.items():
        found = re.fullmatch(r"tokenizer\.chat_template(?:\.([A-Za-z0-9_-]+))?", key, flags=re.ASCII)
        if found and isinstance(value, str):
            templates[found[1] or "default"] = value
    return templates
