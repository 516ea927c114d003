"""Muon, against torch's own and against singular values by decomposition."""

import numpy as np
import pytest
import torch

import train
from train import POLYNOMIALS, Muon, orthogonalized

SHAPES = [(16, 48), (48, 16), (16, 48), (32, 32), (16, 48)]


def matrices(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return [torch.randn(shape, dtype=dtype) for shape in SHAPES]


def walked(make, steps=4):
    """The parameters after some steps along gradients that depend on nothing else."""
    params = [torch.nn.Parameter(m) for m in matrices(0)]
    optimizer = make(params)
    for step in range(steps):
        for p, grad in zip(params, matrices(step + 1)):
            p.grad = grad
        optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in params]), optimizer


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch before 2.9")
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_muon_is_that_of_torch_in_the_same_precision(monkeypatch, dtype, off):
    start = torch.cat([m.flatten() for m in matrices(0)])
    monkeypatch.setattr(train, "POLYNOMIALS", [(3.4445, -4.7750, 2.0315)] * 5)  # torch's
    ours, _ = walked(lambda params: Muon(params, 0.02, 0.1, dtype))
    if dtype == torch.float32:  # torch knows no other precision than this
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    theirs, _ = walked(
        lambda params: torch.optim.Muon(params, 0.02, 0.1, adjust_lr_fn="match_rms_adamw")
    )
    assert torch.norm(ours - theirs) < off * torch.norm(theirs - start)


def test_the_size_of_a_batch_changes_nothing(monkeypatch):
    whole, _ = walked(lambda params: Muon(params, 0.02, 0.1))
    monkeypatch.setattr(Muon, "TOGETHER", 2 * 16 * 48)
    torch.testing.assert_close(walked(lambda params: Muon(params, 0.02, 0.1))[0], whole)


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (24, 24)])
def test_singular_values_go_through_the_polynomial_and_their_vectors_stay(shape):
    torch.manual_seed(1)
    x = torch.randn(5, *shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    large = s > 0.01
    for a, b, c in POLYNOMIALS:
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(orthogonalized(x), u @ torch.diag_embed(s) @ v)
    found = torch.linalg.svdvals(orthogonalized(x))
    assert large.sum() > 50
    assert s[large].min() > 0.729
    assert found.max() < 1.271


def test_no_other_polynomial_is_nearer_to_1():
    """By Chebyshev's criterion: four extremes of the error are equal, in turn above and below."""
    s = np.geomspace(0.01, 1, 100_000)
    for a, b, c in POLYNOMIALS:
        error = 1 - (a * s + b * s**3 + c * s**5)
        worst = abs(error).max()
        signs = np.sign(error[abs(error) > 0.995 * worst])
        assert 1 + (np.diff(signs) != 0).sum() >= 4
        s = 1 - error


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonalized(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_gradients_may_keep_their_place_in_memory():
    """As those that a CUDA graph adds to must (lib.runtime.Gradients)."""
    fresh, _ = walked(lambda params: Muon(params, 0.02, 0.1))
    params = [torch.nn.Parameter(m) for m in matrices(0)]
    optimizer = Muon(params, 0.02, 0.1)
    for p in params:
        p.grad = torch.zeros_like(p)
    places = [p.grad.data_ptr() for p in params]
    for step in range(4):
        for p, grad in zip(params, matrices(step + 1)):
            p.grad += grad
        optimizer.param_groups[0]["lr"] = 0.02 / (step + 1)
        optimizer.step()
        assert all(torch.equal(p.grad, grad) for p, grad in zip(params, matrices(step + 1)))
        optimizer.zero_grad(set_to_none=False)
    assert [p.grad.data_ptr() for p in params] == places
    assert torch.equal(torch.cat([p.detach().flatten() for p in params]), fresh)
