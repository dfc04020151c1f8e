"""Faults of a kind that users of such tools report: each is refused or handled, by the name of what is wrong."""

import json
import multiprocessing
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_items import write_items
from tiny_words import ids, tiny_model, tiny_tokenizer
from workers import write_together

from rotate_edit.edits.edit import Edit, MatrixChange
from rotate_edit.edits.writing.adapter import write_adapter
from rotate_edit.edits.writing.patch import write_checkpoint
from rotate_edit.errors import BadInput, Failure
from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.evaluate import evaluate
from rotate_edit.evaluation.tasks import open_items, read_task
from rotate_edit.evaluation.variants import Variant, opened, read_variants
from rotate_edit.files import whole_file
from rotate_edit.models.checkpoint import (
    identity,
    load_model,
    load_tokenizer,
    open_checkpoint,
    read_embedding,
    read_matrix,
    read_tensor,
)
from rotate_edit.models.demo import demo_model_folder
from rotate_edit.recipe import read_recipe

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


@pytest.fixture
def base(tmp_path: Path) -> Callable[[Callable[[Tensors, Config], None]], Path]:
    """Makes a copy of the demo model with its tensors and its config changed."""

    def make(change: Callable[[Tensors, Config], None]) -> Path:
        folder = tmp_path / "base"
        shutil.copytree(demo_model_folder(), folder)
        tensors = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        change(tensors, config)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder

    return make


def test_an_untied_model_without_a_head_is_refused(base: Any) -> None:
    def change(tensors: Tensors, config: Config) -> None:
        tensors.pop("lm_head.weight", None)
        config.pop("tie_word_embeddings", None)

    with pytest.raises(BadInput, match=r"no output head \(lm_head\.weight\)"):
        open_checkpoint(base(change))


def test_a_layer_that_lacks_a_tensor_is_refused_by_its_name(base: Any) -> None:
    def change(tensors: Tensors, config: Config) -> None:
        del tensors["model.layers.2.self_attn.q_proj.weight"]

    with pytest.raises(BadInput, match=r"lacks model\.layers\.2\.self_attn\.q_proj\.weight"):
        open_checkpoint(base(change))


def test_what_loading_reports_missing_is_refused(base: Any) -> None:
    def change(tensors: Tensors, config: Config) -> None:
        # Missing in every layer, so that only loading can tell.
        for name in [name for name in tensors if "self_attn.q_proj" in name]:
            del tensors[name]

    checkpoint = open_checkpoint(base(change))
    with pytest.raises(BadInput, match=r"does not hold .*q_proj\.weight and \d+ more"):
        load_model(checkpoint)


def test_a_vocabulary_that_does_not_fit_the_table_is_refused(base: Any) -> None:
    def change(tensors: Tensors, config: Config) -> None:
        config["vocab_size"] += 8

    with pytest.raises(BadInput, match=r"embed_tokens\.weight .* rows, but config\.json says vocab_size"):
        open_checkpoint(base(change))


def test_a_tokenizer_larger_than_the_table_is_refused(base: Any) -> None:
    def change(tensors: Tensors, config: Config) -> None:
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:-8].clone()
        config["vocab_size"] -= 8

    with pytest.raises(BadInput, match=r"tokenizer of .* has \d+ tokens beyond the \d+ rows"):
        load_tokenizer(open_checkpoint(base(change)))


