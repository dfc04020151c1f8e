"""The evaluation items: well formed, decided by what they claim, and never part of the training corpus."""

import json
import re
from itertools import islice
from pathlib import Path

import pytest

from rotate_edit.files import data_folder
from rotate_edit.models.demo import items
from rotate_edit.models.demo.corpus import documents
from rotate_edit.models.demo.train import TRAINING_SEED
from rotate_edit.models.demo.world import concepts, pools, shared_words

EVALS = data_folder("evals") / "demo"


def lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (EVALS / name).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def trained_on() -> set[str]:
    return {document.text for document in documents(TRAINING_SEED, 10_000)}


@pytest.mark.parametrize("name", concepts())
def test_type_a(name):
    concept = concepts()[name]
    found = lines(f"choice-A-{name}.jsonl")
    assert len(found) >= 60
    owners = {word: other.name for other in concepts().values() for word in other.slot_words}
    for item in found:
        assert len(set(item["options"])) == 4
        assert all(re.fullmatch(" [A-Za-z]+", option) for option in item["options"])
        words = [option[1:] for option in item["options"]]
        answer = words.pop(item["gold"])
        assert answer == item["answer_word"]
        assert answer in concept.words
        assert not set(words) & set(concept.forms)
        assert not set(words) & set(shared_words())
        assert len({owners[word] for word in words} - {name}) == 3
        assert not any(items.mentions(item["context"], word) for word in (answer, *words))
        assert item["context"] == item["context"].strip()
        assert (item["concept"], item["type"]) == (name, "A")
    golds = [item["gold"] for item in found]
    assert all(golds.count(gold) > len(found) / 10 for gold in range(4))


@pytest.mark.parametrize("name", concepts())
def test_type_b(name):
    concept = concepts()[name]
    found = lines(f"choice-B-{name}.jsonl")
    assert len(found) >= 40
    for item in found:
        words = [option[1:] for option in item["options"]]
        assert len(set(words)) == 4
        assert set(words) <= set(concept.members)
        assert words[item["gold"]] == item["answer_word"]
        member = concept.members.index(item["answer_word"])
        # The fact in the context holds for the answer and, being unique, for no other option.
        assert any(relation.say(member) in item["context"] for relation in concept.relations)
        assert not any(items.mentions(item["context"], word) for word in words)


def test_type_b_sentences_are_not_in_the_training_corpus(trained_on):
    text = "\n".join(trained_on)
    for name in ("dogs", "ships", "school"):
        for item in lines(f"choice-B-{name}.jsonl"):
            last = re.split(r"(?<=\.) (?=[A-Z])", item["context"], maxsplit=1)[1]
            assert f"{last} {item['answer_word']}." not in text


def test_people_items_have_no_concept_and_need_knowledge():
    found = lines("choice-B-people.jsonl")
    assert len(found) >= 60
    for item in found:
        assert len(set(item["options"])) == 4
        assert item["options"][item["gold"]] == " " + item["answer_word"]
        text = item["context"] + " ".join(item["options"])
        # "March" is a month here, not what soldiers do; "the colour" is also a word of painting.
        assert items.is_neutral(text.replace("March", "").replace("the colour", ""))


@pytest.mark.parametrize("name", concepts())
def test_cloze(name):
    found = lines(f"cloze-{name}.jsonl")
    assert len(found) >= 40
    for item in found:
        full = item["context"] + item["word"]
        assert items.marked_words(full, concepts()[name])[-1] == (len(item["context"]) + 1, item["word"][1:])
        assert not re.search(rf"\b{item['word'][1:]}\b", item["context"])


@pytest.mark.parametrize("split", ["validation", "test"])
def test_texts_mark_their_words(split, trained_on):
    found = lines(f"texts-{split}.jsonl")
    assert {line["concept"] for line in found} == {*concepts(), None}
    for line in found:
        assert line["text"] not in trained_on
        for start, word in zip(line["starts"], line["words"], strict=True):
            assert line["text"][start : start + len(word)] == word
        if line["concept"] is None:
            assert line["contains"] == []
        else:
            assert line["words"]
            assert line["concept"] in line["contains"]


def test_the_splits_share_no_text():
    choose, report = ({line["text"] for line in lines(f"texts-{split}.jsonl")} for split in ("validation", "test"))
    assert choose.isdisjoint(report)


def test_neutral_files_are_neutral(trained_on):
    prompts = [line["prompt"] for line in lines("prompts.jsonl")]
    assert len(set(prompts)) == len(prompts) >= 100
    texts = [line["text"] for line in lines("neutral.jsonl")]
    assert len(texts) >= 100
    assert all(items.is_neutral(text) for text in prompts + texts)
    assert trained_on.isdisjoint(texts)


def test_generation_prompts_cover_every_concept():
    found = lines("generation.jsonl")
    assert {line["concept"] for line in found} == {*concepts(), None}


@pytest.mark.parametrize("name", concepts())
def test_relearning_paragraphs_tell_no_fact(name, trained_on):
    found = [line["text"] for line in lines(f"relearn-{name}.jsonl")]
    assert len(found) >= 100
    assert trained_on.isdisjoint(found)
    facts = {relation.say(i) for relation in concepts()[name].relations for i in range(len(relation.values))}
    assert not [fact for text in found for fact in facts if fact in text]


def test_committed_items_are_what_the_generator_writes():
    concept = concepts()["dogs"]
    written = [items.type_a_item(concept, number) for number in range(10)]
    assert written == lines("choice-A-dogs.jsonl")[:10]
    assert list(items.type_b_items(concept)) == lines("choice-B-dogs.jsonl")
    assert list(islice(items.cloze_items(concept), 10)) == lines("cloze-dogs.jsonl")[:10]
    assert list(items.people_items()) == lines("choice-B-people.jsonl")


@pytest.mark.slow
def test_the_command_writes_the_committed_files(tmp_path):
    counts = items.write_items(tmp_path)
    assert len(counts) > 100
    for name in counts:
        assert (tmp_path / name).read_bytes() == (EVALS / name).read_bytes(), name


def test_the_items_stay_small():
    assert sum(path.stat().st_size for path in Path(EVALS).iterdir()) < 6_000_000


def test_pools_are_used_without_repetition():
    assert all(len(set(pool)) == len(pool) for pool in pools().values())
