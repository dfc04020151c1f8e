"""Whole vectors or whole channels taken away: exactly those, and nothing beside them."""

from dataclasses import replace

import torch
from tiny_targets import LOCATED, NEURONS, WIDTH, edited, target_of


def test_zero_neurons_makes_located_vectors_exactly_zero() -> None:
    seen = target_of("zero-neurons")
    after = edited("zero-neurons", seen)
    assert torch.equal(after[list(LOCATED)], torch.zeros(3, 16))
    others = [row for row in range(NEURONS) if row not in LOCATED]
    assert torch.equal(after[others], seen.vectors[others])


def test_project_channel_leaves_vectors_orthogonal_to_their_own_channels_only() -> None:
    seen = target_of("project-channel")
    after = edited("project-channel", seen)
    for row in LOCATED:
        assert (seen.channels[row] @ after[row]).abs().max() < 1e-5
        # The other part of the vector, outside the channels' span, is untouched.
        basis = torch.linalg.qr(seen.channels[row].T).Q
        outside = torch.eye(WIDTH) - basis @ basis.T
        torch.testing.assert_close(outside @ after[row], outside @ seen.vectors[row], atol=1e-5, rtol=1e-5)
    others = [row for row in range(NEURONS) if row not in LOCATED]
    assert torch.equal(after[others], seen.vectors[others])


def test_projecting_a_channel_out_does_not_depend_on_how_its_span_is_written() -> None:
    seen = target_of("project-channel")
    turned = {row: torch.tensor([[2.0, 1.0], [-1.0, 3.0]]) @ vectors for row, vectors in seen.channels.items()}
    same = edited("project-channel", replace(seen, channels=turned))
    torch.testing.assert_close(same, edited("project-channel", seen), atol=1e-5, rtol=1e-5)
