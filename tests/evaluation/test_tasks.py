"""Task definitions are data: read from a folder, refused when they are more than that."""

import json

import jinja2
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import nodes
from places import SHARED

from rotate_edit.errors import BadInput
from rotate_edit.evaluation import tasks
from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.questions import questions_of

CHOICE = {
    "task": "animals",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "animals-*.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}} the",
    "doc_to_choice": "options",
    "doc_to_target": "gold",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 3},
}
ROWS = [{"context": "I saw", "options": [" dog", " cat"], "gold": 0, "concept": "dogs"}]


def write(folder, definition=CHOICE, rows=ROWS, name="animals"):
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition))
    (folder / "animals-1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / f"{name}.yaml"


def test_a_folder_of_items_is_read(tmp_path):
    write(tmp_path)
    (tmp_path / "texts-test.jsonl").write_text('{"text": "a dog", "concept": "dogs"}\n\n')
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "I"}\n')
    (tmp_path / "relearn-dogs.jsonl").write_text('{"text": "dogs bark"}\n')
    items = tasks.open_items(tmp_path)
    (task,) = items.tasks
    assert (task.name, task.kind, task.version, task.rows) == ("animals", "accuracy", "3", tuple(ROWS))
    assert items.texts["test"][0]["concept"] == "dogs"
    assert items.prompts == ("I",)
    assert items.relearning == {"dogs": ("dogs bark",)}
    assert items.generation == ()


def test_the_bundled_items_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    items = tasks.open_items("demo")
    assert {"demo_choice", "demo_cloze", "demo_neutral"} <= {task.name for task in items.tasks}
    assert {row["type"] for task in items.tasks if task.name == "demo_choice" for row in task.rows} == {"A", "B"}
    with pytest.raises(BadInput, match="demo"):
        tasks.open_items("no-such-items")


def test_the_content_hash_follows_questions_and_definition(tmp_path):
    first = tasks.read_task(write(tmp_path))
    assert first.content_hash() == tasks.read_task(write(tmp_path)).content_hash()
    changed = tasks.read_task(write(tmp_path, rows=[{**ROWS[0], "gold": 1}]))
    other = tasks.read_task(write(tmp_path, {**CHOICE, "doc_to_text": "context"}))
    assert len({first.content_hash(), changed.content_hash(), other.content_hash()}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"process_docs": "x"}, "process_docs"),
        ({"class": "os.system"}, "class"),
        ({"custom_dataset": "x"}, "custom_dataset"),
        ({"use_prompt": "x"}, "use_prompt"),
        ({"include": "../x.yaml"}, "include"),
        ({"dataset_path": "somebody/dataset"}, "network"),
        ({"doc_to_text": "{{ ''.__class__.__mro__ }}"}, "doc_to_text"),
        ({"doc_to_text": "{% for x in y %}{% endfor %}"}, "doc_to_text"),
        ({"description": "{{ cycler.__init__ }}"}, "description"),
        ({"doc_to_choice": ["{{ context.format }}"]}, "doc_to_choice"),
        ({"doc_to_text": "{{_secret}}"}, "doc_to_text"),
        ({"metric_list": [{"metric": "x", "hf_evaluate": True}]}, "metric_list"),
        ({"output_type": "magic"}, "output_type"),
        ({"dataset_kwargs": {"data_files": {"test": "../secret.jsonl"}}}, "does not lie in"),
        ({"dataset_kwargs": {"data_files": {"test": "/etc/passwd"}}}, "does not lie in"),
        ({"dataset_kwargs": {"data_files": {"test": "missing.jsonl"}}}, "not in"),
        ({"dataset_kwargs": {"trust_remote_code": True, "data_files": {}}}, "data_files"),
        ({"metadata": {"layout": "odd"}}, "layout"),
        ({"test_split": "other"}, "holds no item"),
    ],
)
def test_what_is_more_than_data_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(BadInput, match=message):
        tasks.read_task(write(tmp_path, {**CHOICE, **change}))


def test_a_tag_that_other_code_registers_on_the_safe_loader_is_still_refused(tmp_path, monkeypatch):
    ran = []
    constructors = {**yaml.SafeLoader.yaml_constructors, "!function": lambda *_: ran.append("ran")}
    monkeypatch.setattr(yaml.SafeLoader, "yaml_constructors", constructors)
    path = tmp_path / "task.yaml"
    path.write_text("task: x\ndoc_to_text: !function helper.text\n")
    with pytest.raises(BadInput, match="asks for code to be run"):
        tasks._read_definition(path, allow_code=False)
    assert ran == []


