"""The Triton kernels against the plain tensor code: through Triton's interpreter, and on a GPU where there is one."""

import os
import subprocess
import sys

import pytest
import torch
from places import TESTS

# On Linux the test extra brings Triton, so that its absence is an error there and these tests never skip unseen.
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux alone")

SCRIPT = """
import sys
import torch
from planted import planted
from rotate_edit.channels import kernels
from rotate_edit.channels.great_circle import apply_polynomial, mixed_moments
from rotate_edit.channels.solver import SolverSettings, find_channels
from rotate_edit.vocabulary.tokens import token_weights

torch.set_num_threads(1)
device = sys.argv[1]
for seed, tokens in enumerate([7, 1024, 2500, 17_000]):
    generator = torch.Generator().manual_seed(seed)
    room = torch.randn(2, 5, tokens, generator=generator).to(device)
    a, b = room[0, :3].clone(), room[1, :3].clone()
    weights = torch.rand(tokens, generator=generator).to(device)
    exact = mixed_moments(a.double(), b.double(), weights.double())
    fast = kernels.mixed_sums(a, b, weights)
    scale = mixed_moments(a.double().abs(), b.double().abs(), weights.double())
    assert float(((fast - exact).abs() / scale).max()) < 1e-5, (tokens, fast, exact)
    angle = torch.rand(3, 1, generator=generator).to(device)
    polynomial = torch.randn(3, 4, generator=generator).to(device)
    turned = torch.cos(angle) * a + torch.sin(angle) * b
    slope = apply_polynomial(turned, polynomial, torch.empty_like(a)) * weights
    kernels.turn_and_slope(a, b, weights, torch.cos(angle), torch.sin(angle), polynomial)
    assert torch.allclose(a, turned, rtol=1e-5, atol=1e-5)
    assert torch.allclose(b, slope, rtol=1e-4, atol=1e-4)

truth = planted(neurons=2, size=16, vocabulary=300, clusters=6)
neurons, unembedding = truth.neurons.to(device), truth.unembedding.to(device)
weights = token_weights(unembedding)
weights[::7] = 0.0
for moments in ("weighted", "zeroed"):
    plain, fused = (
        find_channels(
            neurons, unembedding, weights, SolverSettings(channels=2, moments=moments, kernels=kernels, iterations=8)
        )
        for kernels in ("torch", "triton")
    )
    assert torch.allclose(plain.loss, fused.loss, atol=1e-4), (plain.loss, fused.loss)
    assert bool((plain.token_ids == fused.token_ids).float().mean() > 0.9)
print("agree")
"""


def agree(device: str, **environment: str) -> None:
    """Run the comparison in a process of its own: Triton decides when it is imported whether it interprets."""
    tests = TESTS
    here = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])} | environment
    done = subprocess.run([sys.executable, "-c", SCRIPT, device], capture_output=True, text=True, env=here, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "agree\n"


def test_kernels_agree_with_the_plain_code_through_the_interpreter() -> None:
    agree("cpu", TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_agree_with_the_plain_code_on_a_gpu() -> None:
    agree("cuda")
