"""What a recipe will take grows with what it asks for, and is refused where this machine is too small."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from rotate_edit import pipeline
from rotate_edit import session as sessions
from rotate_edit.errors import BadInput
from rotate_edit.estimate import job_cost
from rotate_edit.estimate import tokens_read as tokens_of
from rotate_edit.evaluation.tasks import open_items
from rotate_edit.evaluation.written_items import stand_in_items
from rotate_edit.machine import Cost
from rotate_edit.models.checkpoint import Checkpoint, load_tokenizer, open_checkpoint
from rotate_edit.recipe import Recipe, find_recipe, parse_recipe, read_recipe

ITEMS = open_items("demo")


def recipe(**changes: Any) -> Recipe:
    goal = {key: changes.pop(key) for key in ("strength", "budget", "odds") if key in changes}
    concept = {"name": "dogs", "words": ["dog"], **(goal or {"remaining": 0.1})}
    return parse_recipe({"model": "demo", "concepts": [concept], "evaluate": {"items": "demo"}} | changes)


def tokens_read(wanted: Recipe, items: Any, **settings: Any) -> dict[str, int]:
    return tokens_of(sessions.job_of(wanted, open_checkpoint("demo")), items, **settings)


def recipe_cost(wanted: Recipe, checkpoint: Checkpoint, items: Any, **settings: Any) -> Cost:
    return job_cost(sessions.job_of(wanted, checkpoint), checkpoint, items, **settings)


def test_steps_are_counted_from_the_settings() -> None:
    steps = tokens_read(recipe(), ITEMS)
    located = {"edit": {"method": "channel-located"}}
    assert {name for name, count in steps.items() if not count} == {"groups", "written text"}
    assert steps["self-generated text"] == 2 * 48_000
    assert tokens_read(recipe(strength=2), ITEMS) == steps | {"strengths": 0}
    # A budget and odds are measured on texts without the concept, what remains on texts with it.
    assert tokens_read(recipe(budget=0.02), ITEMS)["strengths"] == tokens_read(recipe(odds=5), ITEMS)["strengths"] > 0
    # A located edit tries groups; beside it rank-one-channels still reads what the model writes.
    grouped = tokens_read(recipe(**located), ITEMS)
    assert grouped["groups"] > 0
    assert tokens_read(recipe(**located, locate={"group_distance": 2.0}), ITEMS) == grouped | {"groups": 0}
    assert tokens_read(recipe(**located), ITEMS, measured=False)["self-generated text"] == 0
    alone = tokens_read(recipe(evaluate={"items": "demo", "controls": []}), ITEMS)
    # Four methods at six strengths and the base, against one method.
    assert steps["curves"] / alone["curves"] == pytest.approx(25 / 7)
    assert alone | {"curves": steps["curves"]} == steps
    unmeasured = tokens_read(recipe(), ITEMS, measured=False)
    assert unmeasured == steps | dict.fromkeys(("curves", "items", "generations", "measures"), 0)
    assert set(tokens_read(recipe(**located), None, measured=False).values()) == {0}


def test_text_that_the_model_writes_itself_is_counted_before_it_is_written() -> None:
    own = {"model": "demo", "concepts": [{"name": "dogs", "words": ["dog", "hound"]}]}
    tokenizer = load_tokenizer(open_checkpoint("demo"))
    items = stand_in_items(tokenizer, {"dogs": ["dog", "hound"]}, texts=40)
    assert items is not None
    steps = tokens_read(parse_recipe(own), items)
    assert steps["written text"] == 2 * 40 * (40 + 64)
    for name in ("strengths", "curves", "items", "generations", "measures"):
        assert steps[name] > 0
    fewer = {**own, "evaluate": {"written_texts": 10}}
    assert tokens_read(parse_recipe(fewer), items)["written text"] == steps["written text"] / 4
    assert sessions.estimate(parse_recipe(own))[0].operations > sessions.estimate(parse_recipe(fewer))[0].operations


def test_costs_follow_the_recipe() -> None:
    demo = open_checkpoint("demo")
    whole = recipe_cost(recipe(), demo, ITEMS)
    edit = recipe_cost(recipe(), demo, ITEMS, measured=False)
    assert edit.operations < whole.operations
    # Channels are searched for the controls alone, and then kept; a method that needs them keeps them either way.
    assert whole.disk > edit.disk > demo.size
    located = {"method": "channel-located"}
    assert recipe_cost(recipe(edit=located), demo, ITEMS, measured=False).disk == whole.disk
    assert recipe_cost(recipe(evaluate={"items": "demo", "controls": []}), demo, ITEMS).disk == edit.disk
    unsaved = recipe_cost(recipe(save={"checkpoint": False}), demo, ITEMS)
    assert unsaved.disk < whole.disk - demo.size
    # A fit's memory would hide that of the search.
    rank_one = {"method": "rank-one"}
    few = recipe_cost(recipe(edit=rank_one), demo, ITEMS)
    more = recipe_cost(recipe(edit=rank_one, locate={"candidates": 600}), demo, ITEMS)
    assert more.operations > few.operations
    assert more.memory > few.memory
    two = parse_recipe(
        recipe().model_dump() | {"concepts": [{"name": n, "words": [n], "remaining": 0.1} for n in ("dog", "cat")]}
    )
    twice = recipe_cost(two, demo, ITEMS)
    assert few.operations < whole.operations < twice.operations
    assert few.memory < whole.memory
    on_gpu = recipe_cost(recipe(), demo, ITEMS, device="cuda")
    assert on_gpu.gpu_memory > 2 * demo.size > whole.gpu_memory == 0


KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
)  # fmt: skip
LARGE = {
    "qwen3-4b": ("Qwen3Config", (2560, 9728, 36, 32, 8, 151936), {"head_dim": 128, "tie_word_embeddings": True}),
    "gemma-2-2b-it": ("Gemma2Config", (2304, 9216, 26, 8, 4, 256000), {"head_dim": 256}),
    "llama-3.1-8b-instruct": ("LlamaConfig", (4096, 14336, 32, 32, 8, 128256), {}),
}


def hollow(folder: Path, config: Any) -> Path:
    """A checkpoint in bfloat16 of a config's shapes, whose weights are a hole in the file."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    header, end = {}, 0
    for name, parameter in model.named_parameters():
        start, end = end, end + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [start, end]}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    folder.mkdir()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        file.truncate(8 + len(content) + end)
    config.save_pretrained(folder)
    return folder


