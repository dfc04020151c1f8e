"""Base against edited end to end on a tiny model, through lm-eval, and its parts alone."""

import json
import random

import numpy as np
import pytest
import torch
from tiny_edits import silencing
from tiny_items import most_frequent_answer, write_items
from tiny_words import WORDS, ids, tiny_model, tiny_tokenizer

from rotate_edit.errors import BadInput
from rotate_edit.evaluation import measures
from rotate_edit.evaluation.compare import Plan
from rotate_edit.evaluation.evaluate import evaluate, evaluate_checkpoints
from rotate_edit.evaluation.harness import Settings
from rotate_edit.evaluation.items import divide, texts_about
from rotate_edit.evaluation.metrics import MeasuredModel, Metric, failed_gates, metric
from rotate_edit.evaluation.statistics import Measure
from rotate_edit.evaluation.tasks import open_items
from rotate_edit.evaluation.variants import Variant
from rotate_edit.reporting.content import tiles

CONCEPT = "cat"
PLAN = Plan(concepts=("cat",), neighbours=("mat", "tree"), new_tokens=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    assert most_frequent_answer() == CONCEPT
    return write_items(tmp_path_factory.mktemp("items"))


@pytest.fixture(scope="module")
def items(folder):
    return open_items(folder)


@pytest.fixture(scope="module")
def model():
    return tiny_model(0)


@pytest.fixture(scope="module")
def found(model, items):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    variants = [Variant("removed", silencing(model, "cat")), Variant("nothing", silencing(model, "cat"), 0.0)]
    result = evaluate(model, tiny_tokenizer(), variants, PLAN, items, concept_ids=ids("cat"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return result


def row(found, variant, title):
    (one,) = [row for row in found.result["variants"][variant]["rows"] if row["title"] == title]
    return one


def test_removal_is_seen_and_the_rest_is_kept(found):
    summary = found.result["summary"]
    assert summary["efficacy"]["value"] == 1
    assert summary["efficacy"]["n"] == 43
    assert summary["specificity"]["value"] > 0.75
    expected = 2 / (1 / summary["efficacy"]["value"] + 1 / summary["specificity"]["value"])
    assert summary["harmonic"]["value"] == pytest.approx(expected)
    assert summary["first_token_kl"]["value"] > 0.1
    assert summary["first_token_kl"]["n"] == 12
    choice = row(found, "removed", "cat: words (type A)")
    assert (choice["base"]["value"], choice["edited"]["value"]) == (1, 0)
    assert choice["p"] == 2 * 0.5**43
    assert "chance does not explain" in choice["sentence"]
    json.dumps(found.result, allow_nan=False)


def test_an_edit_of_strength_nothing_changes_no_number(found):
    nothing = found.result["variants"]["nothing"]
    assert nothing["summary"]["efficacy"]["value"] == 0
    assert nothing["summary"]["specificity"]["value"] == 1
    assert nothing["summary"]["harmonic"]["value"] == 0
    assert nothing["summary"]["first_token_kl"]["value"] == 0
    assert nothing["measures"]["collateral_kl"]["value"] == 0
    assert nothing["measures"]["concept_mass_fraction"]["value"] == pytest.approx(1)
    assert all(one["difference"]["value"] == 0 and one["p_holm"] == 1 for one in nothing["rows"])
    assert found.items["nothing"] == found.items["base"]
    everything = nothing["summary"] | nothing["measures"]
    assert {"efficacy", "first_token_kl", "concept_mass", "repetition_4"} <= set(everything)
    assert all(one["value"] == pytest.approx(one["baseline"]) for one in everything.values())


def test_cloze_probability_and_perplexity_are_the_models_own(found, model, items):
    tokenizer = tiny_tokenizer()
    (task,) = [task for task in divide(items.tasks, PLAN)[0] if task.name == "tiny_cloze"]
    for place in (0, 20, 50):
        item = task.rows[place]
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(item["context"])["input_ids"]])).logits[0, -1]
        expected = torch.softmax(logits, -1)[WORDS.index(item["word"].strip())].item()
        assert found.items["base"]["tiny_cloze"][place] == pytest.approx(expected, rel=1e-4)
    text = row(found, "removed", "tiny_neutral")
    aggregate = found.result["lm_eval"]["base"]["tiny_neutral"]["tiny_neutral/word_perplexity,none"]
    assert text["base"]["value"] == pytest.approx(aggregate)


