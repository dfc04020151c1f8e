"""A small folder of evaluation items for the random word model, on which a strong enough edit shows."""

import json
from pathlib import Path

import torch
import yaml
from tiny_words import WORDS, tiny_model, tiny_tokenizer

NOUNS = ["dog", "cat", "bird", "fish", "mat", "tree"]


def _lines(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _likeliest(contexts):
    """The noun a fresh random model finds likeliest after each context, so that the base is right by construction."""
    model, tokenizer = tiny_model(0), tiny_tokenizer()
    nouns = torch.tensor([WORDS.index(noun) for noun in NOUNS])
    found = []
    for context in contexts:
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(context)["input_ids"]])).logits[0, -1]
        found.append(NOUNS[int(logits[nouns].argmax())])
    return found


def contexts(count: int = 60) -> list[str]:
    """Different contexts of four words."""
    first, second, third = ["the", "a"], ["big", "small", "the", "a", "it"], ["saw", "ate", "ran", "sat", "on", "under"]
    every = [f"{a} {b} {c} the" for a in first for b in second for c in third]
    return every[:count]


def write_items(folder: Path) -> Path:
    """Write choice, cloze and text tasks, texts and prompts; concepts are the nouns themselves."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = contexts()
    answers = _likeliest(asked)
    choices = []
    for context, answer in zip(asked, answers):
        options = sorted(NOUNS[:4]) if answer in NOUNS[:4] else [answer, *NOUNS[:3]]
        options = sorted(set(options) | {answer})
        choices.append(
            {
                "context": context,
                "options": [f" {option}" for option in options],
                "gold": options.index(answer),
                "concept": answer,
                "type": "A",
            }
        )
    _lines(folder / "choice-all.jsonl", choices)
    _lines(folder / "cloze-all.jsonl", [{"context": c, "word": f" {a}", "concept": a} for c, a in zip(asked, answers)])
    _lines(folder / "neutral.jsonl", [{"text": f"{context} big was it"} for context in asked[:20]])
    texts = [{"text": f"{c} {a} was", "concept": a, "contains": [a]} for c, a in zip(asked, answers)]
    _lines(folder / "texts-test.jsonl", texts)
    _lines(folder / "prompts.jsonl", [{"prompt": context} for context in asked[:12]])
    _lines(
        folder / "generation.jsonl",
        [{"prompt": asked[0], "concept": answers[0]}, {"prompt": "it was", "concept": None}],
    )
    for name, extra in {
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "options",
            "doc_to_target": "gold",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        },
        "cloze": {
            "output_type": "loglikelihood",
            "doc_to_text": "context",
            "doc_to_target": "word",
            "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
        },
        "neutral": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "metric_list": [
                {"metric": "word_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}
            ],
        },
    }.items():
        pattern = "neutral.jsonl" if name == "neutral" else f"{name}-*.jsonl"
        definition = {
            "task": f"tiny_{name}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": pattern}},
            "test_split": "test",
            **extra,
            "metadata": {"version": 1},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition))
    return folder


def most_frequent_answer() -> str:
    """The concept with the most items."""
    answers = _likeliest(contexts())
    return max(set(answers), key=answers.count)
