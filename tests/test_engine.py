"""The engine of sample.py: neither cache, kernels nor neighbours change a token; the rules are
transformers'; the text is whole."""

import random
import re
from dataclasses import fields, replace
from unittest.mock import Mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import sample
from lib.config import UserError
from model import KVCache, Llama, ModelConfig, save_model
from sample import (
    Branches,
    Engine,
    Int8Matrix,
    Reply,
    Request,
    Sampling,
    fuse,
    generate,
    open_model,
)
from tests import ROOT

BASE = ModelConfig(
    n_layer=2,
    d_model=32,
    n_head=4,
    num_key_value_heads=2,
    d_ff=64,
    vocab_size=384,
    sequence_length=48,
    initializer_range=0.3,  # lively: near-ties between tokens would test rounding, not us
)
SHAPES = [
    replace(BASE, tie_word_embeddings=tied, num_key_value_heads=kv_heads)
    for tied, kv_heads in [(True, 4), (False, 2), (True, 1)]
] + [replace(BASE, qk_norm=True, head_dim=12), replace(BASE, qkv_bias=True)]
GREEDY = Sampling(temperature=0)
EVERY_RULE = Sampling(
    temperature=1.5, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.3, seed=7
)
PLAIN = Sampling(temperature=1.0, top_k=0, top_p=1.0, seed=3)
CROWD = [
    GREEDY,
    EVERY_RULE,
    PLAIN,
    replace(PLAIN, top_p=0.7),
    replace(PLAIN, min_p=0.1, seed=2**64 - 1),
    replace(GREEDY, repetition_penalty=2.0),
    replace(EVERY_RULE, seed=8),
    Sampling(seed=0),
]
PROMPTS = [
    [1] + [(7 * row + 3 * i) % 384 for i in range(length)]
    for row, length in enumerate([0, 6, 3, 11, 6, 1, 20, 2])
]
IDS = torch.tensor([[1, *range(5, 40)], [1, *range(300, 335)]])
graphs = pytest.mark.parametrize("graphs", [False, True], ids=["plain", "fixed-shapes"])


def build(cfg=BASE):
    torch.manual_seed(0)
    return Llama(cfg).eval()


@pytest.fixture(scope="module")
def model():
    return build()


def answer(model, prompt, sampling=GREEDY, count=10, engine=None, **kw):
    """The ids of one request alone."""
    request = Request(list(prompt), count, sampling, **kw)
    list(generate(model, [request], engine))
    return request.ids


def columns_of(table):
    return dict(zip(sample.RULES, table.split(1, dim=1)))


def next_id(logits, sampling, history, uniform):
    """`next_token` of one row without an engine."""
    kernels = Branches.of([sampling], len(logits))
    table = columns_of(sample.rule_table([sampling], len(logits)))
    uniform = torch.as_tensor(uniform, dtype=torch.float32).view(1, 1)
    return sample.next_token(logits[None], kernels, table, torch.tensor([history]), uniform).item()


@torch.no_grad()
def uncached(model, prompt, sampling, count=10):
    """The oracle: the whole text through the model for every token."""
    ids = list(prompt)
    for uniform in sample.uniforms(sampling.seed, count):
        ids.append(next_id(model(torch.tensor([ids]))[0, -1], sampling, ids, uniform))
    return ids[len(prompt) :]


def finish_all(engine, rows):
    while any(row.finish is None for row in rows):
        list(engine.advance())


# ---- the cache


@pytest.mark.parametrize(
    "sampling", [GREEDY, EVERY_RULE, PLAIN], ids=["greedy", "every-rule", "plain"]
)
@pytest.mark.parametrize("length", [1, 7])
@pytest.mark.parametrize(
    ("tied", "kv_heads", "backend"),
    [(True, 4, "sdpa"), (False, 2, "sdpa"), (True, 1, "math"), (False, 4, "math")],
)
def test_cached_equals_uncached(sampling, length, tied, kv_heads, backend):
    model = build(replace(BASE, tie_word_embeddings=tied, num_key_value_heads=kv_heads))
    model.use_attention(backend)
    prompt = PROMPTS[3][:length]
    assert answer(model, prompt, sampling) == uncached(model, prompt, sampling)


