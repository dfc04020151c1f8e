"""Keys: moments equal to a direct computation, fits of some neurons among many."""

import pytest
import torch
from tiny_models import FAMILIES
from tiny_words import WORDS, ids, tiny_model, tiny_tokenizer

from rotate_edit.edits.apply import applied
from rotate_edit.edits.edit import Edit, MatrixChange
from rotate_edit.edits.key_moments import even_reading, fit_keys, key_moments, last_moments
from rotate_edit.models import batches
from rotate_edit.models.output_head import output_head_of, positions

TEXTS = ["the dog ran under a big dog", "a cat saw the small dog", "the bird sat on the mat", "it was big"]


def by_hand(model, passages):
    """Activations of both layers, the residual stream's size and next-word chances at every real position."""
    kept = {}
    hooks = [
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, seen, place=place: kept.update({place: seen[0]}))
        for place, layer in enumerate(model.model.layers)
    ]
    rows, sizes, chances = [], [], []
    for batch, lengths in zip(passages.batches, passages.lengths):
        for row, length in zip(batch, lengths):
            with torch.no_grad():
                output = model.model(row[None, :length])
                logits = model.lm_head(output.last_hidden_state)[0]
                before = {}
                hook = model.model.norm.register_forward_pre_hook(
                    lambda _, seen, before=before: before.update(x=seen[0])
                )
                model.model(row[None, :length])
                hook.remove()
            rows.append(torch.cat([kept[0][0], kept[1][0]], dim=1))
            sizes.append(before["x"][0].square().mean(1).sqrt())
            chances.append(logits.softmax(-1))
    for hook in hooks:
        hook.remove()
    return torch.cat(rows).double(), torch.cat(sizes).double(), torch.cat(chances).double()


def test_moments_equal_those_of_a_direct_computation():
    model = tiny_model(1)
    passages = batches.tokenise(tiny_tokenizer(), TEXTS, vocabulary_size=len(WORDS))
    rows = {0: torch.tensor([2, 5]), 1: torch.arange(24)}
    groups = [ids("dog"), ids("cat", "bird")]
    moments = key_moments(model, passages, rows, groups)
    neurons, sizes, chances = by_hand(model, passages)
    wanted = neurons[:, [2, 5, *range(24, 48)]]
    torch.testing.assert_close(moments.second, wanted.T @ wanted / len(wanted), rtol=1e-4, atol=1e-6)
    for place, group in enumerate(groups):
        weight = chances[:, group].sum(1)
        mean = (weight[:, None] * wanted).sum(0) / weight.sum()
        torch.testing.assert_close(moments.means[place], mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moments.size[place], (weight * sizes).sum() / weight.sum(), rtol=1e-4, atol=1e-6)