def test_concept_mass_is_the_measures_own(found, model, items):
    own, others = texts_about(items, ["cat"])
    assert len(own) == 43
    assert not any("cat" in text for text in others)
    known = measures.reference(model, tiny_tokenizer(), ids("cat"), concept_texts=own, other_texts=others, longest=64)
    base = found.result["variants"]["removed"]["measures"]["concept_mass"]["baseline"]
    assert base == pytest.approx(float(known.concept_mass[0].sum() / known.concept_mass[1].sum()))


def test_generations_stand_side_by_side(found):
    first, second = found.result["generations"]
    assert first["about"] != second["about"]
    assert set(first["variants"]) == {"removed", "nothing"}
    assert second["variants"]["nothing"] == second["base"]
    assert second["edited"] == second["variants"]["removed"]


def test_a_task_at_chance_is_not_used_and_says_so(folder, tmp_path, model):
    for path in folder.iterdir():
        (tmp_path / path.name).write_text(path.read_text())
    rows = [json.loads(line) for line in (tmp_path / "choice-all.jsonl").read_text().splitlines()]
    for place, one in enumerate(rows):
        one["gold"] = (one["gold"] + place) % 4
    (tmp_path / "choice-all.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    variant = Variant("removed", silencing(model, "cat"))
    result = evaluate(model, tiny_tokenizer(), [variant], PLAN, open_items(tmp_path)).result
    unused = row(type("Found", (), {"result": result}), "removed", "cat: words (type A)")
    assert not unused["used"]
    assert unused["p_holm"] is None
    assert "does not lie above chance" in unused["sentence"]
    # With no choice items left, removal is read from the cloze items.
    assert result["summary"]["efficacy"]["n"] == 43
    assert any("Not used" in words for words in result["variants"]["removed"]["words"])


def test_the_baseline_is_cached_and_read_back_the_same(items, model, tmp_path):
    variants = [Variant("removed", silencing(model, "cat"))]
    first = evaluate(model, tiny_tokenizer(), variants, PLAN, items, cache=tmp_path)
    assert not first.result["cached_baseline"]
    second = evaluate(model, tiny_tokenizer(), variants, PLAN, items, cache=tmp_path)
    assert second.result["cached_baseline"]
    assert second.items == first.items
    assert second.result["variants"] == first.result["variants"]
    other = evaluate(model, tiny_tokenizer(), [], PLAN, items, weights_hash="another model's", cache=tmp_path)
    assert not other.result["cached_baseline"]
    for path in tmp_path.glob("*.json"):
        path.write_text(path.read_text()[:-40])
    broken = evaluate(model, tiny_tokenizer(), [], PLAN, items, cache=tmp_path)
    assert not broken.result["cached_baseline"]
    assert broken.items["base"] == first.items["base"]


def test_lm_eval_leaves_no_trace(items, model, capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = random.random(), np.random.random(), torch.rand(1)
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    seen = []
    evaluate(model, tiny_tokenizer(), [], PLAN, items, report=lambda *step: seen.append(step))
    assert (random.random(), np.random.random(), torch.rand(1)) == expected
    written = capfd.readouterr()
    assert written.out == ""
    assert "it/s" not in written.err
    assert list(tmp_path.iterdir()) == []
    asked = [step for step in seen if step[0] == "evaluate base"]
    assert asked[-1] == ("evaluate base", asked[-1][2], asked[-1][2])
    assert {step for step, *_ in seen} == {"evaluate base", "measure base", "write with base"}


def test_leaks_are_counted_in_seeded_samples(items, model):
    plan = Plan(concepts=("cat",), words=("cat",), samples=6, new_tokens=6)
    variants = [Variant("removed", silencing(model, "cat")), Variant("nothing", silencing(model, "cat"), 0.0)]
    found = evaluate(model, tiny_tokenizer(), variants, plan, items).result["variants"]
    asked = found["removed"]["measures"]["leak_rate_asked"]
    assert asked["n"] == 6
    assert asked["baseline"] > 0.5
    assert asked["value"] < asked["baseline"]
    assert found["nothing"]["measures"]["leak_rate_asked"]["value"] == asked["baseline"]
    assert found["removed"]["measures"]["leak_rate_neutral"]["n"] == 6


def test_other_backends_score_whole_checkpoints(items, model, tmp_path):
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    folders = {"edited": tmp_path / "base"}
    plain = evaluate_checkpoints(
        tmp_path / "base", folders, PLAN, items, backend="hf", options={"device": "cpu", "dtype": "float32"}
    )
    assert plain.items["edited"] == plain.items["base"]
    assert plain.items["base"] == evaluate(model, tiny_tokenizer(), [], PLAN, items).items["base"]
    with pytest.raises(BadInput, match="backend no-such-backend"):
        evaluate_checkpoints(tmp_path / "base", folders, PLAN, items, backend="no-such-backend")
    (tmp_path / "pickled").mkdir()
    with pytest.raises(BadInput, match="no safetensors"):
        evaluate_checkpoints(tmp_path / "pickled", {}, PLAN, items, backend="hf")


def test_amplification_is_measured_instead_of_removal(items, model):
    plan = Plan(concepts=("cat",), neighbours=("mat",), amplified=("cat",), new_tokens=5)
    variant = Variant("more", silencing(model, "cat"), -0.5)
    found = evaluate(model, tiny_tokenizer(), [variant], plan, items, concept_ids=ids("cat")).result
    assert found["summary"]["efficacy"]["value"] is None
    assert found["variants"]["more"]["measures"]["amplification"]["value"] > 1
    assert found["plan"]["only_amplifies"] is True


@pytest.mark.slow
def test_unknown_tasks_are_named(items, model):
    """lm-eval reads all of its fifteen thousand definitions to know that a name is not among them."""
    with pytest.raises(BadInput, match="no_such_task"):
        evaluate(model, tiny_tokenizer(), [], Plan(concepts=("cat",), tasks=("no_such_task",)), items)


def test_missing_chat_templates_are_named(items, model):
    plan = Plan(concepts=("cat",), settings=Settings(chat_template=True))
    with pytest.raises(BadInput, match="chat template"):
        evaluate(model, tiny_tokenizer(), [], plan, items)


def test_what_is_amplified_is_measured_beside_what_is_suppressed(items, model):
    plan = Plan(
        concepts=("cat", "dog"), neighbours=("mat",), amplified=("dog",), words=("cat",), samples=2, new_tokens=5
    )
    variant = Variant("both", silencing(model, "cat"), 1.0)
    cat, dog = ids("cat"), ids("dog")
    found = evaluate(model, tiny_tokenizer(), [variant], plan, items, concept_ids=cat, amplified_ids=dog).result
    amplifying = Plan(concepts=("dog",), amplified=("dog",), new_tokens=5)
    alone = evaluate(model, tiny_tokenizer(), [variant], amplifying, items, concept_ids=dog).result
    suppressing = Plan(concepts=("cat",), new_tokens=5)
    suppressed = evaluate(model, tiny_tokenizer(), [variant], suppressing, items, concept_ids=cat).result
    measured = [result["variants"]["both"]["measures"]["amplification"] for result in (found, alone)]
    assert measured[0] == measured[1]
    assert "amplification" not in suppressed["variants"]["both"]["measures"]
    assert found["summary"]["efficacy"] == suppressed["summary"]["efficacy"]
    assert found["plan"]["only_amplifies"] is False


TOLD = "told"


@metric("words_written", title="words", note="of the greedy continuations", better="lower")
class WordsWritten(Metric):
    """How many words the model writes. Other tests of this process are not asked for it: they write no word `TOLD`."""

    def prepare(self, base: MeasuredModel) -> str:
        """What it is given back."""
        assert not base.texts
        return TOLD

    def measure(self, edited: MeasuredModel, base: MeasuredModel, known: str) -> Measure | None:
        """The words of all texts."""
        if TOLD not in edited.plan.words:
            return None
        assert known == TOLD
        assert edited.kept
        counts = [sum(len(text.split()) for text in model.texts) for model in (edited, base)]
        return Measure(counts[0], counts[0], counts[0], len(edited.texts), 0.0, counts[1])


def test_a_metric_of_ones_own_is_measured_reported_and_a_gate(items, model):
    plan = Plan(concepts=("cat",), words=(TOLD,), samples=0, items=4, new_tokens=5)
    found = evaluate(model, tiny_tokenizer(), [Variant("removed", silencing(model, "cat"))], plan, items).result
    value = found["variants"]["removed"]["measures"]["words_written"]
    written = [sum(len(row[who].split()) for row in found["generations"]) for who in ("edited", "base")]
    assert [value["value"], value["baseline"]] == written
    assert "words_written" not in found["summary"]
    (tile,) = [tile for tile in tiles(found) if tile["name"] == "words_written"]
    assert (tile["title"], tile["note"], tile["share"]) == ("words", "of the greedy continuations", False)
    assert tile["measure"] == value
    measures = found["variants"]["removed"]["measures"]
    assert failed_gates(measures, {"words_written": written[0]}) == []
    assert "words_written is" in failed_gates(measures, {"words_written": written[0] - 1})[0]