# ---- neighbours


@graphs
@pytest.mark.parametrize("kernels", ["as-trained", "fused", "packed", "int8"])
def test_a_row_in_a_crowd_equals_the_row_alone(model, kernels, graphs, monkeypatch):
    if kernels == "packed":  # all of them, else none is large enough
        monkeypatch.setattr("sample.Matrix.PACKED", 1)
    if kernels != "as-trained":
        model = fuse(build(), int8=kernels == "int8")
    crowd = [Request(prompt, 14, sampling) for prompt, sampling in zip(PROMPTS, CROWD)]
    crowd += [Request(PROMPTS[1], 14, replace(EVERY_RULE, seed=seed)) for seed in (4, 5)]
    steps = list(generate(model, crowd, Engine(model, len(crowd), graphs=graphs, chunk=6)))
    assert all(len(step) == len(crowd) for step in steps)
    for row, request in enumerate(crowd):
        assert request.ids == answer(model, request.prompt, request.sampling, 14)
        assert request.ids == [step[row] for step in steps if step[row] is not None]
    if kernels in ("fused", "packed"):
        assert crowd[0].ids == answer(build(), PROMPTS[0], GREEDY, 14)


@graphs
@pytest.mark.parametrize("chunk", [4, 512])
def test_a_crowd_of_16_that_comes_and_goes(model, graphs, chunk):
    rng = random.Random(chunk + graphs)
    waiting = [
        Request([1, *rng.choices(range(384), k=rng.randint(0, 30))], rng.randint(1, 16), sampling)
        for sampling in CROWD * 4
    ]
    rows, engine = list(waiting), Engine(model, 16, graphs=graphs, chunk=chunk)
    assert engine.free == list(range(16))
    while waiting or any(row.finish is None for row in rows):
        count = rng.randint(0, min(len(engine.free), len(waiting), 5))
        engine.join([waiting.pop() for _ in range(count)])
        list(engine.advance())
    assert len(engine.free) == 16
    for row in rows:
        assert row.ids == answer(model, row.prompt, row.sampling, row.max_new_tokens)


def test_a_long_prompt_does_not_hold_up_the_others(model):
    short, long = Request([1], 30, PLAIN), Request(PROMPTS[6] * 2, 5, PLAIN)
    engine = Engine(model, 2, chunk=8)
    engine.join([short])
    list(engine.advance())
    engine.join([long])
    for turn in range(1, 7):  # 41 positions are 6 turns' work; the last prepares the first token
        (ids,) = engine.advance()
        assert (len(short.ids), ids[1] is None) == (turn + 1, turn < 6)
    finish_all(engine, [short, long])
    assert long.ids == answer(model, long.prompt, long.sampling, 5)


def test_rows_that_wait_or_write_are_cancelled(model):
    engine = Engine(model, 3, chunk=4)
    rows = [Request(PROMPTS[6], 9), Request(PROMPTS[6], 9, GREEDY), Request(PROMPTS[1], 9, GREEDY)]
    engine.join(rows)
    list(engine.advance())
    rows[0].finish = "cancelled"
    assert engine.free == [0]
    late = Request(PROMPTS[3], 9, GREEDY)
    assert engine.join([late]) == [0]
    finish_all(engine, [*rows, late])
    assert rows[0].ids == []
    for row in (*rows[1:], late):
        assert row.ids == answer(model, row.prompt, GREEDY, 9)


@pytest.mark.parametrize(("problem", "word"), [(KeyboardInterrupt, "stopped"), (OSError, "error")])
def test_a_failure_leaves_no_slot_behind(model, problem, word, monkeypatch):
    engine, bad = Engine(model, 2), Request([1], 5)
    for length, count in ((48, 5), (49, 0)):
        with pytest.raises(UserError, match=rf"{length} tokens.*leave no room.* 48"):
            engine.join([Request([1], 5), Request([1] * length, count)])
    assert engine.free == [0, 1]
    with monkeypatch.context() as patch:
        patch.setattr(engine, "step", Mock(side_effect=problem))
        engine.join([bad])
        with pytest.raises(problem):
            list(engine.advance())
    assert (bad.finish, engine.free) == (word, [0, 1])
    good = [Request(PROMPTS[1], 9, GREEDY), Request(PROMPTS[3], 9, EVERY_RULE)]
    list(generate(model, good, engine))
    for row in good:
        assert row.ids == answer(model, row.prompt, row.sampling, 9)