def test_moments_of_positions_that_are_read_already_are_those_of_a_pass():
    model = tiny_model(0)
    texts = batches.tokenise(tiny_tokenizer(), TEXTS, vocabulary_size=len(WORDS))
    rows = {1: torch.arange(model.config.intermediate_size)}
    groups, head = [ids("dog"), ids("cat")], model.lm_head.weight.detach()
    read = key_moments(model, texts, rows, groups, head)
    again = last_moments(positions(model, texts), output_head_of(model), 1, groups, head)
    assert torch.equal(again.rows[1], read.rows[1])
    for one, other in ((again.second, read.second), (again.means, read.means), (again.size, read.size)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(again.metric, read.metric, rtol=1e-5, atol=1e-7)


def test_the_metric_is_twice_the_divergence_of_a_small_step():
    model = tiny_model(1)
    passages = batches.tokenise(tiny_tokenizer(), TEXTS, vocabulary_size=len(WORDS))
    head = model.lm_head.weight.detach()
    moments = key_moments(model, passages, {1: torch.arange(24)}, [ids("dog")], head)
    assert key_moments(model, passages, {1: torch.arange(24)}, [ids("dog")]).metric is None
    _, sizes, chances = by_hand(model, passages)
    step = torch.randn(head.shape[1], generator=torch.Generator().manual_seed(0)).double()
    moved = (head.double() @ step)[None] / sizes[:, None]
    small, chances = 1e-5, chances / chances.sum(1, keepdim=True)
    after = (chances.log() + small * moved).log_softmax(1)
    divergence = (chances * (chances.log() - after)).sum(1).mean()
    assert float(2 * divergence / small**2) == pytest.approx(float(step @ moments.metric @ step), rel=1e-3)
    torch.testing.assert_close(moments.metric, moments.metric.T, rtol=1e-6, atol=1e-9)
    assert torch.linalg.eigvalsh(moments.metric).min() > -1e-6 * torch.linalg.eigvalsh(moments.metric).max()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_logit_is_raised_by_one_nat_on_average_and_no_other_is_moved(family: str) -> None:
    torch.manual_seed(3)
    model = FAMILIES[family].build(tied=False).float().eval()
    # What a cap does to logits is not linear.
    model.config.get_text_config().final_logit_softcapping = None
    texts = batches.batched([[5, 9, 2, 7, 30, 11], [8, 3, 4]], 96)
    reading = even_reading(model, texts)
    left = -torch.ones(2, 1)
    change = MatrixChange("unembedding", None, None, torch.tensor([6, 40]), left, reading[None], -1.0, "test")

    def logits() -> torch.Tensor:
        with torch.no_grad():
            rows = [model(input_ids=batch).logits for batch in texts.batches]
        real = [batches.real_positions(*pair) for pair in zip(texts.batches, texts.lengths)]
        return torch.cat([row[keep] for row, keep in zip(rows, real)])

    before = logits()
    with applied(model, Edit("token-logits", (change,))):
        moved = logits() - before
    others = torch.ones(96, dtype=torch.bool)
    others[[6, 40]] = False
    assert float(moved[:, others].abs().max()) == 0
    torch.testing.assert_close(moved[:, [6, 40]].mean(0), torch.ones(2), rtol=1e-4, atol=1e-4)


def test_where_the_head_reads_a_constant_every_position_is_raised_alike() -> None:
    model = tiny_model(0)
    texts = batches.tokenise(tiny_tokenizer(), TEXTS, vocabulary_size=len(WORDS))
    # A norm with a bias would do this: the last feature that the head reads is 1 everywhere.
    hook = model.lm_head.register_forward_pre_hook(
        lambda _, seen: (torch.cat([seen[0][..., :-1], torch.ones_like(seen[0][..., -1:])], dim=-1),)
    )
    reading = even_reading(model, texts, ridge=1e-12)
    hook.remove()
    torch.testing.assert_close(reading, torch.eye(16)[-1], rtol=0, atol=1e-5)


def test_a_key_on_some_neurons_is_the_fit_of_those_alone():
    model = tiny_model(2)
    passages = batches.tokenise(tiny_tokenizer(), TEXTS, vocabulary_size=len(WORDS))
    every = key_moments(model, passages, {0: torch.arange(24), 1: torch.arange(24)}, [ids("dog")])
    some = {0: torch.tensor([1, 7]), 1: torch.tensor([0, 3, 23])}
    alone = key_moments(model, passages, some, [ids("dog")])
    fitted, own = fit_keys(every, 0, some, ridge=0.03), fit_keys(alone, 0, some, ridge=0.03)
    assert fitted.keys() == {0, 1}
    for layer, rows in some.items():
        assert torch.equal(fitted[layer][0], rows)
        torch.testing.assert_close(fitted[layer][1], own[layer][1], rtol=1e-5, atol=1e-7)
    # Together they are 1 nat a unit of the residual stream's size where the group comes next.
    means = alone.means[0].split([2, 3])
    total = sum(float(mean @ own[layer][1].double()) for mean, layer in zip(means, own))
    assert total == pytest.approx(float(alone.size[0]), rel=1e-5)
    assert fit_keys(every, 0, {0: torch.tensor([], dtype=torch.int64)}, ridge=0.03) == {}
