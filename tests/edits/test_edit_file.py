"""Edits come back from their files exactly, and files that were tampered with are refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rotate_edit.edits.edit import MATRICES, Edit, EditedVector, MatrixChange
from rotate_edit.edits.edit_file import EDIT_JSON, EDIT_TENSORS, edit_identity, load_edit, save_edit
from rotate_edit.errors import BadInput


@st.composite
def edits(draw: st.DrawFn) -> Edit:
    changes = []
    for _ in range(draw(st.integers(0, 4))):
        matrix = draw(st.sampled_from(MATRICES))
        layer = None if "embedding" in matrix else draw(st.integers(0, 90))
        expert = draw(st.none() | st.integers(0, 200)) if matrix in ("gate", "in", "out") else None
        rows = sorted(draw(st.sets(st.integers(0, 10**6), min_size=1, max_size=5)))
        rank, width = draw(st.integers(1, 3)), draw(st.integers(1, 6))
        strength = draw(st.floats(-1e6, 1e6))
        left, right = torch.randn(len(rows), rank), torch.randn(rank, width)
        most = draw(st.just(math.inf) | st.floats(-1e6, 1e6))
        concept = draw(st.text(max_size=9))
        changes.append(MatrixChange(matrix, layer, expert, torch.tensor(rows), left, right, strength, concept, most))
    finite = st.floats(allow_nan=False, allow_infinity=False)
    vectors = draw(
        st.lists(
            st.builds(
                EditedVector,
                address=st.text(max_size=9),
                matrix=st.sampled_from(["gate", "in", "out"]),
                concept=st.text(max_size=9),
                channels=st.lists(st.text(max_size=9), max_size=3).map(tuple),
                score=finite,
                cosine=finite,
                norm_before=finite,
                norm_after=finite,
            ),
            max_size=3,
        )
    )
    return Edit(draw(st.text(max_size=9)), tuple(changes), tuple(vectors), {"source": "x"}, {"ridge": 0.3})


def equal(first: Edit, second: Edit) -> bool:
    tensors = [(one, two) for a, b in zip(first.changes, second.changes, strict=True) for one, two in parts(a, b)]
    plain = [
        replace(edit, changes=tuple(replace(c, rows=None, left=None, right=None) for c in edit.changes))  # type: ignore[arg-type]
        for edit in (first, second)
    ]
    return plain[0] == plain[1] and all(torch.equal(one, two) for one, two in tensors)


def parts(a: MatrixChange, b: MatrixChange) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(a.rows, b.rows), (a.left, b.left), (a.right, b.right)]


@given(edit=edits())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_edits_come_back(tmp_path: Path, edit: Edit) -> None:
    save_edit(edit, tmp_path / "edit", overwrite=True)
    found = load_edit(tmp_path / "edit")
    assert equal(found, edit)
    assert edit_identity(found) == edit_identity(edit)


def example() -> Edit:
    torch.manual_seed(0)
    right = torch.randn(1, 6)
    changes = tuple(
        MatrixChange("out", layer, None, torch.tensor([1, 3]), torch.randn(2, 1), right, 2.5, "dogs")
        for layer in (0, 1)
    )
    vector = EditedVector("L0.N1", "out", "dogs", ("L0.N1.out#0",), 3.0, 0.9, 1.0, 0.8)
    return Edit("channel-located", changes, (vector,), {"source": "x"}, {})


def test_a_change_that_goes_no_further_keeps_its_bound(tmp_path: Path) -> None:
    rows = replace(example().changes[0], most=0.5).at(2.5)
    edit = replace(example(), changes=(rows, example().changes[1]))
    save_edit(edit, tmp_path / "edit")
    found = load_edit(tmp_path / "edit")
    assert [change.strength for change in found.changes] == [0.5, 2.5]
    assert [change.strength for change in found.at(8).changes] == [0.5, 8]
    assert edit_identity(found.at(8)) == edit_identity(edit.at(8))


def test_notes_come_back_and_must_be_sentences(tmp_path: Path) -> None:
    edit = replace(example(), notes=("one word was added.", "and another."))
    save_edit(edit, tmp_path / "e")
    assert load_edit(tmp_path / "e").notes == edit.notes
    content = json.loads((tmp_path / "e" / EDIT_JSON).read_text())
    (tmp_path / "e" / EDIT_JSON).write_text(json.dumps(content | {"notes": [1]}))
    with pytest.raises(BadInput, match="notes that are not sentences"):
        load_edit(tmp_path / "e")
    # Edits of before have none.
    del content["notes"]
    (tmp_path / "e" / EDIT_JSON).write_text(json.dumps(content))
    assert load_edit(tmp_path / "e").notes == ()


def test_identity_depends_on_what_is_changed_alone() -> None:
    edit = example()
    assert edit_identity(edit) == edit_identity(replace(edit, method="other", vectors=(), base={}))
    assert edit_identity(edit) != edit_identity(edit.at(2.6))
    assert edit_identity(edit) != edit_identity(replace(edit, changes=edit.changes[:1]))


def test_existing_folder_and_infinite_figures(tmp_path: Path) -> None:
    edit = example()
    save_edit(edit, tmp_path / "edit")
    with pytest.raises(BadInput, match="exists already"):
        save_edit(edit, tmp_path / "edit")
    with pytest.raises(BadInput, match="finite"):
        save_edit(edit.at(float("inf")), tmp_path / "other")
    assert [entry.name for entry in tmp_path.iterdir()] == ["edit"]


def rewrite(folder: Path, **changes: object) -> None:
    content = json.loads((folder / EDIT_JSON).read_text())
    content.update(changes)
    (folder / EDIT_JSON).write_text(json.dumps(content))


def first_change(folder: Path, **changes: object) -> None:
    content = json.loads((folder / EDIT_JSON).read_text())
    content["changes"][0].update(changes)
    (folder / EDIT_JSON).write_text(json.dumps(content))


def first_tensor(folder: Path, name: str, tensor: torch.Tensor) -> None:
    """Replace a tensor and put the right hash in the JSON, so that only its content is wrong."""
    import hashlib

    tensors = load_file(folder / EDIT_TENSORS)
    tensors[name] = tensor
    save_file(tensors, folder / EDIT_TENSORS)
    rewrite(folder, sha256={EDIT_TENSORS: hashlib.sha256((folder / EDIT_TENSORS).read_bytes()).hexdigest()})


@pytest.mark.parametrize(
    ("tamper", "words"),
    [
        (lambda f: (f / EDIT_JSON).unlink(), "no readable edit.json"),
        (lambda f: (f / EDIT_TENSORS).unlink(), "cannot be read"),
        (lambda f: rewrite(f, format="x"), "version 1"),
        (lambda f: rewrite(f, version=2), "version 1"),
        (lambda f: rewrite(f, sha256={}), "SHA-256 differs"),
        (lambda f: rewrite(f, sha256=3), "SHA-256 differs"),
        (lambda f: rewrite(f, changes={}), "list of changes"),
        (lambda f: rewrite(f, changes=[]), "three tensors"),
        (lambda f: rewrite(f, base=None), "identity of its base"),
        (lambda f: rewrite(f, vectors=[{}]), "edited vector"),
        (lambda f: rewrite(f, vectors=[3]), "edited vector"),
        (lambda f: first_change(f, strength=3.0), "identity differs"),
        (lambda f: first_change(f, strength="2"), "finite"),
        (lambda f: first_change(f, strength=True), "finite"),
        (lambda f: first_change(f, most="1"), "not a possible change"),
        (lambda f: first_change(f, most=None), "not a possible change"),
        (lambda f: first_change(f, matrix="attention"), "not a possible change"),
        (lambda f: first_change(f, layer=-1), "not a possible change"),
        (lambda f: first_change(f, layer=None), "not a possible change"),
        (lambda f: first_change(f, layer=True), "not a possible change"),
        (lambda f: first_change(f, concept=3), "not a possible change"),
        (lambda f: first_tensor(f, "0.rows", torch.tensor([3, 1])), "not a possible change"),
        (lambda f: first_tensor(f, "0.rows", torch.tensor([1, 1])), "not a possible change"),
        (lambda f: first_tensor(f, "0.rows", torch.tensor([-1, 1])), "not a possible change"),
        (lambda f: first_tensor(f, "0.rows", torch.tensor([1.0, 3.0])), "not a possible change"),
        (lambda f: first_tensor(f, "0.left", torch.randn(3, 1)), "not a possible change"),
        (lambda f: first_tensor(f, "0.left", torch.randn(2, 1).half()), "not a possible change"),
        (lambda f: first_tensor(f, "0.left", torch.full((2, 1), float("nan"))), "not finite"),
        (lambda f: first_tensor(f, "0.right", torch.zeros(1, 0)), "not a possible change"),
        (lambda f: first_tensor(f, "9.right", torch.zeros(1, 6)), "three tensors"),
        (lambda f: (f / EDIT_TENSORS).write_bytes((f / EDIT_TENSORS).read_bytes()[:-1]), "damaged|not a possible"),
    ],
)
def test_tampered_edits_are_refused(tmp_path: Path, tamper, words: str) -> None:  # type: ignore[no-untyped-def]
    save_edit(example(), tmp_path / "edit")
    tamper(tmp_path / "edit")
    with pytest.raises(BadInput, match=words) as caught:
        load_edit(tmp_path / "edit")
    assert "\n" not in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        load_edit(tmp_path / "nowhere")