def test_fixed_shapes_cross_a_window(monkeypatch):
    model = build(replace(BASE, n_layer=1, sequence_length=300))
    prompt, windows = (PROMPTS[6] * 20)[:250], []
    engine = Engine(model, 1, graphs=True)
    monkeypatch.setattr(
        engine,
        "step",
        lambda *kinds: windows.append(engine.part.window) or engine._step(*kinds),
    )
    assert answer(model, prompt, EVERY_RULE, 40, engine) == answer(model, prompt, EVERY_RULE, 40)
    assert windows == [256] * 7 + [512] * 33
    assert [sample.window_for(n) for n in (1, 256, 257, 1025)] == [256, 256, 512, 2048]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("arranged", [lambda model: model, fuse])
def test_cuda_graphs_change_nothing(arranged):
    model = arranged(build(replace(BASE, d_model=128, d_ff=256, sequence_length=600)).cuda())
    # the window of 256 is left on the way
    prompts = [(PROMPTS[6] * 13)[: 230 + 3 * row] for row in range(8)]
    bias = torch.randn(BASE.vocab_size)
    for sampling, extra in ((GREEDY, None), (EVERY_RULE, None), (PLAIN, None), (PLAIN, bias)):
        rows, same = (
            [Request(prompt, 40, sampling, bias=extra) for prompt in prompts] for _ in range(2)
        )
        list(generate(model, rows, Engine(model, len(rows), graphs=True)))
        list(generate(model, same))
        assert [row.ids for row in rows] == [row.ids for row in same]


@graphs
def test_a_bias_is_added_to_its_own_row(model, graphs):
    """As transformers adds it; rows beside it, and the next in its slot, are as without."""
    process = pytest.importorskip("transformers.generation.logits_process")
    sizes = {(id,): 20 * torch.randn(()).item() for id in range(0, 384, 7)}
    bias = torch.zeros(384)
    bias[[id for (id,) in sizes]] = torch.tensor([*sizes.values()])
    add, ids = process.SequenceBiasLogitsProcessor(sequence_bias=sizes), list(PROMPTS[1])
    with torch.no_grad():
        for _ in range(14):
            text = torch.tensor([ids])
            ids.append(add(text, model(text)[:, -1]).argmax().item())
    engine = Engine(model, 3, graphs=graphs)
    for settings in ([EVERY_RULE, GREEDY, PLAIN], [GREEDY, EVERY_RULE, PLAIN]):
        rows = [Request(PROMPTS[n], 14, sampling) for n, sampling in enumerate(settings)]
        biased = settings[1] == GREEDY
        rows[1].bias = bias if biased else None
        list(generate(model, rows, engine))
        expected = [answer(model, row.prompt, row.sampling, 14) for row in rows]
        assert expected[1] != ids[6:]
        expected[1] = ids[len(PROMPTS[1]) :] if biased else expected[1]
        assert [row.ids for row in rows] == expected


# ---- the rules

OFF = Sampling(temperature=1.0, top_k=0, top_p=1.0)
# for each setting a value that changes the distribution of 500 random logits
CHANGES = {"repetition_penalty": 1.5, "temperature": 0.5, "top_k": 30, "top_p": 0.8, "min_p": 0.05}
CHANGES |= {"seed": 1}


def distribution(logits, sampling, history=()):
    """The probabilities (V,) that the rules leave of one row of logits."""
    logits = torch.as_tensor(logits, dtype=torch.float32)[None]
    size = logits.shape[1]
    columns = columns_of(sample.rule_table([sampling], size))
    if len(history):
        logits = sample.penalize(logits, torch.tensor([history]), columns["repetition_penalty"])
    weights, ids = sample.keep(logits, Branches.of([sampling], size).width, columns)
    full = torch.zeros_like(logits).scatter(1, ids, weights)[0]
    return full / full.sum()


