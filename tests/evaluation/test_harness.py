"""lm-eval's numbers through us: the same as its own command's, and cached by everything that decides them."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from places import SHARED
from tiny_items import write_items
from tiny_words import tiny_model, tiny_tokenizer

from rotate_edit.errors import BadInput
from rotate_edit.evaluation import harness as scoring
from rotate_edit.evaluation.harness import Settings, open_harness
from rotate_edit.evaluation.tasks import Task, items_folder, open_items, read_ember, read_task

TASK = Task(
    "x",
    {"output_type": "multiple_choice"},
    {"test": ({"context": "the", "options": [" dog", " cat"], "gold": 0}, {"context": "a", "options": [], "gold": 1})},
)


def test_the_cache_key_follows_everything_that_decides_the_scores():
    model, tokenizer = tiny_model(0), tiny_tokenizer()
    other_tokenizer, chatting = tiny_tokenizer(), tiny_tokenizer()
    other_tokenizer.add_tokens(["zebra"])
    chatting.chat_template = "{{ messages }}"
    key = scoring.cache_key(TASK, Settings(), model, "w", tokenizer)
    assert key == scoring.cache_key(TASK, Settings(), model, "w", tiny_tokenizer())
    others = {
        scoring.cache_key(TASK, Settings(batch_size=8), model, "w", tokenizer),
        scoring.cache_key(TASK, Settings(limit=5), model, "w", tokenizer),
        scoring.cache_key(TASK, Settings(num_fewshot=1), model, "w", tokenizer),
        scoring.cache_key(TASK, Settings(chat_template=True), model, "w", tokenizer),
        scoring.cache_key(TASK, Settings(), model, "v", tokenizer),
        scoring.cache_key(TASK, Settings(), tiny_model(0).double(), "w", tokenizer),
        scoring.cache_key(TASK.with_rows(TASK.rows[1:]), Settings(), model, "w", tokenizer),
        scoring.cache_key(Task("y", TASK.config, TASK.splits), Settings(), model, "w", tokenizer),
        scoring.cache_key(TASK, Settings(), model, "w", other_tokenizer),
        scoring.cache_key(TASK, Settings(), model, "w", chatting),
    }
    assert len(others | {key}) == 11
    assert scoring.cache_key(Task("x", TASK.config, has_code=True), Settings(), model, "w", tokenizer) is None


def test_a_broken_cache_is_no_cache(tmp_path):
    scores = scoring.Scores("x", "accuracy", "acc", 0.5, (1.0, 0.0), (), {"x/acc,none": 0.5})
    scoring.write_cached(tmp_path, "k", scores)
    assert scoring.read_cached(tmp_path, "k") == scores
    (tmp_path / "k.json").write_text("{}")
    assert scoring.read_cached(tmp_path, "k") is None
    (tmp_path / "k.json").write_text("[")
    assert scoring.read_cached(tmp_path, "k") is None
    assert scoring.read_cached(tmp_path / "missing", "k") is None


def test_the_limit_holds_for_lm_evals_own_tasks_and_not_for_chosen_items(tmp_path):
    items = open_items(write_items(tmp_path / "items"))
    tasks = [task for task in items.tasks if task.name == "tiny_choice"]
    harness = scoring.open_harness(tasks, Settings(limit=5))
    model, tokenizer = tiny_model(0), tiny_tokenizer()
    chosen = scoring.score(harness, model, tokenizer)["tiny_choice"]
    assert len(chosen.values) == len(tasks[0].rows)
    own = scoring.score(replace(harness, local=frozenset()), model, tokenizer)["tiny_choice"]
    assert own.values == chosen.values[:5]


def test_few_shots_and_chat_templates_reach_the_model(tmp_path):
    items = open_items(write_items(tmp_path / "items"))
    tasks = [task for task in items.tasks if task.name == "tiny_cloze"]
    model, tokenizer = tiny_model(0), tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}it was {{ m.content }} {% endfor %}"
    found = [
        scoring.score(scoring.open_harness(tasks, settings), model, tokenizer)["tiny_cloze"].values
        for settings in (Settings(), Settings(num_fewshot=2), Settings(chat_template=True))
    ]
    assert found[0] != found[1]
    assert found[0] != found[2]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared models and evaluation data")
@pytest.mark.parametrize("kind", ["arc", "lambada", "text", "letters"])
def test_numbers_equal_those_of_lm_evals_command_to_the_last_digit(tmp_path, kind):
    from rotate_edit.models.checkpoint import load_model, load_tokenizer

    folder = SHARED / "models" / "stories260K"
    definition = {"task": f"local_{kind}", "dataset_path": "json", "test_split": "test", "metadata": {"version": 1}}
    if kind == "arc":
        lines = (SHARED / "evals" / "arc_easy.jsonl").read_text().splitlines()[:60]
        definition |= {"output_type": "multiple_choice", "doc_to_text": "{{query}}\nAnswer:"}
        definition |= {"doc_to_choice": "choices", "doc_to_target": "gold"}
        metrics = [("acc", "mean", True), ("acc_norm", "mean", True)]
    elif kind == "lambada":
        lines = (SHARED / "evals" / "lambada_openai.jsonl").read_text().splitlines()[:60]
        definition |= {"output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": " {{continuation}}"}
        metrics = [("perplexity", "perplexity", False), ("acc", "mean", True)]
    elif kind == "letters":
        # EMBER's own layout cannot be read by lm-eval's command, its rows can.
        lines = [json.dumps(row) for row in read_ember(SHARED / "evals/ember/mc_questions.json", "test")[:40]]
        definition = yaml.safe_load((items_folder("local") / "ember_letters.yaml").read_text()) | definition
        metrics = [("exact_match", "mean", True)]
    else:
        lines = [
            json.dumps({"text": t}) for t in json.loads((SHARED / "corpora/tinystories_1000.json").read_text())[:9]
        ]
        definition |= {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
        metrics = [("word_perplexity", "weighted_perplexity", False)]
    definition["metric_list"] = [
        {"metric": metric, "aggregation": how, "higher_is_better": better} for metric, how, better in metrics
    ]
    definition["dataset_kwargs"] = {"data_files": {"test": "data.jsonl"}}
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(definition))
    torch.set_num_threads(1)
    task = read_task(tmp_path / "task.yaml")
    harness = scoring.open_harness([task], Settings(batch_size=16))
    ours = scoring.score(harness, load_model(folder), load_tokenizer(folder))[task.name].aggregates
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", task.name, "--include_path", "."]
    command += ["--model_args", f"pretrained={folder},dtype=float32", "--batch_size", "16", "--device", "cpu"]
    subprocess.run(
        [*command, "--output_path", "out"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        env={**environment, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )
    (path,) = (tmp_path / "out").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"][task.name]
    name = "letter" if kind == "letters" else "none"
    for metric, _, _ in metrics:
        assert ours[f"{task.name}/{metric},{name}"] == theirs[f"{metric},{name}"]


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared models and evaluation data")
@pytest.mark.parametrize("name", ["stories260K", "bookworm"])
def test_local_data_are_scored_offline_on_real_models(name):
    from rotate_edit.evaluation.compare import Plan
    from rotate_edit.evaluation.evaluate import evaluate
    from rotate_edit.models.checkpoint import load_model, load_tokenizer

    folder = SHARED / "models" / name
    items = open_items("local", data=SHARED / "evals")
    plan = Plan(concepts=("Golf",), items=12)
    found = evaluate(load_model(folder), load_tokenizer(folder), [], plan, items)
    scored = {task: len(values) for task, values in found.items["base"].items()}
    # EMBER: the concept, its neighbourhood, and both of all other concepts.
    assert scored == {
        "local_arc_easy": 12,
        "local_lambada": 12,
        "local_ember_letters": 48,
        "local_ember_likelihood": 48,
        "local_mmlu_likelihood": 12,
        "local_openbookqa": 12,
    }
    assert all(0 <= value <= 1 for values in found.items["base"].values() for value in values)


@pytest.mark.parametrize("name", ["evil.yaml", "./evil", "/tmp/evil.yml", "a/b", "..", "", "evil.YAML"])
def test_a_task_is_a_name_and_never_a_path_whose_code_would_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.yaml").write_text("task: evil\ndataset_path: json\ndoc_to_text: !function evil.go\n")
    (tmp_path / "evil.py").write_text("open('ran', 'w').close()\n")
    with pytest.raises(BadInput):
        open_harness((Task(name),), Settings())
    assert not (tmp_path / "ran").exists()


def test_continuations_score_as_lm_evals_own_code_scores_them():
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = tiny_model(0), tiny_tokenizer()
    asked = [([1, 2, 3], [4]), ([1, 2, 3], [5]), ([1, 2, 3], [4, 5]), ([6], [7, 8, 9]), ([1, 2, 3], [4]), ([2], [3])]
    longer = [(list(range(1, 15)), [3, 4]), (list(range(2, 15)), [5])]
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
    expected = theirs._loglikelihood_tokens([(None, *pair) for pair in asked + longer], disable_tqdm=True)
    for size in (1, 2, 64, "auto"):
        found = scoring.continuation_scores(model, asked + longer, longest=theirs.max_length, rows_at_once=size)
        assert [one[1] for one in found] == [other[1] for other in expected]
        assert [one[0] for one in found] == pytest.approx([other[0] for other in expected], rel=1e-5)
    cut = scoring.continuation_scores(model, longer, longest=5, rows_at_once=64)
    alone = scoring.continuation_scores(model, [(longer[0][0][-4:], [3, 4])], longest=8, rows_at_once=64)
    assert cut[0][0] == pytest.approx(alone[0][0], rel=1e-5)


def test_rows_that_are_alike_run_once():
    model, rows = tiny_model(0), []
    asked = [([1, 2, 3], [4]), ([1, 2, 3], [5]), ([1, 2, 3], [4]), ([1, 2, 3], [4, 5])]
    with model.model.register_forward_hook(lambda _m, _i, output: rows.append(len(output.last_hidden_state))):
        scoring.continuation_scores(model, asked, longest=64, rows_at_once=64)
    assert sum(rows) == 2
