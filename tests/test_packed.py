"""packed.py: the same function by other kernels; in int8 the formula, to the bit beside any neighbours."""

from dataclasses import replace

import pytest
import torch
import torch.nn as nn

from lib.config import UserError
from model import KVCache, count_parameters
from sample import Engine, Int8Matrix, Request, choose_dtype, generate, pack
from tests.test_engine import BASE, CROWD, GREEDY, PROMPTS, answer, build

SHAPES = [
    replace(BASE, tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    for tied, kv_heads in [(True, 4), (False, 2), (True, 1)]
]
IDS = torch.tensor([[1, *range(5, 40)], [1, *range(300, 335)]])


@torch.no_grad()
@pytest.mark.parametrize("cfg", SHAPES)
def test_packed_computes_the_same(cfg):
    expected, model = build(cfg)(IDS), pack(build(cfg))
    torch.testing.assert_close(model(IDS), expected, atol=1e-4, rtol=1e-4)
    cache = KVCache(cfg, 2, 40)
    parts = [model(part, cache=cache) for part in IDS.split([20, 1, 1, 14], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-4, rtol=1e-4)
    documents = torch.arange(36)[None] // torch.tensor([[11], [36]])
    expected = build(cfg)(IDS, documents=documents)
    torch.testing.assert_close(model(IDS, documents=documents), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("cfg", SHAPES)
def test_packed_in_16_bit_is_no_rougher(cfg):
    exact = build(cfg)(IDS)
    plain = (build(cfg).bfloat16()(IDS).float() - exact).norm()
    cache, model = KVCache(cfg, 2, 40, dtype=torch.bfloat16), pack(build(cfg).bfloat16())
    parts = [model(part, cache=cache) for part in IDS.split([20, 1, 15], dim=1)]
    assert parts[0].dtype == torch.bfloat16
    assert 0 < (torch.cat(parts, dim=1).float() - exact).norm() < 1.2 * plain < 0.05 * exact.norm()


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("cfg", SHAPES)
def test_no_parameter_is_lost_or_doubled(cfg, int8):
    model = pack(build(cfg), int8=int8)
    assert sum(p.numel() for p in model.parameters()) == count_parameters(cfg)["total"]
    if int8:
        norms = (2 * cfg.n_layer + 1) * cfg.d_model
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        assert size == count_parameters(cfg)["total"] + 3 * norms


def by_the_formula(weight, x):
    """What Int8Matrix is to compute, in float64: both sides rounded to 127 steps of their largest value."""
    weight, x = weight.double(), x.double()
    step, unit = (side.abs().amax(dim=1, keepdim=True) / 127 for side in (weight, x))
    return ((x / unit).round() * unit) @ ((weight / step).round() * step).T


def spread(*shape):
    """Random numbers whose rows differ in size by orders of magnitude."""
    return torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]


@torch.no_grad()
def test_int8_by_the_formula():
    torch.manual_seed(0)
    layers, x = [nn.Linear(96, n, bias=False) for n in (64, 32)], spread(5, 96)
    for layer in layers:
        layer.weight.copy_(spread(*layer.weight.shape))
    expected = by_the_formula(torch.cat([layer.weight for layer in layers]), x)
    torch.testing.assert_close(Int8Matrix(*layers)(x).double(), expected, atol=1e-6, rtol=1e-4)


@torch.no_grad()
def test_int8_of_nothing_is_nothing():
    layer = nn.Linear(8, 4, bias=False)
    layer.weight[2] = 0
    y = Int8Matrix(layer)(torch.stack([torch.zeros(8), torch.ones(8)]))
    assert y[0].tolist() == [0] * 4
    assert y[1, 2] == 0
    assert y.isfinite().all()


@torch.no_grad()
def test_int8_rows_do_not_see_each_other():
    torch.manual_seed(0)
    layer, x = Int8Matrix(nn.Linear(256, 1000, bias=False)), spread(16, 256)
    together = layer(x)
    for row in range(16):
        assert torch.equal(layer(x[row : row + 1])[0], together[row])


@torch.no_grad()
@pytest.mark.parametrize("cfg", SHAPES)
def test_an_int8_model_is_near(cfg):
    expected, logits = build(cfg)(IDS), pack(build(cfg), int8=True)(IDS)
    assert (logits - expected).norm() < 0.06 * expected.norm()


@pytest.mark.parametrize("int8", [False, True])
def test_a_row_in_a_crowd_equals_the_row_alone(int8):
    model = pack(build(), int8=int8)
    crowd = [Request(prompt, 14, sampling) for prompt, sampling in zip(PROMPTS, CROWD)]
    list(generate(model, crowd, Engine(model, len(crowd), chunk=6)))
    for request in crowd:
        assert request.ids == answer(model, request.prompt, request.sampling, 14)
    if not int8:
        assert answer(model, PROMPTS[6], GREEDY, 14) == answer(build(), PROMPTS[6], GREEDY, 14)


def test_int8_is_for_a_cpu():
    assert choose_dtype("int8", torch.device("cpu")) == torch.float32
    with pytest.raises(UserError, match="int8 is for a CPU"):
        choose_dtype("int8", torch.device("cuda"))