def enormous(folder: Path) -> Path:
    """A checkpoint of terabytes, which no machine can hold in memory."""
    sizes = dict(zip(KEYS, (131072, 524288, 4, 8, 8, 1024)))
    return hollow(folder, transformers.LlamaConfig(**sizes, tie_word_embeddings=True))


def test_a_run_that_does_not_fit_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    large = str(enormous(tmp_path / "model"))
    # Nothing but numbers is written, so that the disk suffices.
    for call in (pipeline.run, pipeline.edit_only):
        with pytest.raises(BadInput, match="GB of memory"):
            call(recipe(model=large, save={"checkpoint": False}), tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_run_that_the_disk_cannot_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=1000))
    with pytest.raises(BadInput, match="GB free"):
        pipeline.run(recipe(), tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_estimate_opens_no_weights(tmp_path: Path) -> None:
    # The weights of this checkpoint are a hole of terabytes: whoever reads one of its matrices runs out of memory.
    cost, device = sessions.estimate(recipe(model=str(enormous(tmp_path / "model"))))
    assert cost.operations > 0
    assert device in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", LARGE)
def test_the_recipes_of_large_models_name_a_gpu_that_they_fit_on(name: str, tmp_path: Path) -> None:
    kind, sizes, more = LARGE[name]
    config = getattr(transformers, kind)(**dict(zip(KEYS, sizes)), **more)
    checkpoint = open_checkpoint(hollow(tmp_path / "model", config))
    says = re.search(r"one GPU with (\d+) GB", find_recipe(f"{name}.yaml").read_text(encoding="utf-8"))
    assert says is not None
    cost = recipe_cost(read_recipe(f"{name}.yaml"), checkpoint, None, device="cuda")
    assert 0.75 * int(says[1]) < cost.gpu_memory / 1e9 < int(says[1])