FOUR = torch.tensor([0.1, 0.4, 0.3, 0.2]).log()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.3, 0.2]),
        ({"top_k": 2}, [0, 4 / 7, 3 / 7, 0]),
        ({"top_k": 99}, [0.1, 0.4, 0.3, 0.2]),
        ({"top_p": 0.39}, [0, 1, 0, 0]),
        ({"top_p": 0.41}, [0, 4 / 7, 3 / 7, 0]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"min_p": 0.6}, [0, 4 / 7, 3 / 7, 0]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 9 / 30, 4 / 30]),
        ({"temperature": 1e-38}, [0, 1, 0, 0]),
        # temperature comes before top-p, and top-p sees what top-k left: 4/7 alone is enough
        ({"temperature": 0.5, "top_p": 0.6}, [0, 16 / 25, 9 / 25, 0]),
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.5, "min_p": 0.9}, [0, 1, 0, 0]),
    ],
)
def test_distributions_by_hand(settings, expected):
    expected = torch.tensor(expected, dtype=torch.float32)
    ours = distribution(FOUR, replace(OFF, **settings))
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("seed", range(20))
def test_rules_equal_transformers(seed):
    process = pytest.importorskip("transformers.generation.logits_process")
    generator = torch.Generator().manual_seed(seed)

    def some(low, high):
        return low + (high - low) * torch.rand((), generator=generator).item()

    rules = Sampling(
        temperature=some(0.2, 3),
        top_p=some(0.05, 1),
        min_p=some(0, 0.3),
        top_k=int(some(1, 200)) * (seed % 4 > 0),
        repetition_penalty=some(0.5, 2),
    )
    logits = 4 * torch.randn(1, 500, generator=generator)
    history = torch.randint(500, (1, 40), generator=generator)
    chain = [
        process.RepetitionPenaltyLogitsProcessor(rules.repetition_penalty),
        process.TemperatureLogitsWarper(rules.temperature),
        *([process.TopKLogitsWarper(rules.top_k)] if rules.top_k else []),
        process.TopPLogitsWarper(rules.top_p),
        process.MinPLogitsWarper(rules.min_p),
    ]
    expected = process.LogitsProcessorList(chain)(history, logits.clone()).softmax(dim=-1)[0]
    ours = distribution(logits[0], rules, history[0].tolist())
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", [field.name for field in fields(Sampling)])
def test_every_setting_works_everywhere(name):
    """In a draw, in the engine's table and kernels, on the server and its page. A new one needs
    a line in CHANGES."""
    torch.manual_seed(0)
    logits, changed = torch.randn(500), replace(OFF, **{name: CHANGES[name]})
    if name != "seed":
        history = list(range(50))
        assert not torch.equal(
            distribution(logits, OFF, history), distribution(logits, changed, history)
        )
        assert sample.rule_table([OFF], 500).shape == (1, len(sample.RULES))
        assert not torch.equal(sample.rule_table([OFF], 500), sample.rule_table([changed], 500))
    rows = [replace(OFF, seed=0), replace(changed, seed=CHANGES["seed"] if name == "seed" else 0)]
    crowd = [Request(PROMPTS[3], 30, sampling) for sampling in (*rows, *CROWD)]
    model = build()
    list(generate(model, crowd))
    assert crowd[0].ids != crowd[1].ids == answer(model, PROMPTS[3], rows[1], 30)
    page = (ROOT / "web/chat.html").read_text(encoding="utf-8")
    labels = re.search(r"const LABELS = \{(.*?)\n\};", page, re.DOTALL)[1]
    assert re.search(rf"^  {name}: \[", labels, re.MULTILINE), "no label in web/chat.html"


