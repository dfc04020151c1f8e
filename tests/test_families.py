"""Every family, as files, live and as an adapter: edited everywhere, written, loaded, reverted."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES, random_edit, save_tiny

from rotate_edit.channels.locate import ConceptGroup, sites_of
from rotate_edit.edits.apply import applied
from rotate_edit.edits.build import build_edits
from rotate_edit.edits.edit import Edit, MatrixChange
from rotate_edit.edits.edit_file import load_edit, save_edit
from rotate_edit.edits.material import BuildSettings, Concept, Material
from rotate_edit.edits.methods import make_method
from rotate_edit.edits.writing.adapter import write_adapter
from rotate_edit.edits.writing.patch import revert, verify, write_checkpoint
from rotate_edit.edits.writing.rewrite import plan_edit
from rotate_edit.errors import BadInput
from rotate_edit.models.batches import batched
from rotate_edit.models.checkpoint import Checkpoint, identity, load_model, open_checkpoint, read_matrix
from rotate_edit.models.layout import neuron_rows
from rotate_edit.models.parameters import live_parameter
from rotate_edit.vocabulary.concept import TokenSet

CASES = [(family, tied) for family in FAMILIES for tied in (False, True)]
TOKENS = torch.tensor([[3, 17, 40, 5, 95, 1, 60, 33]])


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint folder, read by safetensors itself."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def logits(model: torch.nn.Module) -> torch.Tensor:
    if model.dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        # torch's grouped product of stacked experts has no float64.
        model.set_experts_implementation("eager")
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def editable_tables(checkpoint: Checkpoint) -> bool:
    """OPT-350m's table is narrower than its residual stream, so its rows are no edit's target."""
    return checkpoint.stored[checkpoint.place("embedding").name].shape[1] == checkpoint.hidden_size


def oracle(checkpoint: Checkpoint, edit: Edit, base: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The edited tensors in float64, unrounded: W[rows] += strength * left @ right, change by change."""
    result = {name: tensor.double().clone() for name, tensor in base.items()}
    for change in edit.changes:
        names = [checkpoint.place(change.matrix, change.layer, change.expert)]
        if checkpoint.tied and change.matrix in ("embedding", "unembedding"):
            names = [checkpoint.place("embedding")]
        for place in names:
            rows = neuron_rows(result[place.name], place, change.expert)
            rows[change.rows] += change.strength * (change.left.double() @ change.right.double())
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("family", "tied"), CASES)
def test_file_edit_is_exact_and_undone(family: str, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_tiny(family, tmp_path / "base", tied=tied, dtype=dtype)
    assert len(list(folder.glob("*.safetensors"))) > 1
    checkpoint = open_checkpoint(folder)
    assert checkpoint.tied == tied
    edit = random_edit(checkpoint, tables=editable_tables(checkpoint))
    save_edit(edit, tmp_path / "edit")
    patch = write_checkpoint(checkpoint, edit, tmp_path / "out", edit_folder=tmp_path / "edit")

    base, patched = stored_tensors(folder), stored_tensors(tmp_path / "out")
    exact = oracle(checkpoint, edit, base)
    touched = set(plan_edit(checkpoint, edit))
    assert touched == {tensor.name for tensor in patch.tensors}
    elements = wrong = 0
    for name, tensor in patched.items():
        if name not in touched:
            assert torch.equal(tensor, base[name])
            continue
        assert not torch.equal(tensor, base[name])
        # The test's own single rounding: the neighbour of the float32 rounding that lies nearest the exact value.
        nearest = exact[name].to(dtype)
        elements += tensor.numel()
        wrong += int((tensor != nearest).sum())
        spacing = torch.finfo(dtype).eps * exact[name].abs().clamp_min(torch.finfo(dtype).tiny)
        assert ((tensor.double() - exact[name]).abs() <= spacing / 2 * 1.0001).all()
    assert wrong <= elements / 1000

    out = open_checkpoint(tmp_path / "out")
    assert verify(out, edit, checkpoint).problems == ()
    assert verify(out, edit, edit_folder=tmp_path / "edit").problems == ()
    live = load_model(checkpoint, dtype=dtype)
    before = logits(live)
    with applied(live, edit):
        edited = logits(live)
    assert torch.equal(logits(live), before)
    assert not torch.allclose(edited, before)
    assert torch.equal(logits(load_model(out, dtype=dtype)), edited)

    revert(out, tmp_path / "edit", tmp_path / "back")
    for file in folder.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_adapter_is_the_same_edit(family: str, tied: bool, tmp_path: Path) -> None:
    from peft import PeftModel

    folder = save_tiny(family, tmp_path / "base", tied=tied, dtype=torch.float32, shard="1GB")
    checkpoint = open_checkpoint(folder)
    edit = random_edit(checkpoint, tables=editable_tables(checkpoint), biases=False)
    if family == "qwen3_moe-dense-layer":
        with pytest.raises(BadInput, match="dense layer"):
            write_adapter(checkpoint, edit, tmp_path / "refused")
        edit = Edit(edit.method, tuple(change for change in edit.changes if change.layer != 0), base=edit.base)
    if tied and family == "gptj":
        with pytest.raises(BadInput, match="leaves out the bias of lm_head"):
            write_adapter(checkpoint, edit, tmp_path / "refused")
        edit = Edit(edit.method, tuple(change for change in edit.changes if change.layer is not None), base=edit.base)
    adapter = write_adapter(checkpoint, edit, tmp_path / "adapter")
    assert set(adapter.ranks.values()) <= {1, 2, 3}
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        live = load_model(checkpoint, dtype=dtype)
        before = logits(live)
        with applied(live, edit):
            edited = logits(live)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(load_model(checkpoint, dtype=dtype), tmp_path / "adapter").eval()
        found = logits(adapted)
        assert (edited - before).abs().max() > 1e-3 * before.abs().max()
        assert (found - edited).abs().max() <= bound * edited.abs().max()
        merged = logits(adapted.merge_and_unload())
        assert (merged - edited).abs().max() <= bound * edited.abs().max()


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "gemma2", "olmoe"])
def test_adapter_on_a_bfloat16_base(family: str, tmp_path: Path, record_property) -> None:  # type: ignore[no-untyped-def]
    """Merged in float32 it is the float32 edit; unmerged in bfloat16 it differs by the dtype's own noise."""
    from peft import PeftModel

    checkpoint = open_checkpoint(save_tiny(family, tmp_path / "base", tied=False, dtype=torch.bfloat16, shard="1GB"))
    edit = random_edit(checkpoint, biases=False, strength=1.0)
    write_adapter(checkpoint, edit, tmp_path / "adapter")
    write_checkpoint(checkpoint, edit, tmp_path / "out")
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        live = load_model(checkpoint, dtype=dtype)
        with applied(live, edit):
            edited = logits(live).float()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(load_model(checkpoint, dtype=dtype), tmp_path / "adapter").eval()
        merged = logits(adapted.merge_and_unload() if dtype == torch.float32 else adapted).float()
        found[dtype] = float((merged - edited).abs().max() / edited.abs().max())
    record_property("unmerged bfloat16 difference over the largest logit", found[torch.bfloat16])
    print(f"{family}: adapter unmerged on a bfloat16 base differs by {found[torch.bfloat16]:.1e} of the largest logit")
    assert found[torch.float32] <= 1e-5
    assert found[torch.bfloat16] <= 0.1


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.writer])
def test_neurons_are_what_the_module_says(family: str, tmp_path: Path) -> None:
    """Changing what neurons 5 and 7 read changes their activations alone; what they write, the output by theirs."""
    folder = save_tiny(family, tmp_path / "base", tied=False, dtype=torch.float32, shard="1GB")
    checkpoint = open_checkpoint(folder)
    live = load_model(checkpoint, dtype=torch.float64)
    writer = live.get_submodule(FAMILIES[family].writer.format(1))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    writer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    logits(live)
    rows = torch.tensor([5, 7])
    for matrix in checkpoint.matrices:
        parameter, place = live_parameter(live, matrix, 1)
        assert torch.equal(neuron_rows(parameter, place), read_matrix(checkpoint, 1, matrix).double())
        left, right = torch.randn(2, 2), torch.randn(2, checkpoint.hidden_size)
        edit = Edit("test", (MatrixChange(matrix, 1, None, rows, left, right, -2.5, "test"),))
        with applied(live, edit):
            logits(live)
        (activations, written), (new_activations, new_written) = seen[0], seen.pop()
        activations, new_activations = activations.flatten(0, -2), new_activations.flatten(0, -2)
        changed = (activations != new_activations).any(0).nonzero().flatten()
        if matrix == "out":
            assert len(changed) == 0
            delta = activations[:, rows] @ (-2.5 * (left.double() @ right.double()))
            difference = (new_written - written).reshape(-1, checkpoint.hidden_size)
            assert torch.allclose(difference, delta, atol=1e-12)
        else:
            assert set(changed.tolist()) <= set(rows.tolist())
            assert len(changed) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_in_is_the_factor_that_is_not_gated(family: str, tmp_path: Path) -> None:
    """Turning every `in` vector round turns the sign of a gated layer's output; turning `gate` round does not."""
    folder = save_tiny(family, tmp_path / "base", tied=False, dtype=torch.float32, shard="1GB")
    checkpoint = open_checkpoint(folder)
    if "gate" not in checkpoint.matrices or checkpoint.has("out_bias", 1):
        assert family in ("gpt2", "gpt_neox", "opt", "opt-350m", "gptj", "bloom", "llama-biases")
        return
    live = load_model(checkpoint, dtype=torch.float64)
    name = next(name for name, _ in live.named_modules() if name.endswith("layers.1.mlp") and "vision" not in name)
    seen: list[torch.Tensor] = []
    live.get_submodule(name).register_forward_hook(lambda module, inputs, output: seen.append(output))
    logits(live)
    width = torch.eye(checkpoint.hidden_size)
    for matrix, same in (("in", True), ("gate", False)):
        experts = checkpoint.experts_in(1)
        changes = []
        for expert in (None,) if experts is None else range(experts):
            vectors = read_matrix(checkpoint, 1, matrix, expert)
            changes.append(MatrixChange(matrix, 1, expert, torch.arange(len(vectors)), vectors, width, -2.0, "test"))
        with applied(live, Edit("test", tuple(changes))):
            logits(live)
        assert torch.allclose(seen.pop(), -seen[0], atol=1e-9) == same


