"""How long a large checkpoint takes to patch, against copying it: time, memory, and the same with hard links.

    python evals/benchmarks/patch.py --gigabytes 6 --json patch.json

makes a bfloat16 checkpoint of the Llama layout in forty shards, edits matrices in three of them, and prints
`ratio_to_copy` (seconds to open, check and write, over those of `cp -r` followed by `sync` of the copy; the median of
the rounds, which alternate), `peak_rss_mb` (of the process that writes) and `link_seconds` (with hard links).
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import machine

SHARDS = 40
TOUCHED_LAYERS = (5, 20, 35)
NEURONS = 256
VOCABULARY = 1024


def main() -> None:
    """Parse, run the rounds, print and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6.0, help="size of the checkpoint (default 6)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of copying and patching (default 3)")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--write", nargs=3, metavar=("BASE", "OUTPUT", "LINK"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        base, output, link = arguments.write
        print(json.dumps(write_patched(Path(base), Path(output), link == "link")))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        figures = run_rounds(Path(folder), arguments.gigabytes, arguments.rounds)
    print(json.dumps(figures, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def run_rounds(folder: Path, gigabytes: float, rounds: int) -> dict:
    """Make the checkpoint, then copy and patch it in turn; return the figures."""
    base = folder / "base"
    make_checkpoint(base, gigabytes)
    seconds: dict[str, list[float]] = {"cp": [], "copy": [], "link": []}
    memory = []
    for number in range(rounds):
        # Every other round the other way round, so that neither always finds the disk busy with what was before.
        for way in list(seconds)[:: -1 if number % 2 else 1]:
            subprocess.run(["sync"], check=True)
            if way == "cp":
                seconds[way].append(seconds_to_copy(base, folder / "copy"))
                continue
            result = subprocess.run(
                [sys.executable, __file__, "--write", str(base), str(folder / "out"), way],
                check=True,
                capture_output=True,
                text=True,
            )
            found = json.loads(result.stdout)
            seconds[way].append(found["seconds"])
            memory.append(found["peak_rss_mb"])
            shutil.rmtree(folder / "out")
    copies, patches, links = seconds.values()
    ratios = [patch / copy for patch, copy in zip(patches, copies, strict=True)]
    return {
        "machine": machine("cpu"),
        "ratio_to_copy": statistics.median(ratios),
        "peak_rss_mb": max(memory),
        "link_seconds": statistics.median(links),
        "gigabytes": sum(file.stat().st_size for file in base.iterdir()) / 1e9,
        "shards": SHARDS,
        "touched_shards": len(TOUCHED_LAYERS),
        "copy_seconds": copies,
        "patch_seconds": patches,
        "all_link_seconds": links,
    }


def seconds_to_copy(base: Path, copy: Path) -> float:
    """Seconds that `cp -r` and a `sync` of every file of the copy take; the copy is removed afterwards."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(copy)], check=True)
    subprocess.run(["sync", *[str(file) for file in copy.iterdir()], str(copy)], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(copy)
    return seconds


def write_patched(base: Path, output: Path, link: bool) -> dict:
    """Open the checkpoint, check it against the edit's base and write it patched; in a process of its own."""
    import torch

    from rotate_edit import Edit, MatrixChange, checkpoint_identity, open_checkpoint, write_checkpoint

    torch.manual_seed(0)
    checkpoint = open_checkpoint(base)
    rows = torch.randperm(checkpoint.neurons)[:NEURONS].sort().values
    changes = tuple(
        MatrixChange(matrix, layer, None, rows, torch.randn(len(rows), 1), direction, 1.0, "benchmark")
        for layer in TOUCHED_LAYERS
        for matrix in ("gate", "out")
        for direction in [torch.randn(1, checkpoint.hidden_size)]
    )
    names = [checkpoint.place(change.matrix, change.layer).name for change in changes]
    edit = Edit("benchmark", changes, base=checkpoint_identity(checkpoint, names, full=False))
    start = time.perf_counter()
    patch = write_checkpoint(open_checkpoint(base), edit, output, link=link)
    seconds = time.perf_counter() - start
    assert len({tensor.shard for tensor in patch.tensors}) == len(TOUCHED_LAYERS)
    # ru_maxrss counts kilobytes on Linux and bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return {"seconds": seconds, "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6}


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """Write a random bfloat16 checkpoint, one layer a shard, of about the wanted size."""
    import torch

    folder.mkdir()
    # A layer of width d holds sixteen d x d squares of two bytes: four of attention, twelve of an MLP of 4 d neurons.
    width = max(64, round((gigabytes * 1e9 / SHARDS / 32) ** 0.5 / 64) * 64)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": SHARDS,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    weight_map = {}
    for layer in range(SHARDS):
        shapes = layer_shapes(layer, width)
        name = f"model-{layer + 1:05}-of-{SHARDS:05}.safetensors"
        write_shard(folder / name, shapes, noise.view(torch.uint8).numpy().data)
        weight_map |= dict.fromkeys(shapes, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    subprocess.run(["sync"], check=True)


def layer_shapes(layer: int, width: int) -> dict[str, list[int]]:
    """Names and shapes of one layer's tensors; the embedding goes with the first layer, norm and head with the last."""
    stem = f"model.layers.{layer}"
    shapes = {f"{stem}.self_attn.{part}_proj.weight": [width, width] for part in "qkvo"}
    shapes |= {f"{stem}.mlp.{part}_proj.weight": [4 * width, width] for part in ("gate", "up")}
    shapes[f"{stem}.mlp.down_proj.weight"] = [width, 4 * width]
    shapes |= {f"{stem}.{part}_layernorm.weight": [width] for part in ("input", "post_attention")}
    if layer == 0:
        shapes["model.embed_tokens.weight"] = [VOCABULARY, width]
    if layer == SHARDS - 1:
        shapes |= {"model.norm.weight": [width], "lm_head.weight": [VOCABULARY, width]}
    return shapes


def write_shard(path: Path, shapes: dict[str, list[int]], noise: memoryview) -> None:
    """Write one safetensors file of bfloat16 tensors filled with noise over and over."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for dimension in shape:
            size *= dimension
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with open(path, "wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        while end > 0:
            end -= stream.write(noise[: min(end, len(noise))])


if __name__ == "__main__":
    main()
