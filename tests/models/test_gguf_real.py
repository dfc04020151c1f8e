"""Real GGUF files from import to an edited folder: run with `pytest -m real -k gguf -s`.

The files SmolLM2-135M (smollm2.gguf), Gemma-3-270M (gemma3.gguf) and Qwen2.5-Coder-0.5B (qwen.gguf) lie in the folder
ROTATE_EDIT_GGUF, and what transformers wrote from them in ROTATE_EDIT_MODELS.
"""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from places import real_model

from rotate_edit.edits.edit import Edit, MatrixChange
from rotate_edit.edits.edit_file import load_edit, save_edit
from rotate_edit.edits.writing.adapter import write_adapter
from rotate_edit.edits.writing.patch import revert, verify, write_checkpoint
from rotate_edit.models.checkpoint import Checkpoint, identity, load_tokenizer, open_checkpoint, read_matrix
from rotate_edit.models.gguf import import_gguf

FILES = Path(os.environ.get("ROTATE_EDIT_GGUF") or Path.home() / ".cache" / "rotate-edit-models")
TEXTS = [
    "The dog ran across the field because it had seen a rabbit.",
    "def fibonacci(n):\n    return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "Übergrößenträger und naïve Café-Gäste, 東京は日本の首都です。",
]
NUMBERS = "In 1969:\n\n 3 of them flew  384400 km."
# Run by a Python that must not import this package: the edited folder and the adapter on its base, with transformers.
PLAIN = """
import json, sys
sys.modules["rotate_edit"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, edited, adapter, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(edited)
ids = tokenizer(text, return_tensors="pt").input_ids
def logits(model):
    with torch.no_grad():
        return model(ids).logits[0, -1]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
before = logits(model)
adapted = logits(PeftModel.from_pretrained(model, adapter))
model = AutoModelForCausalLM.from_pretrained(edited, dtype=torch.float32)
after = logits(model)
written = model.generate(ids, max_new_tokens=8, do_sample=False)
print(json.dumps({
    "change": float((after - before).abs().max()),
    "adapter": float((after - adapted).abs().max()),
    "text": tokenizer.decode(written[0]),
}))
"""


def gguf_file(name: str) -> Path:
    file = FILES / f"{name}.gguf"
    if not file.is_file():
        pytest.skip(f"no {name}.gguf in the folder ROTATE_EDIT_GGUF")
    return file


def silenced_neurons(base: Checkpoint) -> Edit:
    """What ten neurons of the middle layer write is taken away."""
    layer, neurons = base.layers // 2, torch.arange(10)
    vectors = read_matrix(base, layer, "out", neurons=neurons)
    changes = [
        MatrixChange(
            "out", layer, None, neurons[i : i + 1], -vectors[i].norm().reshape(1, 1),
            (vectors[i] / vectors[i].norm())[None], 1.0, "ten neurons",
        )
        for i in range(len(neurons))
    ]  # fmt: skip
    name = base.place("out", layer).name
    return Edit("test", tuple(changes), base=identity(base, [name]))


def largest(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max())


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2", "gemma3", "qwen"])
def test_logits_are_those_of_transformers_own_reading(name: str, tmp_path: Path) -> None:
    file, started = gguf_file(name), time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    imported = import_gguf(file, tmp_path / "folder", dtype="float32")
    seconds = time.monotonic() - started
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wanted = transformers.GgufConfig(gguf_file=file.name, dequantize=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=wanted
    )
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    tokenizer = load_tokenizer(tmp_path / "folder")
    # Written by transformers from the same file. Reading it from the file once more would take a minute.
    reference = transformers.AutoTokenizer.from_pretrained(real_model(name))
    worst = 0.0
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert ids.tolist()[0] == reference(text).input_ids
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
        with torch.no_grad():
            worst = max(worst, largest(ours(ids).logits, theirs(ids).logits))
    assert tokenizer.get_vocab() == reference.get_vocab()
    assert tokenizer.chat_template == reference.chat_template
    same = tokenizer(NUMBERS).input_ids == reference(NUMBERS).input_ids
    assert same == (name != "smollm2")
    print(
        f"\n{name}: {imported.tensors} tensors, {imported.bytes / 1e9:.2f} GB in float32, imported in {seconds:.0f} s,"
        f" peak memory {before / 1e6:.2f} GB before and {memory / 1e6:.2f} GB after; largest difference of a logit"
        f" {worst:.1e}; tokens of numbers {'the same' if same else 'split off first, as the file says'};"
        f" chat template: {'yes' if tokenizer.chat_template else 'none'}"
    )
    assert worst <= 1e-5


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2", "gemma3", "qwen"])
def test_a_file_is_edited_verified_reverted_and_loaded_elsewhere(name: str, tmp_path: Path) -> None:
    base = open_checkpoint(gguf_file(name))
    save_edit(silenced_neurons(base), tmp_path / "edit")
    edit = load_edit(tmp_path / "edit")
    write_checkpoint(base, edit, tmp_path / "edited", edit_folder=tmp_path / "edit")
    edited = open_checkpoint(tmp_path / "edited")
    checked = verify(edited, edit, base)
    assert not checked.problems
    assert checked.compared == len(base.stored)
    revert(edited, tmp_path / "edit", tmp_path / "reverted")
    for shard in base.headers:
        assert (tmp_path / "reverted" / shard).read_bytes() == (base.folder / shard).read_bytes()
    write_adapter(base, edit, tmp_path / "adapter")
    (tmp_path / "plain.py").write_text(PLAIN)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "plain.py", base.folder.absolute(), "edited", "adapter", TEXTS[0]],
        capture_output=True, text=True, check=False, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    print(
        f"\n{name}: ten neurons of the middle layer silenced, from the .gguf file; {checked.compared} tensors are as"
        f" they should be; reverted byte for byte. Without this package: the edit moves a logit by up to"
        f" {told['change']:.2g}, the adapter differs from the edited folder by {told['adapter']:.1e}, and the edited"
        f" folder writes {json.dumps(told['text'], ensure_ascii=False)}"
    )
    assert told["adapter"] < told["change"] / 10
