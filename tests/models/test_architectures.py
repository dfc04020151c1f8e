"""The table of families: every row consistent, refusals by name."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rotate_edit.errors import BadInput
from rotate_edit.models.architectures import (
    PUBLISHED_SWITCHES,
    Neuron,
    architecture_of,
    architectures,
    body_of,
    locate,
    parse_neuron,
)


@given(st.integers(0, 999_999), st.integers(0, 999_999_999), st.none() | st.integers(0, 999_999))
def test_addresses_are_read_back(layer: int, neuron: int, expert: int | None) -> None:
    address = Neuron(layer, neuron, expert)
    assert parse_neuron(str(address)) == address


def test_addresses_look_as_written() -> None:
    assert str(Neuron(3, 12)) == "L3.N12"
    assert str(Neuron(10, 123, 3)) == "L10.E3.N123"
    assert parse_neuron(" L3.N12 ") == Neuron(3, 12)


@pytest.mark.parametrize("text", ["", "L3", "N3.L1", "L-1.N2", "L1.N", "L1.N2.E3", "L1.N2 3", "L²1.N2", "l1.n2"])
def test_other_texts_are_no_addresses(text: str) -> None:
    with pytest.raises(BadInput, match="not the address"):
        parse_neuron(text)


@pytest.mark.parametrize("row", architectures(), ids=lambda row: row.family)
def test_rows_are_found_and_complete(row) -> None:  # type: ignore[no-untyped-def]
    assert architecture_of({"model_type": row.model_type, **row.when}) is row
    for places in (row.dense, *row.experts):
        assert "out" in places
        assert "in" in places
        for place in places.values():
            assert "{layer}" in place.name
            assert place.neurons in ("rows", "columns")
            assert 0 <= place.part < place.parts
    # The first way of storing experts is the one on disk, one tensor for each.
    assert all("{expert}" in place.name for place in (row.experts[0] if row.experts else {}).values())
    assert bool(row.experts) == bool(row.experts_keys)


def test_families_are_told_apart_by_their_config() -> None:
    assert architecture_of({"model_type": "opt", "do_layer_norm_before": False}).final_norm is None
    assert architecture_of({"model_type": "opt"}).final_norm == "final_layer_norm.weight"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "no model_type"),
        ({"model_type": 3}, "no model_type"),
        ({"model_type": "mamba"}, '"mamba".*row in models/architectures.py'),
        ({"model_type": "gpt_oss"}, "MXFP4"),
        ({"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}, "MXFP4"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, r"quantised \(.gptq"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, r"quantised \(.awq"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}, r"quantised \(.fp8"),
        ({"model_type": "llama", "quantization_config": {"load_in_4bit": True}}, "quantised"),
        ({"model_type": "llama", "quantization_config": "bitsandbytes"}, "quantised"),
        ({"model_type": "llama", "compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"model_type": "gemma3", "text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
    ],
)
def test_refusals_name_what_is_wrong(config: dict, words: str) -> None:
    with pytest.raises(BadInput, match=words):
        architecture_of(config)


def test_prefixes_differ_between_copies_of_a_model() -> None:
    """The Hub's GPT-2 and Bloom lack the prefix under which transformers saves them."""
    gpt2 = architecture_of({"model_type": "gpt2"})
    for prefix in ("transformer.", ""):
        names = {f"{prefix}wte.weight", f"{prefix}h.1.mlp.c_fc.weight", f"{prefix}h.1.mlp.c_proj.weight"}
        assert body_of(gpt2, names) == prefix
        place = locate(gpt2, names, "in", 1)
        assert place is not None
        assert (place.name, place.neurons) == (f"{prefix}h.1.mlp.c_fc.weight", "columns")
        assert locate(gpt2, names, "gate", 1) is None
        assert locate(gpt2, names, "in", 2) is None
        assert locate(gpt2, names, "unembedding") is None
    with pytest.raises(BadInput, match="layout is unknown"):
        body_of(gpt2, {"something.weight"})


def test_experts_are_found_on_disk_and_stacked() -> None:
    mixtral = architecture_of({"model_type": "mixtral"})
    disk = {"model.embed_tokens.weight", "model.layers.0.block_sparse_moe.experts.3.w3.weight"}
    live = {"model.embed_tokens.weight", "model.layers.0.mlp.experts.gate_up_proj"}
    on_disk, stacked = locate(mixtral, disk, "in", 0, 3), locate(mixtral, live, "in", 0, 3)
    assert on_disk is not None
    assert not on_disk.stacked
    assert stacked is not None
    assert (stacked.stacked, stacked.part, stacked.parts) == (True, 1, 2)
    assert locate(mixtral, disk, "in", 0, 2) is None
    assert locate(mixtral, disk, "in", 0) is None


def test_only_the_published_model_has_a_published_switch() -> None:
    (switch,) = PUBLISHED_SWITCHES
    llama31 = {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "max_position_embeddings": 131072,
        "vocab_size": 128256,
    }
    assert switch.layer == 13
    assert switch.describes(llama31)
    assert not switch.describes(llama31 | {"max_position_embeddings": 8192})
    assert not switch.describes(llama31 | {"num_hidden_layers": 16})