class Calls(TorchDispatchMode):
    """Lists the kernels that run inside, with the shapes of what they get."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        shapes = [arg.shape if isinstance(arg, torch.Tensor) else None for arg in args]
        self.calls.append((str(function), shapes))
        return function(*args, **(kwargs or {}))


def test_equal_keys_run_equal_kernels():
    """A CUDA graph recorded under a key is replayed for all settings with that key."""
    recorded = {}
    for rows in [[row] for row in CROWD] + [[a, b] for a in CROWD for b in CROWD]:
        rows = (rows * 2)[:2]
        rows = [replace(row, top_k=min(row.top_k, 1) * 40) for row in rows]
        kernels, table = Branches.of(rows, 384), columns_of(sample.rule_table(rows, 384))
        torch.manual_seed(0)
        state = torch.randn(2, 384), torch.randint(384, (2, 9)), torch.rand(2, 1)
        with Calls() as mode:
            sample.next_token(state[0], kernels, table, *state[1:])
        assert recorded.setdefault(kernels, mode.calls) == mode.calls
    assert len(recorded) > 4
    assert len({str(calls) for calls in recorded.values()}) == len(recorded)


def test_a_draw_is_never_of_weight_0():
    logits = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]).log()
    uniform = [2.0**-24, 0.5, 0.5000001, 1.0]
    assert [next_id(logits, PLAIN, [0], u) for u in uniform] == [1, 1, 3, 3]


# ---- fused weights: the same function by other kernels


@torch.no_grad()
@pytest.mark.parametrize("cfg", SHAPES)
def test_fused_weights_in_16_bit_are_no_rougher(cfg):
    exact = build(cfg)(IDS)
    plain = (build(cfg).bfloat16()(IDS).float() - exact).norm()
    cache, model = KVCache(cfg, 2, 40, dtype=torch.bfloat16), fuse(build(cfg).bfloat16())
    parts = [model(part, cache=cache) for part in IDS.split([20, 1, 15], dim=1)]
    assert parts[0].dtype == torch.bfloat16
    assert 0 < (torch.cat(parts, dim=1).float() - exact).norm() < 1.2 * plain < 0.05 * exact.norm()


def by_the_formula(weight, x):
    """Int8Matrix's product in float64: weights rounded to 63 steps of their largest, x to 127."""
    weight, x = weight.double(), x.double()
    step, unit = (s.abs().amax(dim=1, keepdim=True) / n for s, n in ((weight, 63), (x, 127)))
    return ((x / unit).round() * unit) @ ((weight / step).round() * step).T


def spread(*shape):
    """Random numbers whose rows differ in size by orders of magnitude."""
    return torch.randn(shape) * torch.logspace(-3, 3, shape[0])[:, None]


@torch.no_grad()
def test_int8_is_refused_where_outliers_leave_the_others_no_digits():
    """A channel of each norm's output is 3,000 times as large, its weights as much smaller."""
    plain, with_outliers = build(), build()
    for block in with_outliers.model.layers:
        for norm, linears in (
            (block.input_layernorm, [getattr(block.self_attn, f"{n}_proj") for n in "qkv"]),
            (block.post_attention_layernorm, [block.mlp.gate_proj, block.mlp.up_proj]),
        ):
            norm.weight.data[0] *= 3000
            for linear in linears:
                linear.weight.data[:, 0] /= 3000
    ids = list(range(6, 30))
    torch.testing.assert_close(plain(torch.tensor([ids])), with_outliers(torch.tensor([ids])))
    sample.fuse_to_int8(plain, ids)
    with pytest.raises(UserError, match="dtype=int8 changes this model's logits by"):
        sample.fuse_to_int8(with_outliers, ids)


@torch.no_grad()
def test_int8_by_the_formula():
    torch.manual_seed(0)
    layers, x = [nn.Linear(96, n, bias=False) for n in (64, 32)], spread(5, 96)
    for layer in layers:
        layer.weight.copy_(spread(*layer.weight.shape))
    layers[0].weight[2], x[3] = 0, 0  # of nothing comes nothing
    layers[0].weight[1], x[2] = 1, 1  # the largest sums, which 16 bits must hold two by two
    expected = by_the_formula(torch.cat([layer.weight for layer in layers]), x).nan_to_num()
    matrix = Int8Matrix(*layers)
    torch.testing.assert_close(matrix(x).double(), expected, atol=1e-6, rtol=1e-4)
    assert torch.equal(matrix(x), torch.cat([matrix(row) for row in x.split(1)]))


# ---- what is never written


