"""Edits, adapters and checkpoints opened as models, and the base untouched afterwards."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_words import ids, tiny_model, tiny_tokenizer

from rotate_edit.edits.apply import applied
from rotate_edit.edits.edit import Edit, MatrixChange
from rotate_edit.edits.edit_file import save_edit
from rotate_edit.errors import BadInput
from rotate_edit.evaluation.variants import Variant, opened, read_variants
from rotate_edit.models.checkpoint import identity, open_checkpoint

ROWS = torch.arange(5)
TOKENS = ids("the", "dog", "ran")[None]


def change(strength=2.0):
    generator = torch.Generator().manual_seed(1)
    left, right = torch.randn(5, 1, generator=generator), torch.randn(1, 16, generator=generator)
    return Edit("test", (MatrixChange("out", 1, None, ROWS, left, right, strength, "dogs"),))


@pytest.fixture
def base():
    return tiny_model(0)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def write(folder, model):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_edit_adapter_and_checkpoint_are_one_model(base, tmp_path):
    from rotate_edit.edits.writing.adapter import write_adapter

    write(tmp_path / "base", base)
    checkpoint = open_checkpoint(tmp_path / "base")
    write_adapter(checkpoint, replace(change(), base=identity(checkpoint)), tmp_path / "adapter")
    save_edit(change(), tmp_path / "run" / "edit")
    with applied(base, change()):
        write(tmp_path / "model", base)
    folders = [tmp_path / "run", tmp_path / "run" / "edit", tmp_path / "adapter", tmp_path / "model"]
    variants = read_variants(folders)
    assert [variant.name for variant in variants] == ["run", "edit", "adapter", "model"]
    before = {name: value.clone() for name, value in base.state_dict().items()}
    plain = logits(base)
    seen = []
    for variant in variants:
        with opened(base, variant) as model:
            seen.append(logits(model))
        assert torch.equal(logits(base), plain)
    assert not torch.allclose(seen[0], plain, atol=1e-3)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[3])
    assert torch.allclose(seen[0], seen[2], rtol=1e-5, atol=1e-5)
    after = base.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_an_exception_inside_leaves_the_base_as_it_was(base, tmp_path):
    from rotate_edit.edits.writing.adapter import write_adapter

    write(tmp_path / "base", base)
    checkpoint = open_checkpoint(tmp_path / "base")
    write_adapter(checkpoint, replace(change(), base=identity(checkpoint)), tmp_path / "adapter")
    plain, modules = logits(base), [name for name, _ in base.named_modules()]
    for variant in (Variant("edit", change()), Variant("adapter", adapter=tmp_path / "adapter")):
        with pytest.raises(KeyError), opened(base, variant):
            raise KeyError
        assert torch.equal(logits(base), plain)
        assert [name for name, _ in base.named_modules()] == modules


def test_names_and_folders(tmp_path):
    for parent in ("one", "two"):
        (tmp_path / parent / "model").mkdir(parents=True)
        (tmp_path / parent / "model" / "config.json").write_text("{}")
    folders = [tmp_path / "one" / "model", tmp_path / "two" / "model"]
    assert [variant.name for variant in read_variants(folders)] == ["one/model", "two/model"]
    with pytest.raises(BadInput, match="give each of them once"):
        read_variants([folders[0], folders[0]])
    with pytest.raises(BadInput, match="no run folder, edit, adapter or checkpoint"):
        read_variants([tmp_path])


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"peft_type": "LORA"}, False, "no adapter_model.safetensors"),
        ({"peft_type": "ADALORA"}, True, "not a plain LoRA"),
        ({"peft_type": "LORA", "auto_mapping": {"base_model_class": "x"}}, True, "not a plain LoRA"),
        ([], True, "not a plain LoRA"),
        ({"peft_type": "LORA", "target_modules": ["nowhere"], "r": 1}, True, "does not fit"),
    ],
)
def test_adapters_that_are_not_plain_are_refused(base, tmp_path, config, tensors, message):
    from safetensors.torch import save_file

    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    if tensors:
        save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BadInput, match=message), opened(base, Variant("bad", adapter=tmp_path)):
        pass