def test_functions_need_allow_code(tmp_path):
    path = write(tmp_path, {key: value for key, value in CHOICE.items() if key != "doc_to_text"})
    path.write_text(path.read_text() + "doc_to_text: !function helper.text\n")
    (tmp_path / "helper.py").write_text("def text(doc):\n    return 'seen ' + doc['context']\n")
    with pytest.raises(BadInput, match="--allow-code"):
        tasks.read_task(path)
    trusted = tasks.read_task(path, allow_code=True)
    assert trusted.config["doc_to_text"](ROWS[0]) == "seen I saw"
    assert trusted.has_code


def test_python_objects_in_yaml_are_refused(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text("task: x\ndescription: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(BadInput, match="asks for code to be run"):
        tasks.read_task(path)
    path.write_text("- a list\n")
    with pytest.raises(BadInput, match="no `task:`"):
        tasks.read_task(path)
    path.write_text("task: [unclosed\n")
    with pytest.raises(BadInput, match="not valid YAML"):
        tasks.read_task(path)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = write(tmp_path)
    path.write_text(path.read_text() + "doc_to_text: another\n")
    with pytest.raises(BadInput, match="the key 'doc_to_text' stands twice"):
        tasks.read_task(path)


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    inside = tmp_path / "items"
    inside.mkdir()
    (tmp_path / "secret.jsonl").write_text('{"a": 1}\n')
    path = write(inside)
    (inside / "animals-2.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(BadInput, match="link that leads out"):
        tasks.read_task(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2 of animals-1"), ("[1]", "not a JSON object"), ('{"a": NaN}', "NaN"), ("[" * 100_000, "valid JSON")],
)
def test_bad_lines_are_named(tmp_path, line, message):
    path = write(tmp_path)
    (tmp_path / "animals-1.jsonl").write_text('{"context": "x"}\n' + line + "\n")
    with pytest.raises(BadInput, match=message):
        tasks.read_task(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"gold": 2}, "gold is not one of its options"),
        ({"gold": -1}, "gold is not one of its options"),
        ({"gold": True}, "gold is not one of its options"),
        ({"gold": " bird"}, "gold is not one of its options"),
        ({"options": [" dog"]}, "two or more texts"),
        ({"options": [" dog", ""]}, "two or more texts"),
        ({"options": " dog"}, "two or more texts"),
    ],
)
def test_items_that_cannot_be_asked_are_named_by_number(tmp_path, row, message):
    with pytest.raises(BadInput, match=f"item 2 .*{message}"):
        tasks.read_task(write(tmp_path, rows=[ROWS[0], {**ROWS[0], **row}]))
    assert tasks.read_task(write(tmp_path, rows=[ROWS[0], {**ROWS[0], "gold": " cat"}])).rows[1]["gold"] == " cat"


def test_texts_that_cannot_be_asked_are_named(tmp_path):
    cloze = {**CHOICE, "output_type": "loglikelihood", "doc_to_text": "context", "doc_to_target": "word"}
    with pytest.raises(BadInput, match=r"item 1 .*word is not a text"):
        tasks.read_task(write(tmp_path, cloze, rows=[{"context": "a", "word": " "}]))
    with pytest.raises(BadInput, match=r"item 1 .*context is not a text"):
        tasks.read_task(write(tmp_path, cloze, rows=[{"context": 3, "word": " x"}]))


def test_lines_of_different_kinds_are_refused_with_the_tasks_name(tmp_path):
    task = tasks.read_task(write(tmp_path, rows=[{"context": "x", "extra": "x"}, {"context": "y", "extra": [1]}]))
    configuration = task.for_lm_eval()
    with pytest.raises(BadInput, match="animals"):
        configuration["custom_dataset"]()


EMBER = {
    "Golf": {
        "QA_train": [{"q": "Which game?", "correct_answer": "golf", "options": ["golf", "polo", "chess", "go"]}],
        "SimdomQA_test": [{"q": "Which court?", "correct_answer": "grass", "options": ["clay", "grass"]}],
    }
}


def test_embers_layout_becomes_rows(tmp_path):
    path = tmp_path / "mc_questions.json"
    path.write_text(json.dumps(EMBER))
    first, second = tasks.read_ember(path)
    assert sorted(first["options"]) == ["chess", "go", "golf", "polo"]
    assert first["options"][first["gold"]] == "golf"
    assert first["letter"] == "ABCD"[first["gold"]]
    assert first["listed"].split("\n")[first["gold"]] == f"{first['letter']}. golf"
    assert (first["concept"], first["type"], first["split"], first["role"]) == ("Golf", "QA", "train", "concept")
    assert (second["type"], second["split"], second["role"]) == ("SimdomQA", "test", "neighbour")
    assert tasks.read_ember(path, split="test") == (second,)
    path.write_text(json.dumps({"Golf": {"QA_train": [{"q": "?", "correct_answer": "x", "options": ["y", "z"]}]}}))
    with pytest.raises(BadInput, match="item 0"):
        tasks.read_ember(path)
    path.write_text("[]")
    with pytest.raises(BadInput, match="EMBER"):
        tasks.read_ember(path)


def test_the_right_option_does_not_stand_in_one_place(tmp_path):
    questions = [{"q": f"Question {i}?", "correct_answer": "a", "options": ["a", "b", "c", "d"]} for i in range(400)]
    path = tmp_path / "mc.json"
    path.write_text(json.dumps({"X": {"QA_train": questions}}))
    places = [row["gold"] for row in tasks.read_ember(path)]
    assert all(70 <= places.count(place) <= 130 for place in range(4))


@given(st.text(alphabet="ab_.[]()|'{}% -\n0", max_size=20))
@settings(max_examples=300, deadline=None)
def test_no_template_but_a_field_gets_through(text):
    """Whatever is let through only looks fields up, as jinja2 itself parses it: no call, no attribute, no statement."""
    template = "{{" + text + "}}"
    try:
        tasks._check_plain({**CHOICE, "doc_to_text": template}, "x.yaml")
        parsed = jinja2.Environment().parse(template)
    except (BadInput, jinja2.TemplateSyntaxError):
        return
    allowed = (nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Getitem, nodes.Const, nodes.Filter)
    assert all(isinstance(node, allowed) for node in parsed.find_all(nodes.Node))
    assert not any(node.name.startswith("_") for node in parsed.find_all(nodes.Name))


SHARED = SHARED / "evals"


def test_local_definitions_read_a_folder_that_the_user_brings(tmp_path):
    (tmp_path / "ember").mkdir()
    (tmp_path / "ember" / "mc_questions.json").write_text(json.dumps(EMBER))
    (tmp_path / "ember" / "relearn_paragraphs.json").write_text('{"Golf": {"RelearnParagraphs": ["A club."]}}')
    items = tasks.open_items("local", data=tmp_path)
    assert [task.name for task in items.tasks] == ["local_ember_letters", "local_ember_likelihood"]
    assert [row["question"] for task in items.tasks for row in task.rows] == ["Which court?"] * 2
    assert items.relearning == {"Golf": ("A club.",)}
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"holds none of arc_easy\.jsonl"):
        tasks.open_items("local", data=tmp_path / "empty")
    with pytest.raises(BadInput, match="no data folder"):
        tasks.open_items("local", data=tmp_path / "nowhere")


def test_ones_own_questions_are_asked_about_their_concept(tmp_path):
    rows = [
        {"query": "How many holes?", "choices": ["18", "9"], "gold": 0, "concept": "golf"},
        {"query": "How many legs?", "choices": ["3", "4"], "gold": 1},
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = tasks.open_items("local", data=tmp_path)
    assert [task.name for task in items.tasks] == ["local_questions"]
    plan = Plan(concepts=("golf",))
    (own,), (general,) = (questions_of(items, plan, role) for role in ("concept", "general"))
    assert (own.prompt, own.answer) == ("Question: How many holes?\nAnswer:", "18")
    assert general.answer == "4"


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the shared evaluation data")
def test_local_definitions_read_the_shared_data():
    items = tasks.open_items("local", data=SHARED)
    assert {task.name: len(task.rows) for task in items.tasks} == {
        "local_arc_easy": 2376,
        "local_lambada": 5153,
        "local_ember_letters": 1000,
        "local_ember_likelihood": 1000,
        "local_mmlu_likelihood": 14042,
        "local_openbookqa": 1000,
    }
    assert len(items.relearning) == 10