@pytest.mark.parametrize("tensor", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"])
def test_one_number_that_is_none_is_refused_by_its_tensor(base: Any, tensor: str) -> None:
    def change(tensors: Tensors, config: Config) -> None:
        tensors[tensor][3, 5] = float("nan")

    checkpoint = open_checkpoint(base(change))
    readers = [lambda: read_tensor(checkpoint, tensor), lambda: load_model(checkpoint)]
    readers.append(
        (lambda: read_embedding(checkpoint)) if "embed" in tensor else (lambda: read_matrix(checkpoint, 1, "out"))
    )
    for read in readers:
        with pytest.raises(BadInput, match=rf"{tensor} of .* not finite"):
            read()


def tied_adapter(folder: Path) -> Any:
    """A tiny tied model, and an adapter of it that changes rows of its table."""
    model = tiny_model(0, tied=True)
    model.save_pretrained(folder / "tied")
    tiny_tokenizer().save_pretrained(folder / "tied")
    checkpoint = open_checkpoint(folder / "tied")
    left, right = torch.randn(2, 1), torch.randn(1, 16)
    change = MatrixChange("embedding", None, None, ids("dog", "cat").sort().values, left, right, 1.0, "cat")
    write_adapter(checkpoint, Edit("test", (change,), base=identity(checkpoint)), folder / "adapter")
    return model


def test_an_adapter_that_touches_a_tied_table_is_evaluated(tmp_path: Path) -> None:
    model = tied_adapter(tmp_path)
    variants, plan = read_variants([tmp_path / "adapter"]), Plan(concepts=("cat",), items=8, new_tokens=2)
    found = evaluate(model, tiny_tokenizer(), variants, plan, open_items(write_items(tmp_path / "items")))
    assert found.items["base"] != found.items["adapter"]
    # The base can be tied and loaded on as before.
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_adapter_whose_head_peft_leaves_random_is_refused(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def wrapped(dtype: torch.dtype) -> Any:
        settings = LoraConfig(
            task_type="CAUSAL_LM", r=1, target_modules=["embed_tokens", "lm_head"], ensure_weight_tying=True
        )
        return get_peft_model(tiny_model(0, tied=True).to(dtype), settings)

    wrapped(torch.float32).save_pretrained(tmp_path / "old", save_embedding_layers=False)
    tensors = load_file(tmp_path / "old" / "adapter_model.safetensors")
    embedding = {name: tensor for name, tensor in tensors.items() if "embed_tokens" in name}
    save_file(embedding, tmp_path / "old" / "adapter_model.safetensors", metadata={"format": "pt"})
    (variant,) = read_variants([tmp_path / "old"])
    with opened(tiny_model(0, tied=True), variant):
        pass
    for dtype in (torch.bfloat16, torch.float16):
        with (
            pytest.raises(BadInput, match="PEFT ties in float32 alone; load the base in float32"),
            opened(tiny_model(0, tied=True).to(dtype), variant),
        ):
            pass


def test_own_items_without_a_concept_are_said_to_count_as_everything_else(tmp_path: Path) -> None:
    folder = write_items(tmp_path / "items")
    for file in folder.glob("*-all.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row | {"concept": ""}) + "\n" for row in rows))
    model, plan = tiny_model(0), Plan(concepts=("cat",), items=8, new_tokens=2)

    def words() -> str:
        found = evaluate(model, tiny_tokenizer(), [Variant("same", Edit("test", ()))], plan, open_items(folder))
        return " ".join(found.result["variants"]["same"]["words"])

    said = words()
    assert "No item is about cat" in said
    assert "what names none counts as everything else" in said
    assert "above chance" not in said.split("No item")[0]
    # One line in the definition says it for a whole task.
    for file in folder.glob("*-all.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "concept"}) + "\n" for row in rows))
    for file in folder.glob("*.yaml"):
        content = yaml.safe_load(file.read_text())
        file.write_text(yaml.safe_dump(content | {"metadata": {**content.get("metadata", {}), "concept": "cat"}}))
    assert "No item is about cat" not in words()


def test_two_runs_into_one_output_keep_both_results(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    output = tmp_path / "run"
    runs = [context.Process(target=write_together, args=(output, barrier, results, number)) for number in (1, 2)]
    for run in runs:
        run.start()
    told = dict(results.get(timeout=60) for _ in runs)
    for run in runs:
        run.join()
    (winner,) = [number for number, text in told.items() if text == "written"]
    (text,) = [text for text in told.values() if text != "written"]
    assert (output / "who").read_text() == str(winner)
    kept = tmp_path / text.rsplit("kept as ", 1)[1].rstrip(".")
    assert (kept / "who").read_text() == str(3 - winner)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", kept.name])


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    output = tmp_path / "table.json"

    def write() -> None:
        with whole_file(output) as temporary:
            temporary.write_text("ours")
            output.write_text("theirs")

    with pytest.raises(Failure, match=r"made by another run meanwhile; this result is kept as table\.json-"):
        write()
    assert output.read_text() == "theirs"
    (kept,) = [path for path in tmp_path.iterdir() if path != output]
    assert kept.read_text() == "ours"


def test_a_key_that_stands_twice_in_a_recipe_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: demo\nconcepts: [{name: a, words: [dog], strength: 1}]\nmodel: other\n")
    with pytest.raises(BadInput, match="the key 'model' stands twice"):
        read_recipe(tmp_path / "r.yaml")


def test_a_key_that_stands_twice_in_a_task_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("task: one\ntask: two\n")
    with pytest.raises(BadInput, match="the key 'task' stands twice"):
        read_task(tmp_path / "t.yaml")


def test_chat_templates_by_name_are_kept(base: Any, tmp_path: Path) -> None:
    folder = base(lambda tensors, config: None)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates" / "run.py").write_text("never copied")
    base_checkpoint = open_checkpoint(folder)
    edit = Edit("nothing", (), base=identity(base_checkpoint))
    patch = write_checkpoint(base_checkpoint, edit, tmp_path / "patched")
    assert (tmp_path / "patched" / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "patched" / "additional_chat_templates" / "run.py").exists()
    assert "additional_chat_templates/run.py" in patch.left_out