@pytest.mark.parametrize("dtype", ["fp32", "int8", "bf16"])
@pytest.mark.parametrize("template", ["chatml", None])
def test_of_control_ids_only_ends_are_written(tmp_path, tiny_tokenizer, dtype, template):
    """The likeliest id is always a control id: of two opposite rows of the head one is large."""
    source = build(replace(BASE, tie_word_embeddings=False))
    with torch.no_grad():
        a, b, c = 9 * torch.randn(3, 32)
        source.lm_head.weight[[0, 3, 1, 4, 5]] = torch.stack([a, -a, b, -b, c])
    save_model(source, tmp_path)
    tiny_tokenizer.save(tmp_path, BASE.sequence_length, template)
    model = open_model(tmp_path, "cpu", dtype)[0]
    never = {0, 1, 3, 4} if template else {0, 1, 3, 4, 5}
    settings = [*CROWD[:3], replace(GREEDY, repetition_penalty=3.0), replace(PLAIN, temperature=99)]
    for graphs in (False, True):
        asked = [Request(PROMPTS[1], 30, row, top_logprobs=1) for row in settings]
        list(generate(model, asked, Engine(model, len(asked), graphs=graphs)))
        assert not never & {id for request in asked for id in request.ids}
        # log-probabilities are the model's own
        assert never & {top[0][0] for request in asked for _, top in request.logprobs}
    exact = exact_log_probs(model, PROMPTS[1] + asked[0].ids)[len(PROMPTS[1]) - 1 :]
    exact[:, list(never)] = -torch.inf
    if dtype == "fp32":
        assert asked[0].ids == exact.argmax(dim=-1).tolist()
    model.unwritten = None
    assert never & set(answer(model, PROMPTS[1], GREEDY, 30))  # else this test could not fail


# ---- log-probabilities


@torch.no_grad()
def exact_log_probs(model, row):
    """(T - 1, V): of what follows each id of `row`, by one pass over all of it."""
    return F.log_softmax(model(torch.tensor([row]))[0, :-1], dim=-1)


def agree(logprobs, exact, ids, top):
    """`logprobs`, as `Request.logprobs`, says of `ids` what the rows of `exact` (N, V) do."""
    assert len(logprobs) == len(ids) == len(exact)
    values = [own for own, _ in logprobs]
    assert values == pytest.approx(exact[range(len(ids)), ids].tolist(), abs=3e-5)
    for (_, likeliest), row in zip(logprobs, exact):
        expected = row.topk(top)
        assert [id for id, _ in likeliest] == expected.indices.tolist()
        values = [value for _, value in likeliest]
        assert values == pytest.approx(expected.values.tolist(), abs=3e-5)


@pytest.mark.parametrize("burst", [1, 4])
def test_recorded_log_probabilities_are_the_models_own(model, burst):
    rows = [Request(prompt, 9, sampling) for prompt, sampling in zip(PROMPTS[1:5], CROWD)]
    rows[1].top_logprobs, rows[2].top_logprobs = 0, 3
    engine = Engine(model, len(rows))
    engine.burst = burst
    list(generate(model, rows, engine))
    for row, top in zip(rows, [None, 0, 3, None]):
        assert row.ids == answer(model, row.prompt, row.sampling, 9)
        exact = exact_log_probs(model, row.prompt + row.ids)[len(row.prompt) - 1 :]
        if top is None:
            assert row.logprobs == []
        else:
            agree(row.logprobs, exact, row.ids, top)


@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_log_probabilities_of_prompts_are_those_of_one_pass(model, chunk):
    prompts = [PROMPTS[6], [1], PROMPTS[3], PROMPTS[3], [*PROMPTS[3][:-1], 9]]
    prompts.append(PROMPTS[6] * 2 + [1] * 6)
    counts = [0, 3] * 3
    rows = [Request(p, n, GREEDY, (), 2, echo=True) for p, n in zip(prompts, counts)]
    rows[5].max_new_tokens = 0  # fills the context
    plain = Request(PROMPTS[3], 4, GREEDY)  # shares a prompt's keys and values
    list(generate(model, [*rows, plain], Engine(model, 7, chunk=chunk)))
    assert plain.ids == answer(model, PROMPTS[3], GREEDY, 4)
    for row in rows:
        ids = row.prompt + row.ids
        assert (row.finish, len(row.ids)) == ("length", row.max_new_tokens)
        assert row.logprobs[0] == (None, [])
        agree(row.logprobs[1:], exact_log_probs(model, ids), ids[1:], 2)


