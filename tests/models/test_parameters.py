"""The parameters of a loaded model are found by the matrix that they hold, or the model is refused."""

from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, save_tiny

from rotate_edit.errors import BadInput
from rotate_edit.models.checkpoint import load_model, open_checkpoint, read_matrix
from rotate_edit.models.layout import neuron_rows
from rotate_edit.models.parameters import live_parameter


def test_models_that_cannot_be_edited_live(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no config"):
        live_parameter(torch.nn.Linear(2, 2), "out", 0)
    checkpoint = open_checkpoint(save_tiny("llama", tmp_path / "m", tied=False, dtype=torch.float32))
    with pytest.raises(BadInput, match="not held in memory"):
        live_parameter(load_model(checkpoint).to("meta"), "out", 0)
    quantised = load_model(checkpoint)
    parameter, _ = live_parameter(quantised, "out", 0)
    parameter.requires_grad = False
    parameter.data = parameter.data.to(torch.int8)
    with pytest.raises(BadInput, match="floating-point"):
        live_parameter(quantised, "out", 0)


def test_what_a_model_does_not_have_is_named() -> None:
    model = FAMILIES["llama"].build(tied=False)
    for matrix, layer, expert, words in (
        ("out", 2, None, 'no matrix "out" in layer 2'),
        ("out", 1, 0, "in layer 1, expert 0"),
        ("out_bias", 1, None, '"out_bias" in layer 1'),
    ):
        with pytest.raises(BadInput, match=words):
            live_parameter(model, matrix, layer, expert)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_tied_head_is_the_embedding(family: str, tied: bool) -> None:
    model = FAMILIES[family].build(tied=tied)
    head, embedding = (live_parameter(model, name)[0] for name in ("unembedding", "embedding"))
    assert embedding is model.get_input_embeddings().weight
    assert (head is embedding) == tied
    assert head is model.get_output_embeddings().weight


@pytest.mark.parametrize("family", ["phi3", "gpt2", "mixtral"])
def test_a_parameter_holds_what_the_file_says(family: str, tmp_path: Path) -> None:
    """Fused, turned round and stacked matrices: the rows of the view are the neurons of the checkpoint."""
    checkpoint = open_checkpoint(save_tiny(family, tmp_path / "m", tied=False, dtype=torch.float32))
    model = load_model(checkpoint)
    expert = None if checkpoint.experts_in(1) is None else 2
    for matrix in checkpoint.matrices:
        parameter, place = live_parameter(model, matrix, 1, expert)
        rows = neuron_rows(parameter.data, place, expert)
        assert torch.equal(rows, read_matrix(checkpoint, 1, matrix, expert))
        # The view is of the parameter itself.
        rows[3] = 7.0
        assert bool((neuron_rows(live_parameter(model, matrix, 1, expert)[0].data, place, expert)[3] == 7).all())
