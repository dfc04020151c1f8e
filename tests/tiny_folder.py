"""Tiny models, an edit and items of theirs on disk, as the measuring commands are given them."""

import json
from pathlib import Path

from tiny_edits import silencing
from tiny_items import write_items
from tiny_words import tiny_model, tiny_tokenizer

from rotate_edit.edits.edit_file import save_edit

PARAGRAPHS = ["the big saw the cat", "a small cat ate the cat", "the cat sat on the mat and the cat ran"]


def write_folder(where: Path) -> Path:
    """base and another checkpoint, other; edited: an edit of base; items: items with paragraphs to relearn from."""
    model = tiny_model(0)
    for name, weights in (("base", model), ("other", tiny_model(1))):
        weights.save_pretrained(where / name)
        tiny_tokenizer().save_pretrained(where / name)
    save_edit(silencing(model, "cat"), where / "edited")
    items = write_items(where / "items")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in PARAGRAPHS)
    (items / "relearn-cat.jsonl").write_text(lines)
    return where