# ---- seeds


def test_a_seed_gives_its_answer_again_and_none_another(model):
    torch_state = torch.get_rng_state()
    assert answer(model, PROMPTS[2], PLAIN) == answer(model, PROMPTS[2], PLAIN)
    assert answer(model, PROMPTS[2], PLAIN) != answer(model, PROMPTS[2], replace(PLAIN, seed=4))
    fresh = [answer(model, PROMPTS[2], replace(PLAIN, seed=None)) for _ in range(2)]
    assert fresh[0] != fresh[1]
    assert torch.equal(torch.get_rng_state(), torch_state)  # the global generator is left alone


# ---- where it ends


@graphs
@pytest.mark.parametrize("burst", [1, 8], ids=["step-by-step", "in-bursts-as-on-a-GPU"])
def test_rows_end_each_at_its_own_place(model, burst, graphs):
    """At its length, or where the context of 48 is full."""
    asked = [(PROMPTS[6], 99), (PROMPTS[0], 99), *((PROMPTS[1], count) for count in (3, 41, 42))]
    rows, engine = [Request(*row, PLAIN) for row in asked], Engine(model, 5, graphs=graphs)
    engine.burst = burst
    list(generate(model, rows, engine))
    assert [len(row.ids) for row in rows] == [48 - 21, 47, 3, 41, 41]
    assert [row.finish for row in rows] == ["context", "context", "length", "length", "context"]
    for row in rows:
        assert row.ids == answer(model, row.prompt, PLAIN, row.max_new_tokens)


# ---- text


def test_the_stream_is_the_text(tiny_tokenizer):
    text = "Why?  the lazy dog \U0001f600 caf\u00e9\n\n"
    ids = tiny_tokenizer.encode(text)
    for cut in range(len(ids) + 1):
        reply = Reply(tiny_tokenizer)
        pieces = [reply.push(id) for id in ids[:cut]] + [reply.push()]
        assert "".join(pieces) == tiny_tokenizer.decode(ids[:cut])
        assert "\ufffd" not in "".join(pieces[:-1])
    reply = Reply(tiny_tokenizer)
    assert "".join(map(reply.push, range(6))) + reply.push() == ""  # control ids have no text


QUICK = "the quick brown fox jumps over a lazy dog"


@pytest.mark.parametrize(
    ("text", "stop", "trim", "expected"),
    [
        (QUICK, ["fox jumps"], False, "the quick brown "),
        (QUICK, ["fox jumps"], True, "the quick brown"),
        (QUICK, ["x jumps ov"], False, "the quick brown fo"),
        (QUICK, ["jumps", "over", "brown fox"], False, "the quick "),
        (QUICK, ["er a lazy cat"], False, QUICK),
        (QUICK, ["g"], False, "the quick brown fox jumps over a lazy do"),
        (QUICK, ["t"], False, ""),
        (QUICK, [], True, QUICK),
        ("", [], True, ""),
        (" ", [], True, ""),
        ("\n a  b \n", [], True, "a  b"),
        (" \n a \n\n b c \n", ["\n b"], True, "a"),
        (" \n a \n\n b c \n", [" \n "], True, ""),
        (" \n a \n\n b c \n", ["\n\n\n"], False, " \n a \n\n b c \n"),
    ],
)
def test_stop_texts_and_white_space_across_tokens(tiny_tokenizer, text, stop, trim, expected):
    for ids in (tiny_tokenizer.encode(text), [id for c in text for id in tiny_tokenizer.encode(c)]):
        reply, shown = Reply(tiny_tokenizer, stop, trim), ""
        for id in ids:
            shown += reply.push(id)
            assert expected.startswith(shown)  # what was shown is never taken back
            assert reply.shown == len(shown)
        assert reply.stopped == any(text.find(one) >= 0 for one in stop)
        assert shown + reply.push() == expected
        rest = (text.lstrip() if trim else text).removeprefix(expected)
        assert reply.cut == bool(rest)