def material_of(checkpoint: Checkpoint) -> Material:
    """Edit methods' material of a tiny model, whose concept is three tokens and whose texts are rows of tokens."""
    ids = torch.tensor([5, 17, 40])
    group = ConceptGroup(TokenSet("c", ids, {"c": (5, 17, 40)}, (), ()), 0, ids, {}, {}, (), ())
    about = batched([TOKENS[0].tolist(), [8, 17, 40, 9]], 96)
    return Material(
        checkpoint=checkpoint,
        tokenizer=None,
        untrained=torch.zeros(96, dtype=torch.bool),
        sites=tuple(sites_of(checkpoint, checkpoint.matrices)),
        concepts=(Concept((group,)),),
        settings=BuildSettings(),
        load=lambda: load_model(checkpoint, dtype=torch.float32),
        texts=lambda name: (about, batched([[3, 8, 60, 33, 9, 2], [7, 70, 71]], 96)),
    )


@pytest.mark.parametrize("method", ["remove-concept", "rank-one-read"])
@pytest.mark.parametrize("family", FAMILIES)
def test_edits_from_text_are_written_adapted_and_undone(family: str, method: str, tmp_path: Path) -> None:
    """Methods that read gradients and activations of every family's own modules."""
    from peft import PeftModel

    folder = save_tiny(family, tmp_path / "base", tied=False, dtype=torch.float32, shard="1GB")
    checkpoint = open_checkpoint(folder)
    settings = {} if editable_tables(checkpoint) or method != "remove-concept" else {"rows": 0.0}
    seen = material_of(checkpoint)
    if method == "rank-one-read" and checkpoint.experts_in(0) is not None:
        with pytest.raises(BadInput, match="mixtures of experts"):
            build_edits(seen, [make_method(method, settings)])
        return
    edit = build_edits(seen, [make_method(method, settings)])[method].at(20.0 if method == "remove-concept" else 1.0)
    edit = replace(edit, base=identity(checkpoint))
    assert edit.does_something
    save_edit(edit, tmp_path / "edit")
    assert load_edit(tmp_path / "edit").notes == edit.notes
    write_checkpoint(checkpoint, edit, tmp_path / "out", edit_folder=tmp_path / "edit")
    out = open_checkpoint(tmp_path / "out")
    assert verify(out, edit, checkpoint).problems == ()
    live = load_model(checkpoint, dtype=torch.float32)
    before = logits(live)
    with applied(live, edit):
        edited = logits(live)
    assert (edited - before).abs().max() > 1e-4 * before.abs().max()
    assert torch.equal(logits(load_model(out, dtype=torch.float32)), edited)
    if family != "qwen3_moe-dense-layer":
        write_adapter(checkpoint, edit, tmp_path / "adapter")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = PeftModel.from_pretrained(load_model(checkpoint, dtype=torch.float32), tmp_path / "adapter")
        assert (logits(adapted.eval()) - edited).abs().max() <= 1e-5 * edited.abs().max()
    revert(out, tmp_path / "edit", tmp_path / "back")
    for file in folder.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
